"""Classes from private images: Gaussians fitted to releases of noisy sums alone.

Latents z are in public coordinates (`flows.stationary`) with public variances, the prior. Of the promise's mu^2,

- counts and sums of z, clipped to a public norm, take `FIRST`. They give the class means m_y.
- a histogram of |z - m_y| takes `NORMS`. It gives the norm to which the next two are clipped.
- second moments of z - m_y take the rest. About the means they have a third of the noise that they would have about a
  public point. `denoise` makes covariances of them.
- where the noise allows cells, counts and sums of z - m_y in the cells of each class take `CELLS`. k-means finds the
  cells on samples of the Gaussians so far. The covariance within cells is the class's less that between its cells.

benchmarks/results/private.md has what classifiers of the samples recognise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glem_augment.classes.classes import Classes
from glem_augment.classes.denoise import cell_means, class_means, denoise, within_cells
from glem_augment.classes.fit import fit_classes
from glem_augment.classes.groups import k_means
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.privacy import (
    LEADING,
    Privacy,
    PrivateSums,
    Release,
    describe,
    epsilon_of,
    noisy_histogram,
    round_of,
)
from glem_augment.classes.statistics import ClassStatistics, Moments, can_be_whole
from glem_augment.errors import DataError

# Parts of mu^2, and the shares of counts, sums and second moments within a part.
FIRST, NORMS, CELLS = 0.20, 0.01, 0.30
_FIRST_SHARES, _SECOND_SHARES, _CELL_SHARES = (0.18, 0.82, 0), (0, 0, 1), (0.1, 0.9, 0)
_CLIP = 0.9  # the second clip, in roots of the mean squared norm
_BINS = 64  # of the histogram of norms, up to twice the public norm
_CELL_COUNTS, _CELL_NOISE = (32, 16, 8, 4), 0.04
_DRAWS = 4000  # samples of a class on which k-means finds its cells


@dataclass
class PrivateClasses:
    """The classes of a private model, and what a recipient may know of them.

    Attributes:
        classes: Gaussians and modes.
        privacy: the entry of config.json.
        counts: noisy numbers of images [K].
        modes: how many modes of each class rise above the noise, int64 [K].
        pooled_modes: how many of the pooled covariance do.
        noise: the share of noise in the differences of the class means [K], before they are shrunk.
        drowned: classes with too few images for the noise; they are drawn like the pooled class.
    """

    classes: Classes
    privacy: dict[str, Any]
    counts: Tensor
    modes: Tensor
    pooled_modes: int
    noise: Tensor
    drowned: list[int]


@torch.no_grad()
def private_classes(
    z: Tensor,
    y: Tensor,
    num_classes: int,
    prior: Tensor,
    clip: float,
    privacy: Privacy,
    cells: int | None,
) -> PrivateClasses:
    """Gaussians of K classes that keep the promise. All ranks call this together, each with its images.

    Args:
        z, y: latents [n, d] in public coordinates, each a function of one image, and labels int64 [n].
        prior: public variances [d] of the coordinates, up to a factor, the largest first.
        clip: the public norm for the first release.
        cells: C, Gaussians of each class; None: as many as the noise allows, up to 32.

    Raises:
        DataError: every class is drowned in noise.
    """
    rounds: list[dict[str, Any]] = []

    def released(
        name: str, u: Tensor, slots: Tensor, count: int, clip: float, shares: Sequence[float], part: float
    ) -> Release:
        sums = PrivateSums(count, u.shape[1], clip, privacy, LEADING, shares, part)
        sums.add(u, slots)
        rounds.append(round_of(name, privacy, part, clip=clip, shares=list(shares)))
        return sums.release()

    start = released("counts and sums", z, y, num_classes, clip, _FIRST_SHARES, FIRST)
    drowned = _drowned(start, privacy)
    counts = start.counts.clamp_min(max(start.sd_count, 1.0))
    means, noise = class_means(counts, start.sums, start.sd_sum, prior)
    z = z.double() - means[y]

    edges = torch.linspace(0, 2 * clip, _BINS, dtype=torch.float64)
    rounds.append(round_of("histogram of norms", privacy, NORMS))
    clip = _CLIP * _root_mean_square(noisy_histogram(z.norm(dim=1), edges[1:-1], privacy, NORMS), edges)

    if cells is None:
        cells = _cells(float(counts.median()), len(prior), privacy)
    part = 1 - FIRST - NORMS - (CELLS if cells > 1 else 0)
    second = released("second moments", z, y, num_classes, clip, _SECOND_SHARES, part)
    leading = second.seconds.shape[1]
    found = denoise(counts, second.seconds, second.sd_second, prior[:leading])
    rest = prior[leading:] * float(found.pooled.diagonal().sum() / prior[:leading].sum())
    rest = _rest(second, counts, rest)
    classes = _gaussians(counts, means, found.covariances, found.pooled, rest, drowned)

    if cells > 1:
        centres = torch.stack([_centres(covariance, cells) for covariance in found.covariances])
        centres = torch.nn.functional.pad(centres, (0, len(prior) - leading))
        cell = torch.empty_like(y)
        for k in range(num_classes):
            cell[y == k] = nearest(z[y == k], centres[k])
        slots = y * cells + cell
        own = released("cells", z - centres[y, cell], slots, num_classes * cells, clip, _CELL_SHARES, CELLS)
        weights = own.counts.clamp_min(1).unflatten(0, (-1, cells))
        shifts = cell_means(centres, weights, own.sums.unflatten(0, (-1, cells)), own.sd_sum, prior)
        classes.modes = _tied_modes(classes.modes, found.covariances, weights, means, shifts, rest, drowned)
    return PrivateClasses(
        classes, describe(privacy, rounds), start.counts, found.modes, found.pooled_modes, noise, drowned
    )


def nearest(z: Tensor, centres: Tensor) -> Tensor:
    """The index [n] of the nearest of the `centres` [C, d]: the same bits decide for an image in any company."""
    # By default cdist multiplies matrices where there are many rows, and the last bits then depend on the other rows.
    return torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def _drowned(start: Release, privacy: Privacy) -> list[int]:
    """Classes of which the noisy mean has more noise than the clip."""
    images = float(start.counts.sum())
    least = start.sd_sum * math.sqrt(start.sums.shape[1]) / start.clip
    drowned = [k for k, count in enumerate(start.counts.tolist()) if count < max(least, 3 * start.sd_count)]
    if len(drowned) == len(start.counts):
        raise DataError(
            f"at epsilon={privacy.epsilon:g} classes of about {max(images, 0) / len(drowned):.0f} images are noise; "
            f"{least:.0f} would be needed: merge classes, add images, or raise epsilon. This run has "
            f"spent epsilon={epsilon_of(privacy.mu * math.sqrt(FIRST), privacy.delta):.2g}, which adds to another run's"
        )
    return drowned


def _cells(images: float, dim: int, privacy: Privacy) -> int:
    """The most cells of a class of so many images in which noise is a small part of the squared norm of a mean."""
    # Sums are clipped to `_CLIP` roots of the mean squared norm, and their noise falls on every dimension.
    noise = dim * _CLIP**2 / (privacy.mu_per_image**2 * CELLS * _CELL_SHARES[1] * images**2)
    return next((cells for cells in _CELL_COUNTS if cells**2 * noise <= _CELL_NOISE), 1)


def _root_mean_square(histogram: Tensor, edges: Tensor) -> float:
    """The root of the mean square of the numbers in a noisy histogram; the last bin has no upper edge."""
    counts = histogram.clamp_min(0)
    middles = (edges[1:] + edges[:-1]) / 2
    counts = counts / counts.sum().clamp_min(1)
    return float((counts * middles.square()).sum().sqrt().clamp_min(edges[1]))


def _rest(second: Release, counts: Tensor, prior: Tensor) -> Tensor:
    """Variances [K, d - m] of the coordinates with squares alone, shrunk to the prior by the noise."""
    noisy = second.squares / counts[:, None]
    if not len(prior):
        return noisy
    noise = (second.sd_second / counts[:, None]).square()
    signal = ((noisy - prior).square() - noise).sum() / prior.square().sum()
    spread = signal.clamp_min(0) * prior.square()
    return (prior + (noisy - prior) * spread / (spread + noise)).maximum(0.1 * prior)


def _gaussians(
    counts: Tensor, means: Tensor, covariances: Tensor, pooled: Tensor, rest: Tensor, drowned: list[int]
) -> Classes:
    """Classes with all modes of the leading coordinates."""
    share = counts / counts.sum()
    mean, other = share @ means, share @ rest
    leading = len(pooled)
    found = []
    for k, count in enumerate(counts.round().int().tolist()):
        parts = (mean, pooled, other) if k in drowned else (means[k], covariances[k], rest[k])
        found.append(_moments(max(count, 2), *parts))
    whole = _moments(max(2, round(float(counts.sum()))), mean, pooled, other)
    full = leading == means.shape[1] and can_be_whole(*means.shape)
    statistics = ClassStatistics(found, [[each] for each in found], whole, full)
    return fit_classes(statistics, leading, full=statistics.whole, shrinkage=0.0)


def _moments(count: int, mean: Tensor, covariance: Tensor, rest: Tensor) -> Moments:
    """Moments of latents with a covariance [m, m] of the leading coordinates and variances `rest` [d - m]."""
    found = Moments.of_covariance(count, mean[: len(covariance)], covariance)
    directions = torch.nn.functional.pad(found.directions, (0, len(rest)))
    squares = torch.cat([found.squares, rest * max(1, count - 1)])
    return Moments(count, mean, directions, found.values, squares)


def _centres(covariance: Tensor, cells: int) -> Tensor:
    """Centres [C, m] of cells, on samples of a Gaussian with mean 0; the seed is public."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(_DRAWS, len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = noise @ (vectors * values.clamp_min(0).sqrt()).T
    group = k_means(draws, cells)
    return torch.stack([draws[group == j].mean(0) if bool((group == j).any()) else draws[j] for j in range(cells)])


