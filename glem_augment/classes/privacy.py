"""The differentially private release of class statistics. Every path from a private image to a shared model is here.

**Claim.** A `Release` is mu-GDP, hence (epsilon, delta)-differentially private, under adding or removing one image.

1. *Statistic.* An image with latent u in class y is clipped to |u| <= R. With v = u / R = (p, w), p the leading
   coordinates, the image adds t = (a0, a1 v, a2 svec(p p^T), a2 w^2) in the place of class y, and zeros elsewhere. svec
   is the lower triangle with its off-diagonal elements times sqrt(2), so |svec(p p^T)| = |p|^2. u and the place may be
   any functions of one image and of public or released numbers: leading coordinates, z less a released mean, energies
   in bands; a class, a cell of a class, or one place for all.
2. *Norm.* |t|^2 = a0^2 + a1^2 |v|^2 + a2^2 (|p|^4 + sum w_i^4), and |p|^4 + sum w_i^4 <= (|p|^2 + |w|^2)^2 <= 1. With
   a0^2 + a1^2 + a2^2 = 1, |t| <= 1. Places of classes are disjoint. One image thus changes the sum of all t by at most
   1 in L2, and m images of one person change it by at most m.
3. *Noise.* The sum plus N(0, (m / mu)^2) in every element is mu-GDP (Dong, Roth & Su 2022). It is (epsilon, delta)-DP
   exactly when delta >= Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) (Balle & Wang 2018).
4. *Composition.* Releases of the same images are together sqrt(sum mu^2)-GDP. Clips, slots and coordinates of a release
   may depend on earlier ones, and so may its mu: composition is fully adaptive as long as the sum of mu^2 has a fixed
   bound (Smith & Thakurta 2022). Every branch of a fit adds up to the promise's mu^2, which `describe` checks, or stops
   after the counts.
5. *Exact sums.* v is cut towards zero to multiples of 2^-20, by operations that see this image alone. Its norm is
   checked in integers. Sums and products are integers below 2^53 in float64, and below 2^63 in int64. So the sums have
   no rounding, and the order of the images leaves no trace (Mironov 2012; Casacuberta et al. 2022).
6. *Noise in floats.* A rounded normal number plus an integer is the rounded sum, so it is post-processing of step 3.
   The noise has a relative error of about 1e-15 in both tails, from 106 random bits. The sum is rounded to steps of
   sd/256 to sd/128, so the floats change the probability of an outcome by a factor of at most about 1 +- 1e-11. For n
   released numbers this adds at most 2e-11 n to epsilon: 3e-5 for 10 classes of 512 numbers, 1.2e-4 for 10 of 2048.
   This holds up to 9.2 sd. Beyond, random bits are coarser: one of n = 10^7 numbers is there with probability 4e-13.
7. *Public:* class names, K, d, R, the leading coordinates, shares, epsilon, delta, the code, and how latents are made.
   *Secret:* images, labels, exact sums, noise. The noise comes from the operating system and is never stored.

**The caller's duty.** The latent of an image depends on this image and public facts alone, not on the batch around it.
Nothing else of the images leaves the machine. Running time, memory, and traffic between ranks are not covered.

References: Balle & Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018. Dong, Roth & Su,
*Gaussian Differential Privacy*, JRSS-B 2022. Mironov, *On Significance of the Least Significant Bits*, CCS 2012.
Smith & Thakurta, *Fully Adaptive Composition for Gaussian Differential Privacy*, 2022 (arXiv 2210.17520).
Casacuberta et al., *Widespread Underestimation of Sensitivity in Differentially Private Libraries*, CCS 2022.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from glem_augment import __version__, distributed
from glem_augment.checks import check_number, check_whole
from glem_augment.errors import DataError, GLEMError

__all__ = [
    "Privacy",
    "PrivateSums",
    "Release",
    "delta_of",
    "describe",
    "epsilon_of",
    "promise",
    "promised",
    "round_of",
    "total",
]

SHARES = (0.02, 0.18, 0.80)  # of mu^2: counts, sums, second moments
LEADING = 1024  # coordinates with full second moments
_BITS = 20  # v is a multiple of 2^-20, and v v^T of 2^-40
_ONE = 2**_BITS
_CHUNK = 2**12  # images in one product: 12 + 40 bits stay below the 53 of float64
_MOST = 2**22  # images of a class: 22 + 40 bits plus noise stay below the 63 of int64; as many numbers of a latent
_LARGEST_SD = 2.0**17  # in images: 17 + 40 bits, times a quantile of at most 2^4, stay below 2^62
_CLIPS = 1e-30, 1e30
_MOST_UNSTATED = 10**6  # images; for so many the default delta is enough
_MECHANISM = "Gaussian noise on counts, sums and second moments per class of clipped latents"


# ---- accounting ------------------------------------------------------------------------------------------------------


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta for which a mu-GDP mechanism is (epsilon, delta)-DP (Balle & Wang 2018, Theorem 8).

    mu > 0 and epsilon >= 0. Logarithms keep it accurate where both terms are tiny or nearly cancel.
    """
    points = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    a, b = torch.special.log_ndtr(points).tolist()
    return -math.exp(a) * math.expm1(min(epsilon + b - a, 0.0))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon for which a mu-GDP mechanism is (epsilon, delta)-DP. mu > 0; delta in (0, 1)."""
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    # There the first term alone is below delta.
    largest = mu * (mu / 2 + math.sqrt(2 * math.log(1 / delta)))
    return _bisect(lambda epsilon: delta_of(mu, epsilon) > delta, 0.0, largest)[1]


def _bisect(below: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Neighbouring floats around the point from which on `below` is false."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


@dataclass(frozen=True)
class Privacy:
    """A promise: (epsilon, delta)-differential privacy with respect to adding or removing the images of one person.

    Args:
        epsilon: from 0.01 to 50. The probability of any outcome changes by at most a factor e^epsilon ...
        delta: ... plus at most this; from 1e-12 to 1e-3, and far below one over the number of images.
        images_per_person: m, the most images that one person has in the set. The noise is m times as large.
        images: a public number, the most images that the set may have; None: a million. A delta above one over it could
            show one of them.

    ValueError: a value is out of range. TypeError: it is not a number.
    """

    epsilon: float
    delta: float = 1e-6
    images_per_person: int = 1
    images: int | None = None

    def __post_init__(self) -> None:
        # As Python's numbers: 16-bit floats would round mu.
        object.__setattr__(self, "epsilon", check_number("epsilon", self.epsilon, 0.01, 50))
        object.__setattr__(self, "delta", check_number("delta", self.delta, 1e-12, 1e-3))
        object.__setattr__(self, "images_per_person", check_whole("images_per_person", self.images_per_person, 1))
        most = _MOST_UNSTATED if self.images is None else check_whole("images", self.images, 1)
        if self.delta * most > 1 + 1e-9:
            raise ValueError(
                f"delta={self.delta:g} is above one over {most:,} images: give at most {1 / most:.0e}, or state "
                "how many images there are at most (images=, --images)"
            )

    @cached_property
    def mu(self) -> float:
        """The largest mu whose Gaussian mechanism keeps the promise, accurate to about 1e-12."""
        return _bisect(lambda mu: delta_of(mu, self.epsilon) <= self.delta, 0.0, 100.0)[0]

    @property
    def mu_per_image(self) -> float:
        """mu / m, what one image may spend: the noise on a statistic with sensitivity 1 has sd m / mu."""
        return self.mu / self.images_per_person

    @property
    def unit(self) -> str:
        """Whose presence is hidden: "one image" or "m images of one person"."""
        return "one image" if self.images_per_person == 1 else f"{self.images_per_person} images of one person"


def total(privacies: Iterable[Privacy], delta: float = 1e-6) -> tuple[float, float]:
    """mu, and epsilon at `delta`, of several releases of the same images: mu^2 adds up (Dong, Roth & Su 2022).

    The unit is the largest one: the most images of one person that any of the releases protects.
    """
    privacies = list(privacies)
    if not privacies:
        return 0.0, 0.0
    largest = max(privacy.images_per_person for privacy in privacies)
    mu = largest * math.hypot(*(privacy.mu_per_image for privacy in privacies))
    return mu, epsilon_of(mu, check_number("delta", delta, 0, 0.1, open_low=True))


# ---- noise -----------------------------------------------------------------------------------------------------------


def _gaussian(count: int) -> Tensor:
    """Standard normal numbers float64 [count] from the operating system's entropy, by the inverse of the normal CDF.

    A random sign and a 106-bit uniform number below 1/2 give both tails the full relative precision of float64.
    """
    words = torch.frombuffer(bytearray(os.urandom(16 * max(count, 1))), dtype=torch.int64).view(2, -1)[:, :count]
    high, low = (words & (2**53 - 1)).double()
    tail = torch.special.ndtri((high + (low + 0.5) * 2.0**-53) * 2.0**-54)
    return torch.where(words[0] < 0, tail, -tail)


def _noisy(exact: Tensor, bits: int, sd: float) -> Tensor:
    """`exact` int64 in units of 2^-bits plus noise of deviation `sd`, rounded to steps of sd/256 to sd/128, float64."""
    units = sd * 2.0**bits
    noise = (_gaussian(exact.numel()).view_as(exact) * units).round().long()
    drop = max(0, math.floor(math.log2(units)) - 7)
    return ((exact + noise + (1 << drop >> 1)) >> drop).double() * 2.0 ** (drop - bits)


def _deviation(privacy: Privacy, part: float, share: float = 1.0) -> float:
    """The noise's deviation on a statistic with sensitivity 1, which may spend `part` times `share` of mu^2."""
    sd = 1 / (privacy.mu_per_image * math.sqrt(check_number("part", part, 0, 1, open_low=True) * share))
    if sd > _LARGEST_SD:
        raise ValueError(f"the noise would exceed {_LARGEST_SD:,.0f} images: raise epsilon, or lower images_per_person")
    return sd


