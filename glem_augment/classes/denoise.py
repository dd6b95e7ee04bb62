"""Class Gaussians from noisy counts, sums and second moments, whose noise is Gaussian with known standard deviations.

Everything here is computed from released numbers alone, so it costs no privacy. The latents are in public coordinates
in which public images have uncorrelated coordinates with known variances (`prior`). Three facts are used. The noise on
a symmetric matrix has eigenvalues within +-2 sd sqrt(d), and an eigenvalue of a signal beyond that edge is seen at
`x + sd^2 d / x` (Benaych-Georges & Nadakuditi 2011). The best estimate of a low-rank signal shrinks an eigenvalue x to
`sqrt(x^2 - edge^2)`. Where signal and noise are Gaussian, the best estimate is the noisy number times the signal's
share of the variance. The noisy numbers show this share, since the variance of the noise is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The least variance in any direction, as a share of what uncorrelated coordinates would have there.
LEAST_VARIANCE = 0.02
_LEAST_SCALE = 0.02  # of shifts: where noise hides them all, they are not taken for zero
# The least variance of a coordinate, as a share of the scaled prior.
LEAST_OF_PRIOR = 0.1


class Denoised(NamedTuple):
    """Class covariances [K, d, d], the pooled one [d, d], and how many modes rise above the noise: of the pooled
    covariance, and of each class's difference from it, int64 [K]."""

    covariances: Tensor
    pooled: Tensor
    pooled_modes: int
    modes: Tensor


def class_means(counts: Tensor, sums: Tensor, sd_sum: float, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Means [K, d] from noisy counts [K], at least 1, and sums [K, d], shrunk to the mean of all classes.

    The second result [K] is the share of noise in the differences of the class means, before they are shrunk.
    """
    noise = (sd_sum / counts).square()[:, None]
    pooled = sums.sum(0) / counts.sum()
    difference = sums / counts[:, None] - pooled
    t = scale_of_prior(difference, noise, counts[:, None].square(), prior)
    signal = t * prior
    return pooled + difference * _share(signal, noise), noise[:, 0] / (noise[:, 0] + signal.mean())


def scale_of_prior(shifts: Tensor, noise: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
    """t, where shifts [.., d] without their noise variance have the variances t * prior [d]."""
    return ((weight * (shifts.square() - noise)).sum() / (weight * prior).sum()).clamp_min(_LEAST_SCALE)


def energies_of_classes(counts: Tensor, sums: Tensor, sd_sum: float, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares in bands of coordinates, of all images [B] and of each class [K, B], from noisy sums [K, B].

    The first are shrunk to a multiple of the public ones, `prior` [B], and the second to the first.
    """
    images = counts.sum()
    pooled = shrink_variances(sums.sum(0) / images, sd_sum * math.sqrt(len(counts)) / float(images), prior)
    difference, noise = sums / counts[:, None] - pooled, (sd_sum / counts).square()[:, None]
    t = scale_of_prior(difference, noise, counts[:, None].square(), pooled.square())
    own = pooled + difference * _share(t * pooled.square(), noise)
    return pooled, torch.maximum(own, LEAST_OF_PRIOR * pooled)


def denoise(counts: Tensor, seconds: Tensor, sd_second: float, prior: Tensor) -> Denoised:
    """Covariances of classes from noisy second moments about their means.

    The pooled covariance is its diagonal, shrunk to a multiple of `prior`, and its correlations beyond the noise. A
    class's covariance is the pooled one plus its difference from it, shrunk in the same way.

    Args:
        counts: [K], at least 1.
        seconds: [K, d, d] symmetric, with noise `sd_second` on the diagonal and `sd_second / sqrt(2)` elsewhere.
        prior: [d], the variances of public images, up to a factor.
    """
    pooled = seconds.sum(0) / counts.sum()
    sd = sd_second / math.sqrt(2) * math.sqrt(len(counts)) / float(counts.sum())
    variance = shrink_variances(pooled.diagonal(), sd * math.sqrt(2), prior)
    correlated, pooled_modes = significant(_off_diagonal(pooled), sd)
    pooled = floored(torch.diag(variance) + _off_diagonal(correlated), variance)

    covariances, modes = [], []
    for second, count in zip(seconds, counts, strict=True):
        sd = sd_second / math.sqrt(2) / float(count)
        difference = second / count - pooled
        own = difference.diagonal()
        spread = (own.square() - 2 * sd * sd).sum() / variance.square().sum()
        own = own * _share(spread.clamp_min(0) * variance.square(), 2 * sd * sd)
        correlated, rank = significant(_off_diagonal(difference), sd)
        covariances.append(floored(pooled + torch.diag(own) + _off_diagonal(correlated), variance))
        modes.append(rank)
    return Denoised(torch.stack(covariances), pooled, pooled_modes, torch.tensor(modes))


def cell_means(centres: Tensor, counts: Tensor, sums: Tensor, sd_sum: float, prior: Tensor) -> Tensor:
    """Means [K, C, d] of cells, from noisy sums [K, C, d] of latents about the `centres` [K, C, d] and counts [K, C].

    They are shrunk to the centres. The mean of a class's cells becomes zero, since the class mean is known better.
    """
    n = counts.clamp_min(5)[..., None]
    move, noise = sums / n, (sd_sum / n).square()
    t = scale_of_prior(move, noise, n.square(), prior)
    means = centres + move * _share(t * prior, noise)
    return means - (counts[..., None] * means).sum(1, keepdim=True) / counts.sum(1)[:, None, None]


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
    """A covariance [d, d] with about `LEAST_VARIANCE` or more in every direction, if `variance` [d] is 1.

    Its diagonal stays as it was where it was at least `LEAST_OF_PRIOR` of `variance`.
    """
    unit = variance.sqrt()
    kept = torch.maximum(covariance.diagonal(), LEAST_OF_PRIOR * variance).sqrt()
    values, vectors = torch.linalg.eigh(covariance / unit[:, None] / unit)
    raised = (vectors * values.clamp_min(LEAST_VARIANCE)) @ vectors.mT
    scale = kept / raised.diagonal().sqrt()
    return raised * scale[:, None] * scale


def within_cells(covariance: Tensor, counts: Tensor, means: Tensor) -> Tensor:
    """The covariance [d, d] within the cells of a class: the class's covariance less that between the cells.

    `counts` [C] are the cells' noisy counts, at least 1, and `means` [C, d] their means less the mean of the class.
    """
    share = counts / counts.sum()
    between = (means * share[:, None]).mT @ means
    variance = covariance.diagonal()
    unit = variance.sqrt()
    values, vectors = torch.linalg.eigh((covariance - between) / unit[:, None] / unit)
    return (vectors * values.clamp_min(LEAST_VARIANCE)) @ vectors.mT * unit[:, None] * unit


def _share(signal: Tensor, noise: Tensor | float) -> Tensor:
    return signal / (signal + noise)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(matrix.diagonal())
