"""The matrix-exponential coupling as operators that ``torch.compile`` takes as they are.

Traced through, the unrolled Taylor series is the worst case of a fusing compiler: every entry of a term reads all
entries of the term before, so fused code recomputes the series over and over. As operators, the series stays what
``expm_coupling`` makes of it, and the networks around it are compiled. Eager code does not come here: calling an
operator written in Python costs several times what ``autograd.Function`` does.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from glem_augment.flows import expm_native, expm_triton
from glem_augment.flows.expm_coupling import expm_coupling as eager
from glem_augment.flows.expm_kernels import cosh_and_sinhc
from glem_augment.flows.matexp import segments_of


@torch.library.custom_op("glem_augment::expm_coupling", mutates_args=())
def _forward(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y2, logdet, s, factor, starts, _ = eager.couple(x2, params, bound, inverse, measure=True)
    # Operators may not return their inputs: the first start of the forward direction is x2 itself.
    own = x2.new_zeros(_own_shape(x2.shape, bound, inverse))
    for place, start in zip(own, starts if inverse else starts[1:], strict=False):
        place.copy_(start)
    return y2, logdet, s, factor, own


def _own_shape(shape: torch.Size, bound: float, inverse: bool) -> tuple[int, ...]:
    """Room for the starts of as many segments as there can be; a batch of small norm leaves some empty."""
    n, batch, height, width = shape
    pixels = batch * height * width
    count = segments_of(bound) - (0 if inverse else 1)
    if not count:
        return (0,)
    return (count, n, pixels) if eager.is_planes(n) else (count, pixels, 1, n)


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
    return (
        _image_like(x2),
        x2.new_empty(batch),
        x2.new_empty((n, n, pixels) if planes else (pixels, n, n)),
        x2.new_empty((n, 1, pixels) if planes else (pixels, n, 1)),
        x2.new_empty(_own_shape(x2.shape, bound, inverse)),
    )


@torch.library.custom_op("glem_augment::expm_coupling_backward", mutates_args=())
def _backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, s: Tensor, factor: Tensor, own: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    n, batch, height, width = x2.shape
    reach = eager.norm_bound(factor, bound)  # the same as the forward's
    starts = list(own) if inverse else [eager.vectors(x2), *(own if own.numel() else ())]
    shape = torch.Size((batch, n * n + n, height, width))
    g_x2, g_params = eager.couple_backward(
        g, g_logdet, s, factor, starts[: segments_of(reach)], reach, bound, inverse, shape
    )
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


def _kernels(device: str) -> ModuleType:
    return expm_native if device == "cpu" else expm_triton


@torch.library.custom_op("glem_augment::expm_kernel", mutates_args=())
def _kernel(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return _kernels(x2.device.type).couple(x2, params, bound, inverse)


@_kernel.register_fake
def _(x2, params, bound, inverse):
    return x2.new_empty(x2.shape), x2.new_empty(x2.shape[1])


@torch.library.custom_op("glem_augment::expm_kernel_backward", mutates_args=())
def _kernel_backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, params: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _kernels(x2.device.type).couple_backward(g, g_logdet, x2, params, bound, inverse)


@_kernel_backward.register_fake
def _(g, g_logdet, x2, params, bound, inverse):
    return x2.new_empty(x2.shape), torch.empty_like(params, memory_format=torch.channels_last)


def _setup_kernel(ctx, inputs, output) -> None:
    x2, params, bound, inverse = inputs
    ctx.save_for_backward(x2, params)
    ctx.plan = (bound, inverse)


def _differentiate_kernel(ctx, g, g_logdet):
    return (*_kernel_backward(g, g_logdet, *ctx.saved_tensors, *ctx.plan), None, None)


_kernel.register_autograd(_differentiate_kernel, setup_context=_setup_kernel)


@torch.compiler.assume_constant_result
def _has_kernels(device: str, bound: float) -> bool:
    # Of one size for all: while tracing, n may be a symbol.
    return device in ("cpu", "cuda") and _kernels(device).has_kernel(2, bound)


def _two_by_two(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """``expm_coupling`` for n = 2, by the closed form of ``expm_kernels``: elementwise, so fused it is one loop."""
    raw, shift = params.transpose(0, 1).split([4, 2])
    (s00, s01), (s10, s11) = (row * (bound / (1 + row.abs().sum(0))) for row in raw.split(2))
    segments = segments_of(bound)
    h = (-1.0 if inverse else 1.0) / segments
    trace, half, b, c = s00 + s11, (s00 - s11) * (h / 2), s01 * h, s10 * h
    # h S is m I + B, B = [[half, b], [c, -half]] and B^2 = x I.
    even, odd = cosh_and_sinhc(torch.addcmul(half * half, b, c))
    scale = (trace * (h / 2)).exp()
    even, odd = even * scale, odd * scale
    v0, v1 = x2 - shift if inverse else x2
    for _ in range(segments):
        v0, v1 = even * v0 + odd * (half * v0 + b * v1), even * v1 + odd * (c * v0 - half * v1)
    y2 = torch.stack([v0, v1])
    logdet = trace.sum((1, 2))
    return (y2, -logdet) if inverse else (y2 + shift, logdet)


def expm_coupling_op(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """As ``expm_coupling``, traceable without a graph break; reverse mode once, like there."""
    if x2.shape[0] == 2:
        return _two_by_two(x2, params, bound, inverse)
    if x2.dtype == torch.float32 and _has_kernels(x2.device.type, bound):
        return _kernel(x2, params, bound, inverse)
    y2, logdet, *_ = _forward(x2.contiguous(), params, bound, inverse)
    return y2, logdet
