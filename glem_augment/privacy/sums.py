"""The differentially private release of sums over images. Every path from a private image to a shared model is here.

**Claim.** The releases of a fit are together mu-GDP, hence (epsilon, delta)-differentially private, under adding or
removing one image.

1. *Statistic.* A release adds up one statistic t of each image, in the place (slot) of its class, and zeros elsewhere:
   the count, t = 1; a sum, t = v; or the scatter, t = svec(v v^T). Here v = u / R, and u is clipped to |u| <= R. svec
   is the lower triangle with its off-diagonal elements times sqrt(2).
2. *What u may be.* Any function of this one image and of public or released numbers: the image's coordinates about a
   public centre, times public weights; about a released mean; their squared norm. The autoencoder, the public
   coordinates, centre, weights and norm quantile were made from other images, so the mechanism is the same for any
   private images. The slot may be the class or one place for all images. A label is a part of its image.
3. *Norm.* Clipping makes |v| <= 1, whatever the weights and the image, and |svec(v v^T)| = |v|^2 <= 1. So |t| <= 1.
   One image changes the sum of all t by at most 1 in L2, and m images of one person change it by at most m.
4. *Noise.* The sum plus N(0, (m / mu)^2) in every element is mu-GDP (`privacy.mechanism`).
5. *Composition.* Releases of the same images are together sqrt(sum mu^2)-GDP. Clips, slots, coordinates and parts of a
   release may depend on earlier releases: composition is fully adaptive as long as the sum of mu^2 has a fixed bound
   (Smith & Thakurta 2022). Every branch of a fit adds up to the promise's mu^2, which `record.describe` checks.
6. *Exact sums.* v is cut towards zero to multiples of 2^-20, by operations that see this image alone. Its norm is
   checked in integers. Sums and products are integers below 2^53 in float64, and below 2^63 in int64. So the sums have
   no rounding, and the order of the images leaves no trace (Mironov 2012; Casacuberta et al. 2022).
7. *Noise in floats.* A rounded normal number plus an integer is the rounded sum, so it is post-processing of step 4.
   The noise has a relative error of about 1e-15 in both tails, from 106 random bits. The sum is rounded to steps of
   sd/256 to sd/128, so the floats change the probability of an outcome by a factor of at most about 1 +- 1e-11. For n
   released numbers this adds at most 2e-11 n to epsilon: 3e-5 for 10 classes of 512 numbers with the scatter of all
   classes. This holds up to 9.2 sd. Beyond, random bits are coarser: one of 10^7 numbers is there with probability
   4e-13.
8. *Public:* class names, K, d, the public coordinates, shares, epsilon, delta, the code, and how latents are made.
   *Secret:* images, labels, exact sums, noise. The noise comes from the operating system and is never stored.

**The caller's duty.** The latent of an image depends on this image and public facts alone, not on the batch around it.
Nothing else of the images leaves the machine. Running time, memory, and traffic between ranks are not covered.

References: Balle & Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018. Dong, Roth & Su,
*Gaussian Differential Privacy*, JRSS-B 2022. Mironov, *On Significance of the Least Significant Bits*, CCS 2012. Smith
& Thakurta, *Fully Adaptive Composition for Gaussian Differential Privacy*, 2022 (arXiv 2210.17520). Casacuberta et al.,
*Widespread Underestimation of Sensitivity in Differentially Private Libraries*, CCS 2022.
"""

from __future__ import annotations

from typing import Literal, NoReturn

import torch
from torch import Tensor

from glem_augment import distributed
from glem_augment.checks import check_number
from glem_augment.errors import DataError, GLEMError
from glem_augment.privacy.mechanism import Privacy, deviation, noisy

Statistic = Literal["counts", "sums", "scatter"]
_BITS = 20  # v is a multiple of 2^-20, and v v^T of 2^-40
_ONE = 2**_BITS
_CHUNK = 2**12  # images in one product: 12 + 40 bits stay below the 53 of float64
_MOST = 2**22  # images of a slot: 22 + 40 bits plus noise stay below the 63 of int64
_CLIPS = 1e-30, 1e30


