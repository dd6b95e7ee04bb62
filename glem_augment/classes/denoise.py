"""Class Gaussians from noisy counts, sums and second moments, whose noise is Gaussian with known standard deviations.

Everything here is computed from released numbers alone, so it costs no privacy. The latents are in public coordinates
in which public images have uncorrelated coordinates with known variances (`prior`). Three facts are used. The noise on
a symmetric matrix has eigenvalues within +-2 sd sqrt(d), and an eigenvalue of a signal beyond that edge is seen at
`x + sd^2 d / x` (Benaych-Georges & Nadakuditi 2011). The best estimate of a low-rank signal shrinks an eigenvalue x to
`sqrt(x^2 - edge^2)`. And where signal and noise are Gaussian, the best estimate is the noisy number times the signal's
share of the variance, which the noisy numbers show, since that of the noise is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The least variance in any direction, as a share of what uncorrelated coordinates would have there.
LEAST_VARIANCE = 0.02
# The least variance of a coordinate, as a share of the scaled prior.
LEAST_OF_PRIOR = 0.1


class Release(NamedTuple):
    """Noisy statistics of classes. All tensors are float64.

    Attributes:
        counts: [K], with noise of standard deviation `sd_count`.
        sums: [K, d], of the latents, with noise `sd_sum` per coordinate.
        centres: [K, d], the public or already released points that the second moments are about.
        seconds: [K, d, d], sums of (u - centre)(u - centre)^T, symmetric, with noise `sd_second` on the diagonal and
            `sd_second / sqrt(2)` elsewhere.
    """

    counts: Tensor
    sums: Tensor
    centres: Tensor
    seconds: Tensor
    sd_count: float
    sd_sum: float
    sd_second: float


class Denoised(NamedTuple):
    """Class means [K, d], covariances [K, d, d], and how many modes rise above the noise: of the pooled covariance, and
    of each class's difference from it [K]."""

    means: Tensor
    covariances: Tensor
    pooled_modes: int
    modes: Tensor


def class_means(counts: Tensor, sums: Tensor, sd_count: float, sd_sum: float, prior: Tensor) -> Tensor:
    """Means [K, d] from noisy counts [K] and sums [K, d], shrunk to the mean of all classes.

    Differences of class means have variance `t * prior`, where t is what the noisy differences show beyond their noise.
    """
    n = counts.clamp_min(max(sd_count, 1.0))
    noise = (sd_sum / n).square()[:, None]
    pooled = sums.sum(0) / n.sum()
    difference = sums / n[:, None] - pooled
    weight = n.square()[:, None]
    t = (weight * (difference.square() - noise)).sum() / (weight * prior).sum()
    return pooled + difference * _share(t.clamp_min(0) * prior, noise)


def denoise(release: Release, prior: Tensor) -> Denoised:
    """Means and covariances of the classes.

    The pooled covariance is its diagonal, shrunk to a multiple of `prior`, and its correlations beyond the noise. A
    class's covariance is the pooled one and its own difference, shrunk in the same way. `prior` [d] has the variances of
    public images, up to a factor.
    """
    n = release.counts.clamp_min(max(release.sd_count, 1.0))
    means = class_means(release.counts, release.sums, release.sd_count, release.sd_sum, prior)
    found = release.seconds / n[:, None, None]
    pooled = release.seconds.sum(0) / n.sum()
    sd = release.sd_second / math.sqrt(2) * math.sqrt(len(n)) / float(n.sum())
    variance = shrink_variances(pooled.diagonal(), sd * math.sqrt(2), prior)
    correlated, pooled_modes = significant(_off_diagonal(pooled), sd)
    pooled = floored(torch.diag(variance) + _off_diagonal(correlated), variance)

    covariances, modes = [], []
    for second, count in zip(found, n, strict=True):
        sd = release.sd_second / math.sqrt(2) / float(count)
        difference = second - pooled
        own = difference.diagonal()
        spread = (own.square() - 2 * sd * sd).sum() / variance.square().sum()
        own = own * _share(spread.clamp_min(0) * variance.square(), 2 * sd * sd)
        correlated, rank = significant(_off_diagonal(difference), sd)
        covariances.append(floored(pooled + torch.diag(own) + _off_diagonal(correlated), variance))
        modes.append(rank)
    return Denoised(means, torch.stack(covariances), pooled_modes, torch.tensor(modes))


def shrink_variances(noisy: Tensor, sd: float, prior: Tensor) -> Tensor:
    """Variances [d] from noisy ones, whose noise is `sd`: shrunk to `prior` times their common factor."""
    target = prior * (noisy.sum() / prior.sum()).clamp_min(1e-6)
    spread = ((noisy - target).square() - sd * sd).sum() / target.square().sum()
    found = target + (noisy - target) * _share(spread.clamp_min(0) * target.square(), sd * sd)
    return torch.maximum(found, LEAST_OF_PRIOR * target)


def significant(noisy: Tensor, sd: float) -> tuple[Tensor, int]:
    """The part of a symmetric matrix [d, d] that rises above noise of `sd` per entry, and its rank."""
    edge = 2 * sd * math.sqrt(len(noisy))
    values, vectors = torch.linalg.eigh(noisy)
    kept = values.sign() * (values.square() - edge * edge).clamp_min(0).sqrt()
    return (vectors * kept) @ vectors.mT, int((kept != 0).sum())


def floored(covariance: Tensor, variance: Tensor) -> Tensor:
    """A covariance [d, d] with at least `LEAST_VARIANCE` in every direction, in units in which `variance` [d] is 1.

    Its diagonal stays as it was where it was at least `LEAST_OF_PRIOR` of `variance`.
    """
    unit = variance.sqrt()
    kept = torch.maximum(covariance.diagonal(), LEAST_OF_PRIOR * variance).sqrt()
    values, vectors = torch.linalg.eigh(covariance / unit[:, None] / unit)
    raised = (vectors * values.clamp_min(LEAST_VARIANCE)) @ vectors.mT
    scale = kept / raised.diagonal().sqrt()
    return raised * scale[:, None] * scale


def within_cells(covariance: Tensor, weights: Tensor, means: Tensor) -> Tensor:
    """The covariance [d, d] within the cells of a class: its own less that between the cells.

    `weights` [C] are the cells' noisy counts and `means` [C, d] their means less the mean of the class.
    """
    share = weights.clamp_min(0) / weights.clamp_min(0).sum()
    between = (means * share[:, None]).mT @ means
    variance = covariance.diagonal()
    unit = variance.sqrt()
    values, vectors = torch.linalg.eigh((covariance - between) / unit[:, None] / unit)
    return (vectors * values.clamp_min(LEAST_VARIANCE)) @ vectors.mT * unit[:, None] * unit


def _share(signal: Tensor, noise: Tensor | float) -> Tensor:
    return signal / (signal + noise)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(matrix.diagonal())
