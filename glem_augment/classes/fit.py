"""Gaussians, modes and temperature of classes, in closed form from their statistics; nothing is trained.

With n_y latents of class y, SS_y the summed squared deviations from the class's mean, and v the pooled within-class
variance, per dimension,

    v  =  sum_y SS_y / sum_y (n_y - 1),        sigma_y^2  =  (SS_y + k v) / (n_y - 1 + k),

so a class of one image gets the pooled variance, and a class of many images keeps nearly its variance. k (`shrinkage`)
counts as k more images whose spread is v: sigma_y^2 is the posterior mode under a conjugate prior at v, up to a
constant in k.

Covariances are unbiased (n - 1). A class keeps min(rank, n - 1, d) modes, fewer where its latents span fewer
directions. A class of one image gets the pooled modes.

The temperature of the posterior is fitted to latents that took no part in the Gaussians of their class. With diagonal
covariances each kept latent z is left out of the Gaussian of its class. Without z a class of n latents with mean m has

    m'  =  m - (z - m) / (n - 1),        SS'  =  SS - (z - m)^2 n / (n - 1),

so the fit costs no second pass. The pooled variance keeps the influence of z, one image among all. With full
covariances up to a fifth of each class is held out, and the classes are fitted again without these latents, since the
change of truncated modes has no closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glem_augment.classes.classes import Classes
from glem_augment.classes.gaussians import INNER, ClassGaussians
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.statistics import ClassStatistics
from glem_augment.errors import DataError
from glem_augment.names import HIGHEST_TEMPERATURE, INITIAL_VARIANCE, LOWEST_SHARE

# The least variance of a dimension outside the modes. It keeps densities finite. Its root is far below one uint8 step
# (4e-3), so it is invisible in a decoded image.
REST_FLOOR = 1e-8
# config.json holds numbers of psi up to 1e6; a flow can't invert latents of that size anyway.
_LARGEST_VARIANCE = 1e5
SHRINKAGE = 10.0  # k
_ROWS = 64  # latents at a time, which bounds the memory

Psi = tuple[float, float, float] | None


@torch.no_grad()
def fit_classes(
    statistics: ClassStatistics,
    rank: int,
    psi: Psi = None,
    full: bool = False,
    floor: float = 0.0,
    shrinkage: float = SHRINKAGE,
) -> Classes:
    """Gaussians, modes and temperature of the classes, on the CPU.

    Args:
        rank: modes to keep per class, or per part, at least 1; no more than a class or part has.
        psi: of the model's Gaussians; the new ones get a wider psi where this one can't hold their variances.
        full: the class densities have full covariances (`ClassModes.log_prob`); the scatter must be whole.
        floor: the least variance of a Gaussian, as a share of the mean over the dimensions.
        shrinkage: k, in images, >= 0.

    Raises:
        DataError: variances above 1e5.
    """
    least = floor * float((statistics.pooled.squares / statistics.pooled.count).mean())
    found = Classes(_fit_gaussians(statistics, shrinkage, psi, least), fit_modes(statistics, rank, full), full)
    if not statistics.kept_counts:
        return found
    if full:

        def fit(others: ClassStatistics) -> Classes:
            return fit_classes(others, rank, psi, full, floor, shrinkage)

        found.temperature = held_out_temperature(statistics, fit)
    else:
        found.temperature = left_out_temperature(statistics, found.gaussians, shrinkage, max(REST_FLOOR, least))
    return found


@torch.no_grad()
def fit_modes(statistics: ClassStatistics, rank: int, full: bool = False) -> ClassModes:
    """Means, principal modes and remaining variances, on the CPU; arguments and errors as for `fit_classes`."""
    dim, pooled, freedom = statistics.dim, statistics.pooled, statistics.pooled.count
    shown_parts = (part if part.count > 1 else pooled for parts in statistics.parts for part in parts)
    # More modes than any class has would cost memory and time in every move.
    rank = max(1, min(rank, max(len(part.directions) for part in shown_parts)))
    modes = ClassModes(len(statistics.classes), rank, dim, statistics.most_parts, dim if full else None)
    for y, parts in enumerate(statistics.parts):
        for row, part in enumerate(parts, y * statistics.most_parts):
            modes.mean[row], modes.counts[row] = part.mean, part.count
            shown, degrees = (part, part.count - 1) if part.count > 1 else (pooled, freedom)
            directions, scales = shown.directions[:rank], shown.values[:rank] / math.sqrt(degrees)
            modes.directions[row, : len(scales)] = directions.float()
            modes.scales[row, : len(scales)] = scales.float()
            explained = (scales[:, None] * directions).square().sum(0)
            modes.rest[row] = (shown.squares / degrees - explained).clamp_min(REST_FLOOR).float()
    scales = pooled.values[: len(modes.shared_scales)] / math.sqrt(freedom)
    modes.shared_directions[: len(scales)] = pooled.directions[: len(scales)].float()
    modes.shared_scales[: len(scales)] = scales.float()
    return modes


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
            f"latents of these images have variances up to {high:.3g}, off the scale of the model's training images: "
            "check the flow with model.check_invertibility, or train it on these images"
        )
    if psi is None:  # plain variances have a lower bound only
        return None if low >= LOWEST_SHARE * INITIAL_VARIANCE else (2 * high, 0.2, low / 2)
    a, b, c = psi
    holds = c + INNER[0] * a <= low and high <= c + INNER[1] * a
    return psi if holds else (2 * high, b, low / 2)


# ---- the temperature -------------------------------------------------------------------------------------------------


@torch.no_grad()
def left_out_temperature(
    statistics: ClassStatistics, gaussians: ClassGaussians, shrinkage: float, floor: float
) -> float:
    """T for diagonal Gaussians fitted with `shrinkage`, each kept latent left out of its class.

    `floor` is the least variance of a class without the latent.
    """
    pooled, found = statistics.pooled.squares / statistics.pooled.count, []
    labels = _labels(statistics.kept_counts)
    for z, y in zip(statistics.kept.split(_ROWS), labels.split(_ROWS), strict=True):
        scores = gaussians.log_prob(z.to(gaussians.mu)).double()
        own = [statistics.classes[k] for k in y.tolist()]
        count = torch.tensor([[each.count] for each in own]).double()
        factor = count / (count - 1)
        squares = (z - torch.stack([each.mean for each in own])).square()
        left = (torch.stack([each.squares for each in own]) - factor * squares).clamp_min(0)
        variance = shrunk_variance(left, count - 2, pooled, shrinkage).clamp_min(floor)
        terms = factor.square() * squares / variance + variance.log() + math.log(2 * math.pi)
        scores[torch.arange(len(y)), y] = -0.5 * terms.sum(1)
        found.append(scores)
    return fit_temperature(torch.cat(found), labels)


@torch.no_grad()
def held_out_temperature(statistics: ClassStatistics, fit: Callable[[ClassStatistics], Classes]) -> float:
    """T for classes that `fit` makes, from up to a fifth of each class's latents, which are held out."""
    kept = []
    for each, z in zip(statistics.classes, statistics.kept.split(statistics.kept_counts), strict=True):
        most = min(each.count // 5, len(z))
        kept.append(z[torch.arange(most) * len(z) // max(1, most)])
    if not sum(map(len, kept)):
        return 1.0
    found = fit(statistics.without(kept))
    scores = found.log_prob(torch.cat(kept).to(found.gaussians.mu))
    return fit_temperature(scores, _labels([len(z) for z in kept]))


def _labels(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(counts))


def shrunk_variance(scatter: Tensor, freedom: Tensor, pooled: Tensor, shrinkage: float) -> Tensor:
    """sigma_y^2 [.., d] from summed squares [.., d], degrees of freedom and v [d], see above."""
    # Without shrinkage the quotient is 0 / 0 for a class of one image.
    total = freedom + shrinkage
    return torch.where(total > 0, (scatter + shrinkage * pooled) / total, pooled)


@torch.no_grad()
def fit_temperature(scores: Tensor, y: Tensor) -> float:
    """The T >= 1 at which softmax(scores / T) gives the classes y the highest likelihood (Guo et al. 2017).

    The mean of -log softmax(b s)_y is convex in b = 1/T; bisection finds where its slope, the mean of
    sum_k p_k s_k - s_y, is zero. T = 1 is the floor: for a few images that are all recognised the best T would be 0.

    `scores` [N, K] are log p(x|y) of held-out images in nats, up to a constant per image; images whose scores are not
    all finite are left out. y is int64 [N].
    """
    scores = scores.double()
    scores = scores - scores.gather(1, y[:, None])
    scores = scores[scores.isfinite().all(1)]
    low, high = 1 / HIGHEST_TEMPERATURE, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if float(((middle * scores).softmax(1) * scores).sum()) > 0:
            high = middle
        else:
            low = middle
    return 1 / high