def _from_primary(draw: Callable[[], Any]) -> Any:
    """What rank 0 draws, on all ranks. Noise of several ranks could be averaged."""
    return distributed.gather(draw() if distributed.is_primary() else None)[0]


# ---- statistics ------------------------------------------------------------------------------------------------------


def _fixed_point(u: Tensor, clip: float) -> Tensor:
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


@dataclass(frozen=True, eq=False)
class Release:
    """Noisy statistics of K classes in units of u, float64 on the CPU. Whatever is computed from them stays private.

    Attributes:
        counts: number of images [K]. Like all the statistics, it may be negative.
        sums: sums of u [K, d], u clipped to norm `clip`.
        seconds: sums of u u^T over the m leading coordinates [K, m, m], symmetric.
        squares: sums of u^2 of the other coordinates [K, d - m].
        clip: R. privacy: the promise of which this release spends `part` of mu^2.
        shares: of that part, for counts, sums, and seconds with squares.
    """

    counts: Tensor
    sums: Tensor
    seconds: Tensor
    squares: Tensor
    clip: float
    privacy: Privacy
    part: float = 1.0
    shares: tuple[float, ...] = SHARES

    @property
    def sd_count(self) -> float:
        """Standard deviation of the noise of a count, in images."""
        return _deviation(self.privacy, self.part, self.shares[0])

    @property
    def sd_sum(self) -> float:
        """Standard deviation of the noise of an element of `sums`."""
        return _deviation(self.privacy, self.part, self.shares[1]) * self.clip

    @property
    def sd_second(self) -> float:
        """Deviation of the noise of `squares` and of diagonals of `seconds`; off the diagonal, sd_second / sqrt(2)."""
        return _deviation(self.privacy, self.part, self.shares[2]) * self.clip**2