def _tied_modes(
    whole: ClassModes | None,
    covariances: Tensor,
    weights: Tensor,
    means: Tensor,
    shifts: Tensor,
    rest: Tensor,
    drowned: list[int],
) -> ClassModes:
    """`whole` with the cells of each class, which differ in their means."""
    assert whole is not None
    classes, cells, dim = shifts.shape
    leading = covariances.shape[1]
    modes = ClassModes(classes, whole.rank, dim, cells, len(whole.shared_scales), tied=True)
    modes.shared_directions.copy_(whole.shared_directions)
    modes.shared_scales.copy_(whole.shared_scales)
    for k in range(classes):
        rows = slice(k * cells, (k + 1) * cells)
        if k in drowned:
            for name in ("directions", "scales", "rest"):
                getattr(modes, name)[k] = getattr(whole, name)[k]
            modes.mean[rows], modes.counts[rows] = whole.mean[k], whole.counts[k]
            continue
        within = within_cells(covariances[k], weights[k], shifts[k, :, :leading])
        own = _moments(2, means[k], within, rest[k])
        modes.directions[k], modes.scales[k] = own.directions[: whole.rank], own.values[: whole.rank]
        modes.rest[k, leading:] = rest[k]
        modes.mean[rows], modes.counts[rows] = means[k] + shifts[k], weights[k].round().long()
    return modes
