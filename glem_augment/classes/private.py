"""Classes from private images: Gaussians fitted to releases of noisy sums alone.

Latents z are in public coordinates (`flows.stationary`) with public variances, the prior. Of the promise's mu^2,

- counts take `COUNTS`. They say how much noise the classes bear, so the rest follows from them.
- sums of z, clipped to a public norm, give the class means m_y. Small classes have sums of the leading coordinates
  alone: they vary most, and each further one raises the clip and with it the noise on all.
- sums of |z - m_y|^2 in bands of coordinates take `BANDS`. They scale the prior to each class, and give the next clip.
- second moments of z - m_y take the rest. About the means they have a third of the noise that they would have about a
  public point. `denoise` makes covariances of them. Small classes share their correlations, of the leading coordinates;
  the smallest have none, and spend this part on the means.
- where the noise allows cells, counts and sums of z - m_y in the cells of each class take `CELLS`. k-means finds the
  cells on samples of the Gaussians so far. The covariance within cells is the class's less that between its cells.

benchmarks/results/private.md has what classifiers of the samples recognise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glem_augment.classes.classes import Classes
from glem_augment.classes.denoise import Denoised, cell_means, class_means, denoise, energies_of_classes, within_cells
from glem_augment.classes.fit import fit_modes, psi_that_holds
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.groups import k_means
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.privacy import (
    LEADING,
    Privacy,
    PrivateSums,
    Release,
    describe,
    epsilon_of,
    round_of,
)
from glem_augment.classes.statistics import ClassStatistics, Moments, can_be_whole
from glem_augment.errors import DataError

# Parts of mu^2. The smaller the classes, the more is for means; the second moments have the rest.
COUNTS, BANDS, CELLS, FIRST, FIRST_SHARED = 0.03, 0.02, 0.30, 0.17, 0.50
_COUNTS, _SUMS, _SECONDS, _CELLS = (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.1, 0.9, 0)  # shares of statistics in a release
_MEAN_NOISE = 0.25  # the most noise in the mean of a coordinate, as a share of its public variance
_EDGE = 4.0  # the most that noise may add to an eigenvalue of a covariance, in mean variances
_OWN, _SHARED = 500, 100  # images of a class times mu from which classes have covariances, or share correlations
_CLIP = 0.9  # the second clip, in roots of the mean squared norm
_BAND = 8  # coordinates of the first band; the bands end at 8, 16, 32, ...
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

    start = released("counts", z, y, num_classes, clip, _COUNTS, COUNTS)
    counts = start.counts.clamp_min(max(start.sd_count, 1.0))
    size = float(counts.median()) * privacy.mu_per_image
    if cells is None:
        cells = _cells(size, len(prior))
    left = 1 - COUNTS - BANDS - (CELLS if cells > 1 else 0)
    shared = size < _OWN
    part = FIRST if not shared else FIRST_SHARED if size >= _SHARED else left
    k = _coordinates_of_means(size, part, prior, clip)
    drowned = _drowned(start, privacy, k, part)

    first_clip = clip * float((prior[:k].sum() / prior.sum()).sqrt())
    first = released("sums", z[:, :k], y, num_classes, first_clip, _SUMS, part)
    means, noise = class_means(counts, first.sums, first.sd_sum, prior[:k])
    means = torch.nn.functional.pad(means, (0, len(prior) - k))
    z = z.double() - means[y]

    bands = _bands(len(prior))
    nothing = z.new_zeros(len(z))  # sums of columns: no row depends on another
    energies = torch.stack([sum(z[:, band].square().unbind(1), nothing) for band in bands], 1)
    energy = released("energies", energies, y, num_classes, clip**2, _SUMS, BANDS)
    public = torch.stack([prior[band].sum() for band in bands])
    pooled, own = energies_of_classes(counts, energy.sums, energy.sd_sum, public)
    widths = torch.tensor([len(prior[band]) for band in bands])
    own = (own / pooled).repeat_interleave(widths, 1)  # [K, d]
    prior = prior * (pooled / public).repeat_interleave(widths)

    part = left - part
    images = counts.sum()
    leading = _coordinates_of_covariance(size * num_classes, part, len(prior)) if shared else len(prior)
    clip = _CLIP * float(prior[:leading].sum().sqrt())
    slots, sizes = (torch.zeros_like(y), images[None]) if shared else (y, counts)
    if part > 0:
        second = released("second moments", z[:, :leading], slots, len(sizes), clip, _SECONDS, part)
        leading = second.seconds.shape[1]
        found = denoise(sizes, second.seconds, second.sd_second, prior[:leading])
    else:
        found = Denoised(prior.new_zeros(0), prior[:leading].diag(), 0, counts)
    if shared:
        rest = own[:, leading:] * prior[leading:]
        unit = own[:, :leading].sqrt()
        covariances = unit[:, :, None] * found.pooled * unit[:, None]
        found = found._replace(covariances=covariances, modes=torch.zeros_like(counts).int())
    else:
        rest = _rest(second, counts, prior[leading:])
    classes = _gaussians(counts, means, found.covariances, found.pooled, rest, drowned)

    if cells > 1:
        centres = torch.stack([_centres(covariance, cells) for covariance in found.covariances])
        centres = torch.nn.functional.pad(centres, (0, len(prior) - leading))
        cell = torch.empty_like(y)
        for k in range(num_classes):
            cell[y == k] = nearest(z[y == k], centres[k])
        slots = y * cells + cell
        drawn = released("cells", z - centres[y, cell], slots, num_classes * cells, clip, _CELLS, CELLS)
        weights = drawn.counts.clamp_min(1).unflatten(0, (-1, cells))
        shifts = cell_means(centres, weights, drawn.sums.unflatten(0, (-1, cells)), drawn.sd_sum, prior)
        classes.modes = _tied_modes(classes.modes, found.covariances, weights, means, shifts, rest, drowned)
    return PrivateClasses(
        classes, describe(privacy, rounds), start.counts, found.modes, found.pooled_modes, noise, drowned
    )


def nearest(z: Tensor, centres: Tensor) -> Tensor:
    """The index [n] of the nearest of the `centres` [C, d]: the same bits decide for an image in any company."""
    # By default cdist multiplies matrices where there are many rows, and the last bits then depend on the other rows.
    return torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def _drowned(start: Release, privacy: Privacy, coordinates: int, part: float) -> list[int]:
    """Classes of which the noisy mean will have more noise than the clip."""
    least = max(math.sqrt(coordinates / part) / privacy.mu_per_image, start.sd_count)
    drowned = [k for k, count in enumerate(start.counts.tolist()) if count < least]
    sd = start.sd_count / math.sqrt(len(start.counts))  # of the mean count
    images = float(start.counts.mean())
    if len(drowned) == len(start.counts) or images < 4 * sd:
        enough = max(least, 4 * sd) + 2 * sd  # for a mean count that is low by chance, too
        spent = epsilon_of(privacy.mu * math.sqrt(COUNTS), privacy.delta)
        raise DataError(
            f"at epsilon={privacy.epsilon:g} classes of about {max(int(images), 0)} images are noise; "
            f"{math.ceil(enough)} would be enough: merge classes, add images, or raise epsilon. This run "
            f"has spent epsilon={spent:.2g}, which adds to another run's"
        )
    return drowned


def _cells(size: float, dim: int) -> int:
    """The most cells in which noise is a small part of the squared norm of a mean; `size`: images times mu."""
    # Sums are clipped to `_CLIP` roots of the mean squared norm, and their noise falls on every dimension.
    noise = dim * _CLIP**2 / (CELLS * _CELLS[1] * size**2)
    return next((cells for cells in _CELL_COUNTS if cells**2 * noise <= _CELL_NOISE), 1)


def _coordinates_of_means(size: float, part: float, prior: Tensor, clip: float) -> int:
    """How many coordinates the class means have, of classes with `size` images times mu."""
    noise = clip**2 * prior.cumsum(0) / prior.sum() / (part * size**2)  # variance in each, if so many are released
    return max(1, int((noise <= _MEAN_NOISE * prior).sum()))


def _coordinates_of_covariance(size: float, part: float, dim: int) -> int:
    """How many coordinates the covariance of all classes has; its noise adds up to 2 sd sqrt(k) to an eigenvalue."""
    most = (_EDGE * size * math.sqrt(part) / (math.sqrt(2) * _CLIP**2)) ** (2 / 3)
    return min(max(_BAND, int(most)), dim, LEADING)


def _bands(dim: int) -> list[slice]:
    edges = [0, *(_BAND << i for i in range(dim.bit_length()) if _BAND << i < dim), dim]
    return [slice(*pair) for pair in pairwise(edges)]


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
    variance = torch.stack([each.squares / (each.count - 1) for each in found])
    gaussians = ClassGaussians(len(variance), variance.shape[1], psi=psi_that_holds(variance, None))
    gaussians.mu.copy_(torch.stack([each.mean for each in found]))
    gaussians.set_variance(variance, inner=(0.0, 1.0))
    return Classes(gaussians, fit_modes(ClassStatistics(found, whole, full), leading, full), full)


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