def round_of(release: str, privacy: Privacy, part: float, **facts: Any) -> dict[str, Any]:
    """The entry of a release in `rounds`; `noise` is the standard deviation on a statistic of sensitivity 1."""
    return {"release": release, "noise": _deviation(privacy, part), **facts}


def describe(privacy: Privacy, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry `privacy` of config.json for all releases of a fit. GLEMError: they do not add up to the promise."""
    facts = {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "mu": privacy.mu,
        "images_per_person": privacy.images_per_person,
        "images": privacy.images,
        "unit": privacy.unit,
        "rounds": list(rounds),
        "mechanism": _MECHANISM,
        "version": __version__,
    }
    promised(facts)
    return facts


def promised(facts: dict[str, Any]) -> Privacy:
    """The promise of a model's entry `privacy`. GLEMError: it does not follow from the noise of the entry's rounds."""
    try:
        privacy = Privacy(*(facts[name] for name in ("epsilon", "delta", "images_per_person", "images")))
        noise = [check_number("noise", each["noise"], 0, math.inf, open_low=True) for each in facts["rounds"]]
        spent = privacy.images_per_person * math.hypot(*(1 / sd for sd in noise))
        good = all(math.isclose(mu, privacy.mu, rel_tol=1e-9) for mu in (facts["mu"], spent))
        if good and facts["unit"] == privacy.unit:
            return privacy
    except (KeyError, TypeError, ValueError) as error:
        raise GLEMError(f"the record of its privacy is not valid: {error}") from None
    raise GLEMError(f"the releases spend mu={spent:.6g}, and epsilon={privacy.epsilon:g} stands for {privacy.mu:.6g}")


def promise(facts: dict[str, Any]) -> str:
    """The promise of a model's entry `privacy`, in one sentence."""
    return (
        f"This model, and every image drawn from it, is ({facts['epsilon']:.9g}, {facts['delta']:.9g})-differentially "
        f"private with respect to adding or removing {facts['unit']}."
    )


def _shapes(classes: int, dim: int, leading: int, shares: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Of counts, sums, seconds and squares. A statistic that is not released is empty, but for the counts."""
    first, second = (dim if shares[1] else 0), (dim if shares[2] else 0)
    leading = min(leading, second)
    return (classes,), (classes, first), (classes, leading, leading), (classes, second - leading)


def _shares(shares: Sequence[float]) -> tuple[float, ...]:
    if len(shares) != len(SHARES):
        raise ValueError(f"shares are three numbers, for counts, sums and second moments; got {len(shares)}")
    whole = math.fsum(check_number("a share", share, 0, math.inf) for share in shares)
    if not whole:
        raise ValueError("one of the shares must be above 0")
    return tuple(share / whole for share in shares)


class PrivateSums:
    """Adds up the statistics of private images exactly, and releases them once, with noise.

    All ranks add their own images and call `release` together.

    Args:
        num_classes: K.
        dim: d, the numbers of a latent, in public coordinates sorted by public variance.
        clip: R, the public norm to which latents are clipped.
        privacy: the promise.
        leading: coordinates with full second moments; of the rest, only squares. Default: at most 1024.
        shares: parts of mu^2 for counts, sums and second moments; they are divided by their sum. With the share 0 a
            statistic is not released, and its tensor is empty.
        part: the part of the promise's mu^2 that this release spends. All releases of the same images together spend
            at most 1; `describe` checks it.

    ValueError: a number is out of range. TypeError: it has the wrong type.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        clip: float,
        privacy: Privacy,
        leading: int | None = None,
        shares: Sequence[float] = SHARES,
        part: float = 1.0,
    ) -> None:
        classes, dim = check_whole("num_classes", num_classes, 1), check_whole("dim", dim, 1)
        if dim > _MOST:
            raise ValueError(f"dim must be at most {_MOST:,}, got {dim:,}")
        leading = min(dim, LEADING if leading is None else check_whole("leading", leading, 0))
        self.num_classes, self.dim, self.leading = classes, dim, leading
        self.clip = check_number("clip", clip, *_CLIPS)
        self.privacy, self.part, self.shares = privacy, part, _shares(shares)
        _deviation(privacy, part, min(share for share in self.shares if share))
        shapes = _shapes(classes, dim, leading, self.shares)
        self._exact: list[Tensor] | None = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]

    def add(self, u: Tensor, y: Tensor) -> None:
        """Add latents u [n, d] of floats with labels y [n] int64. Large batches take less time per image.

        Latents with NaN or infinity count as zero. ValueError: a shape, type or label is wrong.
        """
        if u.ndim != 2 or u.shape[1] != self.dim or not u.is_floating_point():
            raise ValueError(f"u must have floats of shape [n, {self.dim}], got {u.dtype} {list(u.shape)}")
        if y.shape != u.shape[:1] or y.dtype != torch.int64:
            raise ValueError(f"y must be int64 of shape [{len(u)}], got {y.dtype} {list(y.shape)}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(f"labels must be from 0 to {self.num_classes - 1}: map the classes first")
        counts, sums, seconds, squares = self._secret()
        for rows, labels in zip(u.split(_CHUNK), y.cpu().split(_CHUNK), strict=True):
            fixed = _fixed_point(rows, self.clip)
            for k in labels.unique().tolist():
                own = fixed[labels == k]
                counts[k] += len(own)  # It also guards against overflow, so it is there even if it is not released.
                if self.shares[1]:
                    sums[k] += own.sum(0)
                if self.shares[2]:
                    lead, rest = own[:, : self.leading].double(), own[:, self.leading :]
                    seconds[k] += (lead.T @ lead).long()
                    squares[k] += rest.square().sum(0)

    def release(self) -> Release:
        """The noisy statistics of all ranks' images, with noise from rank 0. The exact sums are cleared.

        GLEMError: it was called before. DataError: a class has more than 2^22 images, so the sums could overflow. This
        error is not private.
        """
        exact, self._exact = self._secret(), None  # First: a call that fails must not be repeated.
        distributed.add_up(*exact)
        try:
            if int(exact[0].max()) > _MOST:
                raise DataError(f"a class has more than {_MOST:,} images: divide it into several classes")
            counts, sums, seconds, squares = _from_primary(lambda: self._with_noise(*exact))
        finally:
            for tensor in exact:
                tensor.zero_()
        return Release(
            counts, sums * self.clip, seconds * self.clip**2, squares * self.clip**2,
            self.clip, self.privacy, self.part, self.shares,
        )  # fmt: skip

    def _with_noise(self, counts: Tensor, sums: Tensor, seconds: Tensor, squares: Tensor) -> list[Tensor]:
        count, first, second = (_deviation(self.privacy, self.part, share) if share else 1.0 for share in self.shares)
        if not self.shares[0]:
            counts = counts[:0]
        leading = seconds.shape[1]
        row, column = torch.tril_indices(leading, leading, -1)
        noisy = torch.zeros(seconds.shape, dtype=torch.float64)
        for exact, out in zip(seconds, noisy, strict=True):
            out[row, column] = _noisy(exact[row, column], 2 * _BITS, second / math.sqrt(2))
            out += out.T.clone()
            out.diagonal().copy_(_noisy(exact.diagonal(), 2 * _BITS, second))
        released = _noisy(counts << _BITS, _BITS, count), _noisy(sums, _BITS, first)
        return [*released, noisy, _noisy(squares, 2 * _BITS, second)]

    def _secret(self) -> list[Tensor]:
        if self._exact is None:
            raise GLEMError("these sums were released already: a second release would break the promise")
        return self._exact

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("PrivateSums cannot be copied or pickled: a copy could be released a second time")
