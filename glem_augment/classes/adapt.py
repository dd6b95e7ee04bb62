"""Class Gaussians and modes for new images, in closed form from their latents; nothing is trained.

With n_y latents of class y, SS_y the summed squared deviations from the class's own mean, and v the pooled within-class
variance, per dimension,

    v  =  sum_y SS_y / sum_y (n_y - 1),        sigma_y^2  =  (SS_y + k v) / (n_y - 1 + k),

so a class of one image gets the pooled variance, and a class of many images keeps nearly its variance. k (`shrinkage`)
counts as k more images whose spread is v: sigma_y^2 is the posterior mode under a conjugate prior at v, up to a
constant in k.

The posterior's temperature is fitted to the same latents. For this fit each latent z is left out of the Gaussian of its
class. Without z a class of n latents with mean m has

    m'  =  m - (z - m) / (n - 1),        SS'  =  SS - (z - m)^2 n / (n - 1),

so the fit costs no second pass. v keeps the influence of z, one image among all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glem_augment.checks import INITIAL_VARIANCE, LOWEST_SHARE
from glem_augment.classes.fit import REST_FLOOR, fit_class_modes, pooled_covariance
from glem_augment.classes.gaussians import INNER, ClassGaussians, fit_temperature
from glem_augment.classes.modes import SHRUNK, ClassModes
from glem_augment.errors import DataError

# config.json holds numbers of psi up to 1e6; a flow can't invert latents of that size anyway.
_LARGEST_VARIANCE = 1e5
# Limits of full covariances: dimensions, numbers in all, and least images per dimension. At 4 images plain variances do
# as well (benchmarks/results/covariances.md).
_MOST_FULL_DIM, _MOST_FULL, _IMAGES_PER_DIMENSION = 1024, 2**26, 8
# At most about so many latents, evenly spread over the classes, are kept to fit the temperature.
_LEFT_OUT = 2000

Psi = tuple[float, float, float] | None


def can_be_full(classes: int, dim: int, images: float = math.inf) -> bool:
    """Whether full covariances fit in memory and in a file, and whether so many images are enough for them."""
    return dim <= _MOST_FULL_DIM and classes * dim * dim <= _MOST_FULL and images >= _IMAGES_PER_DIMENSION * dim


@torch.no_grad()
def adapt_classes(
    latents_of_class: Callable[[int], Tensor],
    num_classes: int,
    dim: int,
    rank: int,
    shrinkage: float,
    psi: Psi,
    parts: int = 1,
    full: bool = False,
) -> tuple[ClassGaussians, ClassModes, float]:
    """Gaussians, modes and temperature of new classes. A class of one image gets the pooled modes and variances.

    Args:
        latents_of_class, rank, parts, full: see `fit_class_modes`; with `full` the temperature is that of
            `ClassModes.log_prob`.
        shrinkage: k, in images, >= 0.
        psi: of the flow's Gaussians; the new Gaussians get a wider psi where this one can't hold their variances.

    Returns:
        Gaussians and modes on the CPU, and the temperature of the posterior.

    Raises:
        DataError: a class has no image, no class has two, latents are not finite, or their variances exceed 1e5.
    """
    kept: list[Tensor] = []

    def latents(y: int) -> Tensor:
        z = latents_of_class(y)
        count = min(len(z), max(1, _LEFT_OUT // num_classes)) if len(z) > 1 else 0
        kept.append(z[torch.arange(count) * len(z) // max(1, count)])
        return z

    modes = fit_class_modes(latents, num_classes, rank, dim, borrow=True, parts=parts, full=full)
    mean, own_variance, counts = modes.class_moments()
    freedom = (counts - 1)[:, None].double()
    scatter = freedom * own_variance
    pooled = scatter.sum(0) / freedom.sum()
    variance = shrunk_variance(scatter, freedom, pooled, shrinkage)
    gaussians = ClassGaussians(num_classes, dim, psi=psi_that_holds(variance, psi))
    gaussians.mu.copy_(mean)
    gaussians.set_variance(variance, inner=(0.0, 1.0))
    found = modes if full else gaussians
    scores = found.log_prob(torch.cat(kept).to(gaussians.mu)).double()
    y = torch.repeat_interleave(torch.tensor([len(z) for z in kept]))
    if full:
        own = _left_out_of_covariance(scores.gather(1, y[:, None])[:, 0], modes, y)
        return gaussians, modes, fit_temperature(scores.scatter(1, y[:, None], own[:, None]), y)
    classes = zip(kept, mean, scatter, counts.tolist(), strict=True)
    scores[torch.arange(len(y)), y] = torch.cat([_left_out(*facts, pooled, shrinkage) for facts in classes])
    return gaussians, modes, fit_temperature(scores, y)


@torch.no_grad()
def adapt_pooled(
    latents_of_class: Callable[[int], Tensor], num_classes: int, dim: int, rank: int, psi: Psi
) -> tuple[ClassGaussians, ClassModes, float]:
    """One class in place of all: the modes of the pooled within-class covariance, in which images of a class vary.

    Arguments, results and errors: as for `adapt_classes`; every class needs two images.
    """
    images = 0

    def latents(y: int) -> Tensor:
        nonlocal images
        z = latents_of_class(y)
        images += len(z)
        return z

    mean, directions, scales, rest = pooled_covariance(latents, num_classes, rank, dim)
    modes = ClassModes(1, len(scales), dim)
    modes.mean[0], modes.counts[0], modes.rest[0] = mean, images, rest
    modes.directions[0] = modes.shared_directions[:] = directions
    modes.scales[0] = modes.shared_scales[:] = scales
    variance = modes.variance().double()
    gaussians = ClassGaussians(1, dim, psi=psi_that_holds(variance, psi))
    gaussians.mu.copy_(modes.mean)
    gaussians.set_variance(variance, inner=(0.0, 1.0))
    return gaussians, modes, 1.0


def _left_out(z: Tensor, mean: Tensor, scatter: Tensor, n: int, pooled: Tensor, shrinkage: float) -> Tensor:
    """log N(z; m', sigma'^2) of latents z [.., d] of a class of n, each under the Gaussian without it, see above."""
    share, deviation = n / max(1, n - 1), z.double() - mean
    left = (scatter - share * deviation.square()).clamp_min(0)
    variance = shrunk_variance(left, torch.tensor(n - 2.0), pooled, shrinkage).clamp_min(REST_FLOOR)
    return -0.5 * ((share * deviation).square() / variance + variance.log() + math.log(2 * math.pi)).sum(1)


def _left_out_of_covariance(score: Tensor, modes: ClassModes, y: Tensor) -> Tensor:
    """log N of latents, each under its class's mean and covariance C without it, from the `score` [N] with it.

    With d = z - m and q = d C^-1 d, the mean without z is m - d / (n - 1), and C loses c d d^T with
    c = (1 - a) n / (n - 1)^2; W, and the factor 1 / (n - 1) of the scatter, are kept. Hence (Sherman & Morrison)

        q'  =  (n / (n - 1))^2 q / (1 - c q),        log det C'  =  log det C + log(1 - c q).
    """
    n = modes.class_moments()[2][y].double().clamp_min(2)
    constant = 0.5 * (modes.log_determinants().double()[y] + modes.dim * math.log(2 * math.pi))
    q = -2 * (score + constant)
    left = (1 - (1 - SHRUNK) * n / (n - 1).square() * q).clamp_min(1e-6)
    return -0.5 * ((n / (n - 1)).square() * q / left + left.log()) - constant


def shrunk_variance(scatter: Tensor, freedom: Tensor, pooled: Tensor, shrinkage: float) -> Tensor:
    """sigma_y^2 [.., d] from summed squares [.., d], degrees of freedom and v [d], see above."""
    # Without shrinkage the quotient is 0 / 0 for a class of one image.
    total = freedom + shrinkage
    return torch.where(total > 0, (scatter + shrinkage * pooled) / total, pooled)


def psi_that_holds(variance: Tensor, psi: Psi) -> Psi:
    """`psi` itself where its range holds all of `variance` [K, d], otherwise a wider (a, b, c).

    Clamped variances would change densities silently. DataError: variances beyond 1e5.
    """
    low, high = float(variance.min()), float(variance.max())
    if not high <= _LARGEST_VARIANCE:
        raise DataError(
            f"latents of these images have variances up to {high:.3g}, off the scale of the flow's training images: "
            "check the flow with model.check_invertibility, or train it on these images"
        )
    if psi is None:  # plain variances have a lower bound only
        return None if low >= LOWEST_SHARE * INITIAL_VARIANCE else (2 * high, 0.2, low / 2)
    a, b, c = psi
    holds = c + INNER[0] * a <= low and high <= c + INNER[1] * a
    return psi if holds else (2 * high, b, low / 2)
