"""Classes from private images: releases of noisy sums, and Gaussians fitted to the releases alone.

Latents z are in public coordinates (`flows.stationary`) with public variances, the prior. Of the promise's mu^2,

- counts and sums of z, clipped to a public norm, take `FIRST`. They give the class means m_y.
- a histogram of |z - m_y| takes `NORMS`. It gives the norm to which the next two are clipped.
- second moments of z - m_y take the rest. About the means they have a third of the noise that they would have about a
  public point. `denoise` makes covariances of them.
- with cells, counts and sums of z - m_y in the cells of each class take `CELLS`. k-means finds the cells on samples of
  the Gaussians so far. The covariance within the cells is the class's covariance less that between its cells.

The parts were chosen on held-out training images (benchmarks/results/private_search.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glem_augment.classes.denoise import class_means, denoise, shrunk_shifts, within_cells
from glem_augment.classes.fit import fit_classes
from glem_augment.classes.groups import k_means
from glem_augment.classes.classes import Classes
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.privacy import Privacy, PrivateSums, Release, describe, noisy_histogram
from glem_augment.classes.statistics import ClassStatistics, Moments
from glem_augment.errors import DataError

# Parts of mu^2, and within a part the shares of counts and sums.
FIRST, NORMS, CELLS = 0.11, 0.01, 0.30
_FIRST_SHARES, _CELL_SHARES = (0.18, 0.82, 0.0), (0.1, 0.9, 0.0)
_CLIP_FACTOR = 1.1  # of the root of the mean squared norm
_BINS = 64  # of the histogram of norms, up to twice the public norm
_DRAWS = 4000  # samples of a class on which k-means finds its cells

Step = Callable[[str, Callable[[], Release]], Release]


@dataclass
class PrivateClasses:
    """Classes of a private model, and what a recipient may know of them.

    Attributes:
        classes: Gaussians and modes.
        privacy: the entry of config.json.
        counts: noisy numbers of images [K].
        modes: how many modes of each class rise above the noise [K], and of the pooled covariance.
        noise: for each class the share of the variance of its mean that is noise [K].
        drowned: classes whose images are too few for the noise; they are drawn as the pooled class.
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
    z: Tensor, y: Tensor, num_classes: int, prior: Tensor, clip: float, privacy: Privacy, cells: int, step: Step
) -> PrivateClasses:
    """Gaussians of K classes that keep the promise.

    All ranks call this together, each with its images.

    Args:
        z, y: latents [n, d] in public coordinates, each a function of one image, and labels int64 [n].
        prior: public variances [d] of the coordinates, up to a factor, the largest first.
        clip: public norm for the first release.
        cells: C, Gaussians of each class; 1 for one.
        step: makes a release of this name, or gives the one that an earlier, interrupted call made.

    Raises:
        DataError: every class is drowned in noise, or delta is above one over the noisy number of images.
    """
    dim, leading = z.shape[1], min(z.shape[1], _LEADING)

    def first() -> Release:
        sums = PrivateSums(num_classes, dim, clip, privacy, 0, _FIRST_SHARES, FIRST)
        sums.add(z, y)
        return sums.release()

    start = step("counts and sums", first)
    _check(start, privacy, num_classes)
    means, noise = class_means(start, prior)
    z = z.double() - means[y]
    edges = torch.linspace(0, 2 * clip, _BINS)[1:]
    norms = step("norms", lambda: noisy_histogram(z.norm(dim=1), edges, privacy, NORMS))
