"""Gaussians of classes estimated from their statistics, in closed form; nothing is trained.

A hierarchical Gaussian model with two levels of shrinkage. In d dimensions, from N images beyond one per class, with
the pooled within-class covariance S of all classes and the covariance S_y of the n_y images of class y,

    W    =  (nu0 s T + N S) / (nu0 + N),              nu0 = 3 d,
    W_y  =  (nu1 W + (n_y - 1) S_y) / (nu1 + n_y - 1),      nu1 = 2 d + 4 n_y.

Samples and moves have nu1 = d / 8 in place of this nu1. A class keeps more of S_y there, so that its decoded samples
are recognised, while a classifier gains by more shrinkage (Friedman, Regularized Discriminant Analysis, 1989).

The target T is public where the latents have public coordinates (`flows.public`), with the scale s of the images;
else it is the diagonal of S. So a class of few images has nearly the covariance W of all classes, a class of many keeps
up to a fifth of S_y, and where all classes are small W is nearly T.

In the coordinates where s T is the identity, class means are shrunk towards their mean, by f / (f + 1 / n_y) in each
coordinate. The prior f is the public variance of class means (zero without public coordinates), plus a number, the same
in all coordinates, that makes up for what the class means vary more than that.

The posterior's temperature is fitted to latents that are held out of a second estimate.

Source: the posterior mean under normal-inverse-Wishart priors (Gelman et al., Bayesian Data Analysis, 3rd ed., 3.6);
docs/fit.md has what the strengths were chosen by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glem_augment.classes.classes import Classes
from glem_augment.classes.covariances import OWN, PUBLIC, ClassCovariances, SharedCoordinates, from_public
from glem_augment.classes.gaussians import INNER, ClassGaussians
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.statistics import ClassStatistics, Moments, leading_rows, orthonormal
from glem_augment.errors import DataError
from glem_augment.flows.public import PublicFlow
from glem_augment.names import HIGHEST_TEMPERATURE, INITIAL_VARIANCE, LOWEST_SHARE

# The strengths of the two levels, in dimensions, and of the second in images of the class; of the second for samples.
NU0, NU1, NU1_IMAGES, NU1_DRAWN = 3, 2, 4, 0.125
# The least variance of a dimension, as a share of the mean over dimensions. 8-bit levels give constant pixels about as
# much by their noise; floats and 16-bit levels would give them none.
LEAST_SHARE = 1e-5
# The least variance of a dimension outside the modes. It keeps densities finite. Its root is far below one uint8 step
# (4e-3), so it is invisible in a decoded image.
REST_FLOOR = 1e-8
# config.json holds numbers of psi up to 1e6; a flow can't invert latents of that size anyway.
_LARGEST_VARIANCE = 1e5
_MOST_NUMBERS, _MOST_MODES = 2**22, 2**24  # in the directions of all classes, and in their modes

Psi = tuple[float, float, float] | None


def directions_of_class(num_classes: int, dim: int) -> int:
    """How many directions of its covariance a class keeps at most, so that all classes fit in memory and in a file."""
    return min(dim, _MOST_NUMBERS // (num_classes * dim))


@torch.no_grad()
def fit_classes(
    statistics: ClassStatistics,
    shape: tuple[int, int, int],
    rank: int,
    public: PublicFlow | None = None,
    psi: Psi = None,
) -> Classes:
    """Means, covariances, modes and temperature of the classes, on the CPU.

    Args:
        statistics: of latents in public coordinates, where there are any.
        shape: (C, H, W) of the numbers that the latents were made of.
        rank: the leading directions of each class to keep for moves; at most d. Where the directions of all classes
            would be more than `_MOST_MODES` numbers, all classes share the directions of W.
        psi: of the model's Gaussians; the new ones get a wider psi where this one can't hold their variances.

    Raises:
        DataError: latents without variance, or with variances above 1e5.
    """
    found = classes_of(estimate(statistics, shape, public), statistics.counts(), rank, psi)
    if statistics.others is not None:
        held = from_public(statistics.held, public)
        labels = torch.repeat_interleave(torch.tensor(statistics.held_counts))
        found.temperature = fit_temperature(estimate(statistics.others, shape, public).log_prob(held), labels)
    return found


@torch.no_grad()
def classes_of(covariances: ClassCovariances, counts: Tensor, rank: int, psi: Psi = None) -> Classes:
    """Classes with these covariances, and with the Gaussians and modes that follow; `counts` are the images [K].

    The other arguments are as for `fit_classes`.
    """
    classes, dim = covariances.mean.shape
    rank = min(rank, dim)
    common = classes * rank * dim > _MOST_MODES
    modes = ClassModes(classes, rank, dim, common=common)
    modes.mean.copy_(covariances.mean)
    modes.counts.copy_(counts)
    for row in range(len(modes.directions)):
        modes.directions[row], modes.scales[row] = covariances.leading(None if common else row, rank)
    variance = covariances.diagonals()
    gaussians = ClassGaussians(classes, dim, psi=psi_that_holds(variance, psi))
    gaussians.mu.copy_(covariances.mean)
    gaussians.set_variance(variance, inner=(0.0, 1.0))
    return Classes(gaussians, modes, fitted=covariances)


@torch.no_grad()
def estimate(
    statistics: ClassStatistics,
    shape: tuple[int, int, int],
    public: PublicFlow | None = None,
) -> ClassCovariances:
    """The means and covariances above; arguments and errors as for `fit_classes`.

    A class of one image gets the covariance W.
    """
    pooled, dim, count = statistics.pooled, statistics.dim, statistics.pooled.count
    variance = pooled.squares / count
    mean_variance = float(variance.mean())
    if not 0 < mean_variance < _LARGEST_VARIANCE:
        raise DataError(
            "all images are equal, so they have no variances: give other images"
            if not mean_variance > 0
            else f"latents of these images have variances up to {float(variance.max()):.3g}, off the scale of the "
            "model's training images: check the flow with model.check_invertibility, or train it on these images"
        )
    # From here on, latents are divided by the root of the target, so that s T is the identity.
    target = variance.clamp_min(LEAST_SHARE * mean_variance) if public is None else variance.new_full((), mean_variance)
    root = target.sqrt().expand(dim)
    directions, lengths = orthonormal(leading_rows(pooled.rows() / root, len(pooled.values)))
    seen = lengths.square() / count
    left = float((variance / root.square()).sum() - seen.sum()) / max(1, dim - len(seen))
    nu0 = NU0 * dim
    # The variances of W along the directions, and outside them.
    along, outside = (nu0 + count * seen) / (nu0 + count), (nu0 + count * max(left, 0.0)) / (nu0 + count)

    shared = SharedCoordinates(shape, len(directions), public is not None)
    shared.set(public, 1 / (root * math.sqrt(outside)), directions, outside / along)

    classes = len(statistics.classes)
    means = torch.stack([each.mean for each in statistics.classes])
    if classes > 1:
        middle, noise = means.mean(0), 1 / statistics.counts().double()[:, None]
        between = means.new_zeros(dim) if public is None else public.between.double()
        means = middle + shrunk((means - middle) / root, noise, between, classes / (classes - 1))[0] * root
    most = directions_of_class(classes, dim)
    scatters = [_scatter(shared, each, most) for each in statistics.classes]
    rank = max(len(lengths) for _, lengths, _ in scatters)
    found = ClassCovariances(classes, shape, rank, len(directions), OWN if public is None else PUBLIC, *strengths(dim))
    found.coordinates = shared
    found.mean.copy_(from_public(means.float(), public))
    for y, (count, scatter) in enumerate(zip(statistics.counts().tolist(), scatters, strict=True)):
        _set_class(found, y, count, *scatter)
    return found


def strengths(dim: int) -> tuple[float, float, float]:
    """nu0, nu1 and nu1 for each image of a class, for `ClassCovariances`."""
    return float(NU0 * dim), float(NU1 * dim), float(NU1_IMAGES)


def _scatter(shared: SharedCoordinates, each: Moments, most: int) -> tuple[Tensor, Tensor, float]:
    """Of a class, where W is the identity: directions [k, d], root scatter along them [k], and the mean beside them."""
    whiten = shared.whiten
    rows = whiten(each.rows().float())
    hidden = float(((each.squares - each.rows().square().sum(0)) * whiten.scale.double().square()).sum())
    directions, lengths = orthonormal(leading_rows(rows, most))
    left = float(rows.double().square().sum() - lengths.square().sum()) + max(hidden, 0.0)
    return directions, lengths, max(left, 0.0) / max(1, len(whiten.scale) - len(lengths))


def _set_class(found: ClassCovariances, y: int, count: int, directions: Tensor, lengths: Tensor, left: float) -> None:
    """Set the covariance W_y of class y from its scatter."""
    found.directions[y, : len(lengths)] = directions.float()
    for nu1, variances, rest in (
        (NU1 * found.dim + NU1_IMAGES * count, found.variances, found.rest),
        (NU1_DRAWN * found.dim, found.drawn_variances, found.drawn_rest),
    ):
        total = nu1 + count - 1
        rest[y] = variances[y] = (nu1 + left) / total
        variances[y, : len(lengths)] = (nu1 + lengths.square()).float() / total


def shrunk(
    away: Tensor, noise: Tensor, between: Tensor, freedom: float = 1.0, trust: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Differences [K, d] from a middle, shrunk to zero, and the variances of what remains unknown of them.

    Args:
        noise: variances of the errors of `away`, [K, d] or [K, 1]; of plain means in coordinates of unit variance
            within classes, 1 over the images of the class.
        between: the public variances of class means, [d]; zeros for none. The prior f is `between` plus one number.
        freedom: K / (K - 1) for differences from the mean of K.
        trust: weights [K, d] of the squares that show how much the means vary; by default equal.
    """
    more = away.square() * freedom - noise - between
    more = more.mean() if trust is None else (more * trust).sum() / trust.sum()
    prior = between + more.clamp_min(0)
    share = prior / (prior + noise)
    return away * share, noise * share


