"""Kullback-Leibler divergences between K diagonal Gaussians (Eq. 4), without a K x K x d tensor.

    KL(y || y')  =  1/2 sum_i [ log s_y'i / s_yi  +  (s_yi + (mu_yi - mu_y'i)^2) / s_y'i  -  1 ],      s a variance.

Summed over y', each dimension only needs sums over the classes, so the sum over all pairs and its gradient cost
O(K d). Everything runs in float64: for nearly equal Gaussians the result is a small difference of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Dimensions that are worked on at a time: float64 temporaries then stay near K * 256 * 8 bytes each.
_SLICE = 256


def kld_class_sums(mu: Tensor, var: Tensor) -> Tensor:
    """sum_{y'} KL(y || y') of every class y.

    Args:
        mu, var: [K, d] means and variances.

    Returns:
        [K] float64, nats; differentiable. Divide by K - 1 for the mean over the other classes.
    """
    slices = zip(mu.split(_SLICE, 1), var.split(_SLICE, 1), strict=True)
    # The backward pass computes a slice's temporaries again instead of keeping those of all slices.
    return torch.stack([checkpoint(_class_sums, m, s, use_reentrant=False) for m, s in slices]).sum(0)


def _class_sums(mu: Tensor, var: Tensor) -> Tensor:
    """`kld_class_sums` of a few dimensions [K, n].

    With S = sum_y' 1/s_y', M = sum_y' mu_y'/s_y' and Q = sum_y' mu_y'^2/s_y' per dimension,
    sum_y' KL(y || y') = 1/2 sum_i [ sum_y' log s_y' - K log s_y + (s_y + mu_y^2) S - 2 mu_y M + Q - K ].
    """
    s, m = var.double(), mu.double()
    m = m - m.mean(0)  # the divergences do not depend on the origin, and near it fewer digits cancel
    inverse, log_s = 1 / s, s.log()
    scaled = m * inverse
    total, first, second = inverse.sum(0), scaled.sum(0), (m * scaled).sum(0)
    k = len(mu)
    return 0.5 * (log_s.sum(0) - k * log_s + (s + m * m) * total - 2 * m * first + second - k).sum(1)


def kld_matrix(mu: Tensor, var: Tensor) -> Tensor:
    """All pairwise divergences, by products of [K, d] matrices.

    Args:
        mu, var: [K, d] means and variances.

    Returns:
        [K, K] float64, nats; entry (y, y') is KL(y || y'). Differentiable.
    """
    m, s = mu.double(), var.double()
    m = m - m.mean(0)
    inverse = 1 / s
    scaled = m * inverse
    log_det = s.log().sum(1)
    quadratic = (s + m * m) @ inverse.T - 2 * m @ scaled.T + (m * scaled).sum(1)
    kld = 0.5 * (log_det[None, :] - log_det[:, None] + quadratic - mu.shape[1])
    # The diagonal is zero up to rounding; this makes it exact without breaking the graph.
    return kld - torch.diag_embed(kld.diagonal())
