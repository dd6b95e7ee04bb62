"""Kullback-Leibler divergences between K diagonal Gaussians, without a K x K x d tensor.

``KL(y || y') = 1/2 sum_i [ log s_y'i / s_yi + (s_yi + (mu_yi - mu_y'i)^2) / s_y'i - 1 ]``, s a variance
(GLEM, Eq. 4). Summed over all pairs the logarithms cancel and everything that is left factorises over classes in
each dimension, so the sum and its gradient cost O(K d). Sums run in float64 over slices of the dimensions: with
nearly equal Gaussians they are small differences of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# float64 working memory of one slice stays near K * 512 * 8 bytes per temporary.
_SLICE = 512


def _slices(d: int) -> range:
    return range(0, d, _SLICE)


@torch.no_grad()
def kld_class_sums(mu: Tensor, var: Tensor) -> Tensor:
    """``sum_{y'} KL(y || y')`` for every class y.

    Args:
        mu, var: [K, d].

    Returns:
        [K] float64, nats. Divide by K - 1 for the mean over the other classes.
    """
    k, d = mu.shape
    out = torch.zeros(k, dtype=torch.float64, device=mu.device)
    for start in _slices(d):
        m = mu[:, start : start + _SLICE].double()
        m = m - m.mean(0)
        s = var[:, start : start + _SLICE].double()
        inverse = 1 / s
        w, wm, wmm = inverse.sum(0), (m * inverse).sum(0), (m * m * inverse).sum(0)
        log_s = s.log()
        terms = log_s.sum(0) - k * log_s + (s + m * m) * w - 2 * m * wm + wmm - k
        out += terms.sum(1).mul_(0.5)
    return out


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mu: Tensor, var: Tensor) -> Tensor:
        ctx.save_for_backward(mu, var)
        return kld_class_sums(mu, var).sum().to(mu.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        mu, var = ctx.saved_tensors
        k, d = mu.shape
        grad_mu, grad_var = torch.empty_like(mu), torch.empty_like(var)
        for start in _slices(d):
            part = slice(start, start + _SLICE)
            m = mu[:, part].double()
            m = m - m.mean(0)
            s = var[:, part].double()
            inverse = 1 / s
            # Centred means sum to zero, so that sum_y' (mu_y - mu_y') = K mu_y.
            w, wm = inverse.sum(0), (m * inverse).sum(0)
            total = s.sum(0) + (m * m).sum(0)
            grad_mu[:, part] = g * (m * w - wm + k * m * inverse)
            grad_var[:, part] = g * 0.5 * (w - (total + k * m * m) * inverse * inverse)
        return grad_mu, grad_var


def kld_pair_sum(mu: Tensor, var: Tensor) -> Tensor:
    """``sum_{y != y'} KL(y || y')`` in O(K d) time and, besides the gradients, O(K) memory.

    Args:
        mu, var: [K, d] means and variances.

    Returns:
        scalar, nats, differentiable once with respect to both.
    """
    return _PairSum.apply(mu, var)


def kld_matrix(mu: Tensor, var: Tensor) -> Tensor:
    """All pairwise divergences by three products of [K, d] matrices.

    Args:
        mu, var: [K, d].

    Returns:
        [K, K] float64, nats; entry (y, y') is KL(y || y'). Differentiable.
    """
    d = mu.shape[1]
    m, s = mu.double(), var.double()
    m = m - m.mean(0)
    inverse = 1 / s
    log_det = s.log().sum(1)
    quadratic = (s + m * m) @ inverse.T - 2 * m @ (m * inverse).T + (m * m * inverse).sum(1)
    kld = 0.5 * (log_det[None, :] - log_det[:, None] + quadratic - d)
    # The diagonal is zero up to rounding; make it exact without breaking the graph.
    return kld - torch.diag_embed(kld.diagonal())