# ---- the paper's RFCM ------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_modes(statistics: ClassStatistics, rank: int) -> ClassModes:
    """Means, principal modes and remaining variances of each class alone, on the CPU (RFCM).

    A class keeps min(rank, n - 1, d) modes of the unbiased covariance of its images, fewer where its latents span fewer
    directions. A class of one image gets the pooled modes, and so do all classes where their modes would be more than
    `_MOST_MODES` numbers.
    """
    dim, pooled, classes = statistics.dim, statistics.pooled, statistics.classes
    # More modes than any class has would cost memory and time in every move.
    rank = max(1, min(rank, max(len((each if each.count > 1 else pooled).directions) for each in classes)))
    common = len(classes) * rank * dim > _MOST_MODES
    modes = ClassModes(len(classes), rank, dim, common=common)
    modes.mean.copy_(torch.stack([each.mean for each in classes]))
    modes.counts.copy_(statistics.counts())
    for row, each in enumerate([pooled] if common else classes):
        shown, degrees = (pooled, pooled.count) if common or each.count < 2 else (each, each.count - 1)
        directions, scales = shown.directions[:rank], shown.values[:rank] / math.sqrt(degrees)
        modes.directions[row, : len(scales)] = directions.float()
        modes.scales[row, : len(scales)] = scales.float()
        explained = (scales[:, None] * directions).square().sum(0)
        modes.rest[row] = (shown.squares / degrees - explained).clamp_min(REST_FLOOR).float()
    scales = pooled.values[: len(modes.shared_scales)] / math.sqrt(pooled.count)
    modes.shared_directions[: len(scales)] = pooled.directions[: len(scales)].float()
    modes.shared_scales[: len(scales)] = scales.float()
    return modes


def psi_that_holds(variance: Tensor, psi: Psi) -> Psi:
    """`psi` itself where its range holds all of `variance` [K, d], otherwise a wider (a, b, c).

    Clamped variances would change densities silently.
    """
    low, high = float(variance.min()), float(variance.max())
    if psi is None:  # plain variances have a lower bound only
        return None if low >= LOWEST_SHARE * INITIAL_VARIANCE else (2 * high, 0.2, low / 2)
    a, b, c = psi
    holds = c + INNER[0] * a <= low and high <= c + INNER[1] * a
    return psi if holds else (2 * high, b, low / 2)


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
