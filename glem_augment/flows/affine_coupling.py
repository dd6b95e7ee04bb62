"""The affine coupling's transform, in one pass over memory where there is a kernel for it.

Source: Dinh et al. 2017, Sec. 3.4, with log-scales bounded on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows import affine_native
from glem_augment.flows.ordinary import are_ordinary, gradients_of
from glem_augment.flows.processor import mkl_is_fast


def bounded(raw: Tensor, bound: float) -> Tensor:
    """``bound * tanh(raw / bound)``, entry by entry.

    By way of a sigmoid, but for processors whose tanh is the faster one (benchmarks/elementwise.py).
    """
    if not torch.compiler.is_compiling() and raw.device.type == "cpu" and mkl_is_fast():
        return torch.tanh(raw * (1 / bound)) * bound
    return torch.sigmoid(raw * (2 / bound)).sub(0.5) * (2 * bound)


def plain_coupling(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """By torch's operations."""
    raw, shift = params.transpose(0, 1).contiguous().split(len(x2))
    log_scale = bounded(raw, bound)
    logdet = log_scale.sum((0, 2, 3))
    if inverse:
        return (x2 - shift) * (-log_scale).exp(), -logdet
    return torch.addcmul(shift, x2, log_scale.exp()), logdet


class _NativeCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x2, params)
        ctx.plan = (bound, inverse)
        return affine_native.couple(x2, params, bound, inverse)

    @staticmethod
    def backward(ctx, g: Tensor, g_logdet: Tensor):
        if torch.is_grad_enabled() or not are_ordinary((g, g_logdet)):
            # These gradients are to be differentiated in turn, or come in batches.
            found = gradients_of(plain_coupling, ctx.saved_tensors, ctx.plan, ctx.needs_input_grad, (g, g_logdet))
            return (*found, None, None)
        return (*affine_native.couple_backward(g, g_logdet, *ctx.saved_tensors, *ctx.plan), None, None)


def affine_coupling(x2: Tensor, params: Tensor, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """``exp(s) x2 + b`` or, for the inverse, ``exp(-s) (x2 - b)``.

    Args:
        x2: [n, B, H, W], channel-major.
        params: [B, 2n, H, W], channels last where that is at hand: raw, then b; s is ``bounded(raw, bound)``.
        bound: largest absolute log-scale.
        inverse: which of the two.

    Returns:
        [n, B, H, W], and log|det| [B] in nats: the sum of s, negated for the inverse.
    """
    if not affine_native.serves(x2, params):
        return plain_coupling(x2, params, bound, inverse)
    if torch.is_grad_enabled() and (x2.requires_grad or params.requires_grad):
        return _NativeCoupling.apply(x2, params, bound, inverse)
    return affine_native.couple(x2, params, bound, inverse)
