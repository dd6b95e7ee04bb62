"""The paper's central claim as a number: are the Gaussians of similar classes closer to each other?"""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor


def mantel(a: Tensor, b: Tensor, permutations: int = 999) -> tuple[float, float]:
    """Spearman correlation of two symmetric K x K matrices above the diagonal, and its one-sided p-value.

    Pairs that share a class are not independent, so classes are permuted, not pairs (Mantel 1967). The p-value is the
    share of permutations, including the identity, whose correlation is at least as extreme in the same direction.
    """
    k = len(a)
    row, column = torch.triu_indices(k, k, 1)
    # Ranks do not change when classes are permuted, so they are computed once.
    ranks, others = torch.zeros(k, k, dtype=torch.float64), torch.from_numpy(rankdata(b[row, column]))
    ranks[row, column] = torch.from_numpy(rankdata(a[row, column]))
    ranks = ranks + ranks.T
    others = others - others.mean()
    scale = (ranks[row, column] - ranks[row, column].mean()).norm() * others.norm()

    def correlation(order: Tensor) -> float:
        return float((ranks[order][:, order][row, column] * others).sum() / scale.clamp_min(1e-300))

    found = correlation(torch.arange(k))
    sign = 1 if found >= 0 else -1
    g = torch.Generator().manual_seed(0)
    values = [correlation(torch.randperm(k, generator=g)) for _ in range(permutations)]
    as_far = 1 + sum(sign * value >= sign * found - 1e-12 for value in values)
    return found, as_far / (permutations + 1)


def class_means(values: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Mean of the rows [N, m] of every class: [K, m] float64. Every class must have rows."""
    total = torch.zeros(num_classes, values.shape[1], dtype=torch.float64)
    total.index_add_(0, y, values.double())
    return total / torch.bincount(y, minlength=num_classes)[:, None]


def continuum_correlation(kld_matrix: Tensor, logits: Tensor, features: Tensor, y: Tensor) -> dict[str, float]:
    """Correlate the flow's pairwise KLD with an oracle's similarity of the classes, on held-out real images.

    Confusion is soft (the mean probability that the oracle gives y' on images of y), because a good oracle makes too
    few mistakes for counts of them to order the pairs.

    Args:
        kld_matrix: [K, K] nats, KL(row || column). logits [N, K], features [N, m]: of the oracle. y: int64 [N].

    Returns:
        Rank correlations over class pairs with the symmetrised KLD, and their Mantel p-values (name + " p"):
        `rho-distance` with the distance of the classes' mean features, positive in the paper's claim, and
        `rho-confusion` with the confusion, negative in the paper's claim.
    """
    k = len(kld_matrix)
    kld = kld_matrix.detach().cpu().double()
    means = class_means(features, y, k)
    # By differences, since the means may be far from zero and close to each other.
    distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    confusion = class_means(logits.double().softmax(1), y, k)
    result = {}
    for name, other in (("rho-distance", distance), ("rho-confusion", confusion + confusion.T)):
        result[name], result[f"{name} p"] = mantel(kld + kld.T, other)
    return result
