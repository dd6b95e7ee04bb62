"""Kullback-Leibler divergences between K diagonal Gaussians, without a K x K x d tensor.

``KL(y || y') = 1/2 sum_i [ log s_y'i / s_yi + (s_yi + (mu_yi - mu_y'i)^2) / s_y'i - 1 ]``, s a variance
(GLEM, Eq. 4). Summed over all pairs the logarithms cancel and everything that is left factorises over classes in
each dimension, so the sum and its gradient cost O(K d). Sums run in float64 over slices of the dimensions: with
nearly equal Gaussians they are small differences of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows.host_memory import empty_of_huge_pages

# float64 working memory of one slice stays near K * 256 * 8 bytes per temporary.
_SLICE = 256


def _slices(d: int) -> range:
    return range(0, d, _SLICE)


def _centred(mu: Tensor, start: int) -> Tensor:
    """One slice of the means in float64, with mean zero over the classes: fewer digits cancel."""
    m = _copied(mu, start)
    return m.sub_(m.mean(0))


def _copied(x: Tensor, start: int) -> Tensor:
    """One slice in float64, always a copy: the callers work in place."""
    return x[:, start : start + _SLICE].to(torch.float64, copy=True)


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
        m = _centred(mu, start)
        s = var[:, start : start + _SLICE].double()
        inverse = 1 / s
        w, wm, wmm = inverse.sum(0), (m * inverse).sum(0), (m * m * inverse).sum(0)
        log_s = s.log()
        terms = log_s.sum(0) - k * log_s + (s + m * m) * w - 2 * m * wm + wmm - k
        out += terms.sum(1).mul_(0.5)
    return out


class _PairSum(torch.autograd.Function):
    """Summed over all ordered pairs the logarithms cancel, and with centred means (sum_y mu_y = 0) what is left is, per
    dimension, ``1/2 [ (sum s + sum mu^2) (sum 1/s) + K sum mu^2/s - K^2 ]``."""

    @staticmethod
    def forward(ctx, mu: Tensor, var: Tensor) -> Tensor:
        ctx.save_for_backward(mu, var)
        k, d = mu.shape
        total = torch.zeros((), dtype=torch.float64, device=mu.device)
        for start in _slices(d):
            m, s = _centred(mu, start), _copied(var, start)
            spread = s.sum(0)
            inverse = s.reciprocal_()
            square = m.square_()
            spread += square.sum(0)
            terms = spread.mul_(inverse.sum(0)).add_(square.mul_(inverse).sum(0), alpha=k).sub_(k * k)
            total += terms.sum()
        return total.mul_(0.5).to(mu.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        mu, var = ctx.saved_tensors
        k, d = mu.shape
        g = g.double()
        grad_mu, grad_var = empty_of_huge_pages(mu), empty_of_huge_pages(var)
        for start in _slices(d):
            part = slice(start, start + _SLICE)
            m, s = _centred(mu, start), _copied(var, start)
            spread = s.sum(0)
            inverse = s.reciprocal_()
            scaled = m * inverse
            w, wm = inverse.sum(0), scaled.sum(0)
            # d/dmu_y = sum_y' (mu_y - mu_y') (1/s_y' + 1/s_y)
            grad_mu[:, part] = scaled.mul_(k).add_(m * w).sub_(wm).mul_(g)
            # d/ds_y = 1/2 [ sum_y' 1/s_y' - sum_y' (s_y' + (mu_y - mu_y')^2) / s_y^2 ]
            square = m.square_()
            spread += square.sum(0)
            grad_var[:, part] = square.mul_(k).add_(spread).mul_(inverse.square_()).neg_().add_(w).mul_(0.5 * g)
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
