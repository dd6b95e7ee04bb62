"""The paper's central claim as a number: are the Gaussians of classes that look alike closer to each other?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glem_augment.errors import DataError


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..N of [N] values, float64; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two [N] vectors, in [-1, 1]; 0 where one is constant."""
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"need two vectors of one length, got {list(a.shape)} and {list(b.shape)}")
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if float(scale) > 0 else 0.0


def mantel(a: Tensor, b: Tensor, permutations: int = 999, seed: int = 0) -> tuple[float, float]:
    """Spearman correlation of two symmetric K x K matrices above the diagonal, and its one-sided p-value.

    Pairs that share a class are not independent, so the p-value permutes *classes* (Mantel 1967): the share of
    permutations, the identity included, whose correlation is at least as far in the direction of the one found.
    """
    k = a.shape[0]
    if a.shape != (k, k) or b.shape != (k, k) or k < 3:
        raise ValueError(f"need two K x K matrices, K >= 3, got {list(a.shape)} and {list(b.shape)}")
    row, column = torch.triu_indices(k, k, 1)
    found = spearman(a[row, column], b[row, column])
    sign = 1 if found >= 0 else -1
    g = torch.Generator().manual_seed(seed)
    # Ranks do not change when classes are permuted, so they are made once.
    ranks_a, ranks_b = torch.zeros(k, k, dtype=torch.float64), average_ranks(b[row, column])
    ranks_a[row, column] = average_ranks(a[row, column])
    ranks_a = ranks_a + ranks_a.T
    centred = ranks_b - ranks_b.mean()
    scale = ((len(centred) * ranks_a[row, column].var(correction=0)).sqrt() * centred.norm()).clamp_min(1e-300)
    as_far = 1
    for _ in range(permutations):
        order = torch.randperm(k, generator=g)
        value = float((ranks_a[order][:, order][row, column] * centred).sum() / scale)
        as_far += sign * value >= sign * found - 1e-12
    return found, as_far / (permutations + 1)


def class_mean_distance(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Distances [K, K] float64 between the classes' mean features [N, m].

    Raises:
        DataError: a class has no images.
    """
    total = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    total.index_add_(0, y.cpu(), features.detach().cpu().double())
    means = total / _counts(y, num_classes)[:, None]
    # By differences, since the means may be far from zero and close to each other.
    return torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")


def _counts(y: Tensor, num_classes: int) -> Tensor:
    """Images of every class [K]."""
    counts = torch.bincount(y.cpu(), minlength=num_classes)
    missing = (counts == 0).nonzero()[:, 0].tolist()
    if missing:
        raise DataError(
            f"no images of the classes {', '.join(map(str, missing[:10]))}{', ...' * (len(missing) > 10)}: leave them "
            "out of the KLD matrix and the logits, or use more images"
        )
    return counts


@dataclass
class ContinuumFit:
    """Rank correlations over class pairs with the symmetrised KLD, and their one-sided Mantel p-values.

    Attributes:
        confusion, confusion_p: with the oracle's mean class probabilities; the claim is a *negative* correlation.
        distance, distance_p: with the distance of the oracle's mean features; the claim is a *positive* one.
        pairs: K (K - 1) / 2.
    """

    confusion: float
    confusion_p: float
    distance: float
    distance_p: float
    pairs: int


def continuum_correlation(
    kld_matrix: Tensor, logits: Tensor, features: Tensor, y: Tensor, permutations: int = 999
) -> ContinuumFit:
    """Correlate the flow's pairwise KLD with how alike an oracle finds the classes, on held-out real images.

    Confusion is soft (the mean probability that the oracle gives y' on images of y): a good oracle makes too few
    mistakes for counts of them to order the pairs.

    Args:
        kld_matrix: [K, K] nats, KL(row || column). logits: [N, K], features: [N, m] of the oracle; y: int64 [N].

    Raises:
        DataError: a class has no images.
    """
    k = kld_matrix.shape[0]
    kld = kld_matrix.detach().cpu().double()
    confusion = torch.zeros(k, k, dtype=torch.float64)
    confusion.index_add_(0, y.cpu(), logits.detach().cpu().double().softmax(1))
    confusion = confusion / _counts(y, k)[:, None]
    by_confusion = mantel(kld + kld.T, confusion + confusion.T, permutations)
    by_distance = mantel(kld + kld.T, class_mean_distance(features, y, k), permutations)
    return ContinuumFit(*by_confusion, *by_distance, k * (k - 1) // 2)