def fixed_point(u: Tensor, clip: float) -> Tensor:
    """u / R [n, d] clipped to norm 1, in units of 2^-20: int64, with squared row sums of at most 2^40.

    Elementwise operations, exact maxima and integer sums: no row depends on another. Rows with NaN or infinity become
    zero, since an error would tell that such an image is there.
    """
    rows = u.detach().cpu().double()
    rows = rows.masked_fill(~rows.isfinite().all(1, keepdim=True), 0.0)
    # The division by the largest element keeps huge numbers in range. It lengthens no row: it is at least R.
    scale = rows.abs().amax(1, keepdim=True).clamp(min=clip)
    whole = (rows / scale * _ONE).trunc()
    length = whole.long().square().sum(1, keepdim=True).double().sqrt()
    # The small margin absorbs the rounding of this line.
    fixed = (whole * ((1 - 1e-9) * _ONE / length).clamp(max=1)).trunc().long()
    return fixed * (fixed.square().sum(1, keepdim=True) <= _ONE**2)  # The bound itself, in integers.


class PrivateSums:
    """Adds up a statistic of private images exactly, and releases it once, with noise.

    All ranks add their own images and call `release` together.

    Args:
        statistic: "counts" [slots], "sums" of u [slots, d], or "scatter", sums of u u^T [slots, d, d].
        slots, dim: the numbers of places, and of numbers in u.
        clip: R, the norm to which u is clipped, from public or released numbers.
        privacy, part: the promise, and the part of its mu^2 that this release spends. All releases of the same images
            together spend at most 1; `record.describe` checks it.

    Attributes:
        noise: the noise's deviation on t, whose sensitivity is 1.
        sd: the deviation of the noise of a released number; of scatter on the diagonal, sd / sqrt(2) beside it.

    ValueError: a number is out of range.
    """

    def __init__(self, statistic: Statistic, slots: int, dim: int, clip: float, privacy: Privacy, part: float) -> None:
        self.statistic, self.dim = statistic, dim
        self.clip = check_number("clip", clip, *_CLIPS)
        self.noise = deviation(privacy, part)
        self._unit = {"counts": 1.0, "sums": self.clip, "scatter": self.clip**2}[statistic]
        self.sd = self.noise * self._unit
        shape = {"counts": (slots,), "sums": (slots, dim), "scatter": (slots, dim, dim)}[statistic]
        self._exact: Tensor | None = torch.zeros(shape, dtype=torch.int64)
        self._counts = torch.zeros(slots, dtype=torch.int64)  # guard against overflow

    def add(self, u: Tensor, slot: Tensor) -> None:
        """Add u [n, d] of floats in the places `slot` [n] int64. Rows with NaN or infinity count as zero."""
        exact = self._secret()
        for rows, places in zip(u.split(_CHUNK), slot.cpu().split(_CHUNK), strict=True):
            fixed = fixed_point(rows, self.clip)
            for k in places.unique().tolist():
                own = fixed[places == k]
                self._counts[k] += len(own)
                if self.statistic == "counts":
                    exact[k] += len(own)
                elif self.statistic == "sums":
                    exact[k] += own.sum(0)
                else:
                    exact[k] += (own.double().T @ own.double()).long()

    def release(self) -> Tensor:
        """The noisy statistic of all ranks' images, float64, with noise from rank 0. The exact sums are cleared.

        GLEMError: it was called before. DataError: a slot has more than 2^22 images, so the sums could overflow. This
        error is not private.
        """
        exact, self._exact = self._secret(), None  # First: a call that fails must not be repeated.
        distributed.add_up(exact, self._counts)
        try:
            if int(self._counts.max()) > _MOST:
                raise DataError(f"a class has more than {_MOST:,} images: divide it into several classes")
            # Noise of several ranks could be averaged.
            found = distributed.gather(self._with_noise(exact) if distributed.is_primary() else None)[0]
        finally:
            exact.zero_(), self._counts.zero_()
        assert found is not None
        return found * self._unit

    def _with_noise(self, exact: Tensor) -> Tensor:
        if self.statistic == "counts":
            return noisy(exact << _BITS, _BITS, self.noise)
        if self.statistic == "sums":
            return noisy(exact, _BITS, self.noise)
        row, column = torch.tril_indices(self.dim, self.dim, -1)
        found = torch.zeros(exact.shape, dtype=torch.float64)
        for each, out in zip(exact, found, strict=True):
            out[row, column] = noisy(each[row, column], 2 * _BITS, self.noise / 2**0.5)
            out += out.T.clone()
            out.diagonal().copy_(noisy(each.diagonal(), 2 * _BITS, self.noise))
        return found

    def _secret(self) -> Tensor:
        if self._exact is None:
            raise GLEMError("these sums were released already: a second release would break the promise")
        return self._exact

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("PrivateSums cannot be copied or pickled: a copy could be released a second time")
