"""Gaussians and modes of classes, in closed form from their statistics; nothing is trained.

With n_y latents of class y, SS_y the summed squared deviations from the class's mean, and v the pooled within-class
variance, per dimension,

    v  =  sum_y SS_y / sum_y (n_y - 1),        sigma_y^2  =  (SS_y + k v) / (n_y - 1 + k),

so a class of one image gets the pooled variance, and a class of many images keeps nearly its variance. k (`shrinkage`)
counts as k more images whose spread is v: sigma_y^2 is the posterior mode under a conjugate prior at v, up to a
constant in k.

Covariances are unbiased (n - 1). A class keeps min(rank, n - 1, d) modes, fewer where its latents span fewer
directions. A class of one image gets the pooled modes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glem_augment.checks import INITIAL_VARIANCE, LOWEST_SHARE, check_whole
from glem_augment.classes.calibrate import held_out_temperature, left_out_temperature, shrunk_variance
from glem_augment.classes.classes import Classes
from glem_augment.classes.gaussians import INNER, ClassGaussians
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.statistics import ClassStatistics, Moments
from glem_augment.errors import DataError

# The least variance of a dimension outside the modes. It keeps densities finite. Its root is far below one uint8 step
# (4e-3), so it is invisible in a decoded image.
REST_FLOOR = 1e-8
# config.json holds numbers of psi up to 1e6; a flow can't invert latents of that size anyway.
_LARGEST_VARIANCE = 1e5

Psi = tuple[float, float, float] | None


@torch.no_grad()
def fit_classes(
    statistics: ClassStatistics,
    rank: int,
    shrinkage: float = 10.0,
    psi: Psi = None,
    full: bool = False,
    floor: float = 0.0,
) -> Classes:
    """Gaussians, modes and temperature of the classes, on the CPU.

    Args:
        rank: modes to keep per class, or per part; more than d become d.
        shrinkage: k, in images, >= 0.
        psi: of the model's Gaussians; the new ones get a wider psi where this one can't hold their variances.
        full: the class densities have full covariances (`ClassModes.log_prob`); the scatter must be whole.
        floor: the least variance of a Gaussian, as a share of the mean over the dimensions.

    Raises:
        DataError: variances above 1e5. ValueError: the rank is below 1.
    """
    least = floor * float((statistics.pooled.squares / statistics.pooled.count).mean())
    found = Classes(_fit_gaussians(statistics, shrinkage, psi, least), fit_modes(statistics, rank, full), full)
    if not statistics.kept:
        return found
    if full:

        def fit(others: ClassStatistics) -> Classes:
            return fit_classes(others, rank, shrinkage, psi, full, floor)

        found.temperature = held_out_temperature(statistics, fit)
    else:
        found.temperature = left_out_temperature(statistics, found.gaussians, shrinkage, max(REST_FLOOR, least))
    return found


@torch.no_grad()
def fit_modes(statistics: ClassStatistics, rank: int, full: bool = False) -> ClassModes:
    """Means, principal modes and remaining variances, on the CPU; arguments and errors as for `fit_classes`."""
    dim = statistics.dim
    rank = min(check_whole("rank", rank, 1), dim)
    modes = ClassModes(len(statistics.classes), rank, dim, statistics.most_parts, dim if full else None)
    pooled, freedom = statistics.pooled, statistics.pooled.count
    for y, parts in enumerate(statistics.parts):
        for row, part in enumerate(parts, y * statistics.most_parts):
            modes.mean[row], modes.counts[row] = part.mean, part.count
            shown, degrees = (part, part.count - 1) if part.count > 1 else (pooled, freedom)
            _store(modes, row, shown, degrees)
    scales = pooled.values[: len(modes.shared_scales)] / math.sqrt(freedom)
    modes.shared_directions[: len(scales)] = pooled.directions[: len(scales)].float()
    modes.shared_scales[: len(scales)] = scales.float()
    return modes


def _store(modes: ClassModes, row: int, moments: Moments, degrees: int) -> None:
    """Write the strongest modes of a class, and the part of its variance [d] outside them."""
    directions, scales = moments.directions[: modes.rank], moments.values[: modes.rank] / math.sqrt(degrees)
    modes.directions[row, : len(scales)] = directions.float()
    modes.scales[row, : len(scales)] = scales.float()
    explained = (scales[:, None] * directions).square().sum(0)
    modes.rest[row] = (moments.squares / degrees - explained).clamp_min(REST_FLOOR).float()


def _fit_gaussians(statistics: ClassStatistics, shrinkage: float, psi: Psi, least: float) -> ClassGaussians:
    squares = torch.stack([each.squares for each in statistics.classes])
    freedom = (statistics.counts() - 1)[:, None].double()
    pooled = statistics.pooled.squares / statistics.pooled.count
    variance = shrunk_variance(squares, freedom, pooled, shrinkage).clamp_min(least)
    gaussians = ClassGaussians(len(squares), statistics.dim, psi=psi_that_holds(variance, psi))
    gaussians.mu.copy_(torch.stack([each.mean for each in statistics.classes]))
    gaussians.set_variance(variance, inner=(0.0, 1.0))
    return gaussians


def psi_that_holds(variance: Tensor, psi: Psi) -> Psi:
    """`psi` itself where its range holds all of `variance` [K, d], otherwise a wider (a, b, c).

    Clamped variances would change densities silently. DataError: variances beyond 1e5.
    """
    low, high = float(variance.min()), float(variance.max())
    if not low > 0:
        raise DataError("all images are equal, so they have no variances: give other images")
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
