"""What a flow knows of classes, read off the latents of labelled images: modes, and Gaussians for new classes.

Nothing is trained here. One pass over the images gives, per class with n_y images, mean and sum of squares; with SS_y
the summed squared deviations from the class's own mean and v the pooled within-class variance, per dimension,

    v = sum_y SS_y / sum_y (n_y - 1),        sigma_y^2 = (SS_y + k v) / (n_y - 1 + k),

so a class of one image gets the pooled variance, and a class of many its own. k (``shrinkage``) counts as k more images
whose spread is v: it is the posterior mode of the variance under a conjugate prior at v, up to the constant in k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glem_augment.errors import DataError
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.latent.modes import REST_FLOOR, ClassModes, fit_class_modes

__all__ = ["adapt_classes", "gaussians_of", "psi_that_holds"]

# psi's three numbers must stay below 1e6 in config.json; latents near that have left what a flow can invert anyway.
_LARGEST_VARIANCE = 1e5
# The variances that psi represents well lie between these shares of its range; nearer to its ends s runs off.
_LOW_SHARE, _HIGH_SHARE = 0.01, 0.99


@torch.no_grad()
def adapt_classes(
    latents_of_class: Callable[[int], Tensor],
    counts: Sequence[int],
    dim: int,
    rank: int,
    shrinkage: float,
    psi: tuple[float, float, float] | None,
) -> tuple[ClassGaussians, ClassModes]:
    """Gaussians and modes of new classes from their latents, each class read once.

    Args:
        latents_of_class: gives the latents [n_y, d] of class y.
        counts: n_y of each class, at least one of them 2 or more.
        dim: d.
        rank: k modes per class.
        shrinkage: k of the variances, in images.
        psi: kept if its range holds all variances, otherwise widened.

    Raises:
        DataError: latents that are not finite, or off any scale.
    """
    statistics = _Statistics(latents_of_class, len(counts), dim)
    modes = _modes(statistics, counts, rank)
    variance = statistics.variance(shrinkage)
    return gaussians_of(statistics.mean, variance, psi_that_holds(variance, psi)), modes


# ---- statistics ------------------------------------------------------------------------------------------------------


class _Statistics:
    """Mean and summed squares of each class, taken in passing while ``latents_of_class`` is read once per class.

    Attributes:
        mean [K, d], squares [K, d], count [K], float64: n_y, mean, and sum of (z - mean)^2.
    """

    def __init__(self, latents_of_class: Callable[[int], Tensor], num_classes: int, dim: int) -> None:
        self._latents_of_class = latents_of_class
        self.mean = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.squares = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.count = torch.zeros(num_classes, dtype=torch.float64)

    def latents(self, index: int) -> Tensor:
        z = self._latents_of_class(index)
        wide = z.double()
        mean = wide.mean(0)
        if not bool(torch.isfinite(mean).all()):
            raise DataError(
                f"class {index} has latents that are not finite: check the flow with model.check_invertibility"
            )
        self.count[index] = len(z)
        self.mean[index] = mean
        self.squares[index] = (wide - mean).square_().sum(0)
        return z

    def pooled(self) -> Tensor:
        """Within-class variance over all classes, unbiased: [d]."""
        freedom = (self.count - 1).clamp_min(0).sum()
        return (self.squares.sum(0) / freedom).clamp_min(REST_FLOOR)

    def variance(self, shrinkage: float) -> Tensor:
        """sigma_y^2 [K, d], shrunk towards the pooled variance."""
        pooled = self.pooled()
        # Without shrinkage a class of one image would divide by zero; it has nothing but the pool in any case.
        weight = (self.count - 1 + shrinkage)[:, None]
        own = (self.squares + shrinkage * pooled) / weight.clamp_min(1e-12)
        return torch.where(weight > 0, own, pooled).clamp_min(REST_FLOOR)


def _modes(statistics: _Statistics, counts: Sequence[int], rank: int) -> ClassModes:
    """Modes of every class. One of a single image gets those of the pooled covariance, as its variances do."""
    several = [index for index, count in enumerate(counts) if count > 1]
    single = [index for index, count in enumerate(counts) if count == 1]
    dim = statistics.mean.shape[1]
    order: Iterator[int] = iter(several)
    fitted = fit_class_modes(lambda _: statistics.latents(next(order)), len(several), rank, dim)
    for index in single:
        statistics.latents(index)
    if not single:
        return fitted
    modes = ClassModes.empty(len(counts), fitted.rank, dim)
    for name, values in fitted.named_buffers():
        if name.startswith("shared"):
            getattr(modes, name).copy_(values)
        else:
            getattr(modes, name)[several] = values
    explained = (fitted.shared_scales[:, None] * fitted.shared_directions).square().sum(0)
    modes.mean[single] = statistics.mean[single].float()
    modes.directions[single] = fitted.shared_directions
    modes.scales[single] = fitted.shared_scales
    modes.rest[single] = (statistics.pooled().float() - explained).clamp_min(REST_FLOOR)
    modes.counts[single] = 1
    return modes


# ---- variances as the Gaussians store them ---------------------------------------------------------------------------


@torch.no_grad()
def psi_that_holds(variance: Tensor, psi: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    """``psi`` itself where its range holds all of ``variance`` [K, d]; else one, (a, b, c), that is wide enough.

    The flow was trained towards the range of its own psi, but images of another kind need not stay in it; cutting their
    variances off would change densities silently.

    Raises:
        DataError: variances beyond 1e5.
    """
    low, high = float(variance.min()), float(variance.max())
    if not high <= _LARGEST_VARIANCE:
        raise DataError(
            f"the latents of these images have variances up to {high:.3g}: they are off the scale of what the flow was "
            "trained on; check it with model.check_invertibility, or train it on them"
        )
    if psi is None:
        # Plain variances have a lower bound as well.
        plain = ClassGaussians(1, 1, psi=None)
        plain.s.fill_(low)
        if bool(plain.variance() == plain.s):
            return None
    if psi is not None:
        a, _, c = psi
        if c + _LOW_SHARE * a <= low and high <= c + _HIGH_SHARE * a:
            return psi
    return (2 * high, 0.2 if psi is None else psi[1], low / 2)


@torch.no_grad()
def gaussians_of(mean: Tensor, variance: Tensor, psi: tuple[float, float, float] | None) -> ClassGaussians:
    """Class Gaussians with these means and variances [K, d], all within psi's range: exact up to float32."""
    gaussians = ClassGaussians(*mean.shape, psi=psi)
    gaussians.mu.copy_(mean)
    if psi is None:
        gaussians.s.copy_(variance)
    else:
        a, b, c = psi
        gaussians.s.copy_(torch.logit((variance.double() - c) / a) / b)
    return gaussians
