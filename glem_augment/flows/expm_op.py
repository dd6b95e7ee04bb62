"""The matrix-exponential coupling as operators that ``torch.compile`` takes as they are.

Traced through, the unrolled Taylor series is the worst case of a fusing compiler: every entry of a term reads all
entries of the term before, so fused code recomputes the series over and over. As operators, the series stays what
``expm_coupling`` makes of it, and the networks around it are compiled. Eager code does not come here: calling an
operator written in Python costs several times what ``autograd.Function`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows import expm_coupling as eager
from glem_augment.flows.matexp import taylor_plan


@torch.library.custom_op("glem_augment::expm_coupling", mutates_args=())
def _forward(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y2, logdet, s, factor, starts, _ = eager.couple(x2, params, bound, inverse)
    # Operators may not return their inputs: the first start of the forward direction is x2 itself.
    own = starts if inverse else starts[1:]
    return y2, logdet, s, factor, torch.stack(own) if own else x2.new_empty(0)


def _image_like(x2: Tensor) -> Tensor:
    """An image as the layout for its n returns it: pixel by pixel, the channels of a pixel are neighbours."""
    n, batch, height, width = x2.shape
    if eager.is_planes(n):
        return x2.new_empty(x2.shape)
    return x2.new_empty((batch, height, width, n)).permute(3, 0, 1, 2)


@_forward.register_fake
def _(x2, params, bound, inverse):
    n, batch, height, width = x2.shape
    pixels = batch * height * width
    planes = eager.is_planes(n)
    segments, _ = taylor_plan(bound, x2.dtype)
    vectors = (n, pixels) if planes else (pixels, 1, n)
    own = segments if inverse else segments - 1
    return (
        _image_like(x2),
        x2.new_empty(batch),
        x2.new_empty((n, n, pixels) if planes else (pixels, n, n)),
        x2.new_empty((n, 1, pixels) if planes else (pixels, n, 1)),
        x2.new_empty((own, *vectors) if own else 0),
    )


@torch.library.custom_op("glem_augment::expm_coupling_backward", mutates_args=())
def _backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, s: Tensor, factor: Tensor, own: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    n, batch, height, width = x2.shape
    starts = list(own) if own.numel() else []
    if not inverse:
        starts.insert(0, eager.vectors(x2))
    shape = torch.Size((batch, n * n + n, height, width))
    g_x2, g_params = eager.couple_backward(g, g_logdet, s, factor, starts, bound, bound, inverse, shape)
    return g_x2.clone() if g_x2.data_ptr() == g.data_ptr() else g_x2, g_params


@_backward.register_fake
def _(g, g_logdet, x2, s, factor, own, bound, inverse):
    n, batch, height, width = x2.shape
    params = torch.empty(
        (batch, n * n + n, height, width), dtype=g.dtype, device=g.device, memory_format=torch.channels_last
    )
    return _image_like(x2), params


def _setup(ctx, inputs, output) -> None:
    x2, _, bound, inverse = inputs
    _, _, s, factor, own = output
    ctx.save_for_backward(x2, s, factor, own)
    ctx.plan = (bound, inverse)


def _differentiate(ctx, g, g_logdet, *_unused):
    x2, s, factor, own = ctx.saved_tensors
    # Of the log-determinant's sum over a batch, an expanded scalar arrives.
    grads = _backward(g.contiguous(), g_logdet.contiguous(), x2, s, factor, own, *ctx.plan)
    return (*grads, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)


def expm_coupling_op(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """As ``expm_coupling``, traceable without a graph break; reverse mode once, like there."""
    y2, logdet, *_ = _forward(x2.contiguous(), params, bound, inverse)
    return y2, logdet
