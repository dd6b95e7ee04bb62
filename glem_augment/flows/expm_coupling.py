"""The matrix-exponential coupling's transform as one differentiable operation with a hand-written backward.

Raw network outputs are bounded row by row, exponentiated into an application to the other half, and shifted. The
backward keeps the bounded matrices and one vector per Taylor segment, and recomputes the rest. In float32 a kernel does
all this: ``expm_native`` on a CPU, ``expm_triton`` on a GPU where it is asked for.

Source: Xiao & Liu 2020, Sec. 4.2, for what is computed; how is this library's.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glem_augment.flows import expm_native, expm_triton, matexp
from glem_augment.flows.expm_kernels import make_kernel
from glem_augment.flows.precision import full_precision


def _raw_grad(out: Tensor, s: Tensor, factor: Tensor, grad_s: Tensor, dim: int, bound: float) -> None:
    """Into ``out``: the gradient of raw in ``S = bound * raw / (1 + sum |raw|)``, whose rows lie along ``dim``.

    ``out`` serves for what comes before, too: tensors of this size, allocated anew, cost more than the arithmetic.
    """
    torch.mul(grad_s, s, out=out)
    row = out.sum(dim, keepdim=True).mul_(factor).mul_(-1 / bound)
    torch.sign(s, out=out).mul_(row).addcmul_(grad_s, factor)


class _Planes:
    """n <= 6: everything over planes of pixels, P = B*H*W."""

    @staticmethod
    def bounded(params: Tensor, n: int, bound: float) -> tuple[Tensor, Tensor, Tensor]:
        """From [B, n^2 + n, H, W]: S with ``||S||_inf < bound``, the factors that made it so, and the shift."""
        # A copy of our own, because it is scaled in place.
        p = params.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1)
        raw, shift = p[: n * n].view(n, n, p.shape[1]), p[n * n :]
        factor = raw.abs().sum(1, keepdim=True).add_(1).reciprocal_().mul_(bound)
        return raw.mul_(factor), factor, shift

    @staticmethod
    def vectors(v: Tensor) -> Tensor:
        """[n, B, H, W] to what ``apply`` takes."""
        return v.flatten(1).contiguous()

    @staticmethod
    def image(v: Tensor, shape: torch.Size) -> Tensor:
        """Back to ``shape`` = [n, B, H, W]."""
        return v.view(shape)

    @staticmethod
    def trace(s: Tensor, batch: int, pixels: int) -> Tensor:
        """Trace of S, summed over the pixels of each image: [B]."""
        n = s.shape[0]
        return s.view(n * n, batch, pixels)[:: n + 1].sum((0, 2))

    @staticmethod
    def params_grad(
        s: Tensor, factor: Tensor, grad_s: Tensor, g_shift: Tensor, g_trace: Tensor, bound: float, shape: torch.Size
    ) -> Tensor:
        """Gradient of ``bounded``'s input, channels last, from those of S, the shift and the trace [B]."""
        batch, channels, height, width = shape
        n = s.shape[0]
        grad_s.view(n * n, batch, height * width)[:: n + 1].add_(g_trace[:, None])
        out = torch.empty(channels, batch * height * width, dtype=s.dtype, device=s.device)
        _raw_grad(out[: n * n].view(grad_s.shape), s, factor, grad_s, 1, bound)
        out[n * n :] = g_shift
        return out.view(channels, batch, height, width).transpose(0, 1).contiguous(memory_format=torch.channels_last)


class _Pixels:
    """n > 6: batched products on the networks' channels-last output as it is. Methods as in ``_Planes``."""

    @staticmethod
    def bounded(params: Tensor, n: int, bound: float) -> tuple[Tensor, Tensor, Tensor]:
        p = params.permute(0, 2, 3, 1).flatten(0, 2)
        raw, shift = p[:, : n * n].unflatten(1, (n, n)), p[:, None, n * n :]
        s = raw.abs()
        factor = s.sum(2, keepdim=True).add_(1).reciprocal_().mul_(bound)
        return torch.mul(raw, factor, out=s), factor, shift

    @staticmethod
    def vectors(v: Tensor) -> Tensor:
        return v.flatten(1).t().contiguous().unsqueeze(1)

    @staticmethod
    def image(v: Tensor, shape: torch.Size) -> Tensor:
        return v.squeeze(1).t().reshape(shape)

    @staticmethod
    def trace(s: Tensor, batch: int, pixels: int) -> Tensor:
        return s.diagonal(dim1=1, dim2=2).reshape(batch, pixels * s.shape[1]).sum(1)

    @staticmethod
    def params_grad(
        s: Tensor, factor: Tensor, grad_s: Tensor, g_shift: Tensor, g_trace: Tensor, bound: float, shape: torch.Size
    ) -> Tensor:
        batch, channels, height, width = shape
        n = s.shape[1]
        grad_s.view(batch, height * width, n * n)[:, :, :: n + 1].add_(g_trace[:, None, None])
        out = torch.empty(batch * height * width, channels, dtype=s.dtype, device=s.device)
        _raw_grad(out[:, : n * n].unflatten(1, (n, n)), s, factor, grad_s, 2, bound)
        out[:, n * n :] = g_shift.squeeze(1)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def is_planes(n: int) -> bool:
    """Which layout serves n x n matrices: over planes of pixels, or pixel by pixel."""
    return matexp.layout(n) is matexp.Planes


def _layout(n: int) -> type[_Planes] | type[_Pixels]:
    return _Planes if is_planes(n) else _Pixels


def vectors(x2: Tensor) -> Tensor:
    """[n, B, H, W] in the layout that serves this n."""
    return _layout(x2.shape[0]).vectors(x2)


def norm_bound(factor: Tensor, bound: float) -> float:
    """An upper bound of ``||S||_inf`` over a batch: ``bound`` by a power of two, at most by 2^10.

    A row of S sums to ``bound - factor``, so on a CPU, where a value may be looked at, one small reduction tells it.
    Early in training S is small, and most terms of its series are zeros.
    """
    if factor.device.type != "cpu" or not factor.numel():
        return bound
    norm = bound - float(factor.min()) + 1e-6 * bound
    return bound * 0.5 ** min(10, math.floor(math.log2(bound / norm))) if norm < bound else bound


def couple(
    x2: Tensor, params: Tensor, bound: float, inverse: bool, measure: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], float]:
    """The result and log|det| of ``expm_coupling``, and what ``couple_backward`` needs: S, factors, the starts of the
    segments, and the bound of ``||S||_inf``: that of the batch if ``measure``, otherwise ``bound``."""
    n, batch, height, width = x2.shape
    layout = _layout(n)
    s, factor, shift = layout.bounded(params, n, bound)
    reach = norm_bound(factor, bound) if measure else bound
    kernel, v = make_kernel(s, n, reach), layout.vectors(x2)
    if inverse:
        v = v - shift
    starts = []
    for _ in range(kernel.segments):
        starts.append(v)
        v = kernel.apply(v, inverse)
    y2 = layout.image(v if inverse else v.add_(shift), x2.shape)
    trace = layout.trace(s, batch, height * width)
    return y2, -trace if inverse else trace, s, factor, starts, reach


def couple_backward(
    g: Tensor,
    g_logdet: Tensor,
    s: Tensor,
    factor: Tensor,
    starts: list[Tensor],
    reach: float,
    bound: float,
    inverse: bool,
    params_shape: torch.Size,
) -> tuple[Tensor, Tensor]:
    """Gradients of x2 and of the parameters, from those of what ``couple`` returned first."""
    layout = _layout(g.shape[0])
    with full_precision(g.device.type):  # a backward pass may be called under autocast
        kernel, g_out = make_kernel(s, g.shape[0], reach), layout.vectors(g)
        a = g_out
        for start in reversed(starts):
            a = kernel.adjoint(start, a, inverse)
        g_shift, g_trace = (-a, -g_logdet) if inverse else (g_out, g_logdet)
        g_params = layout.params_grad(s, factor, kernel.grad_s(), g_shift, g_trace, bound, params_shape)
    return layout.image(a, g.shape), g_params


def _kernels_for(x2: Tensor, params: Tensor, bound: float) -> ModuleType | None:
    """Whose kernels may stand for torch's operations here: ``couple`` and ``couple_backward`` of this module."""
    for kernels in (expm_native, expm_triton):
        if kernels.serves(x2, params, bound):
            return kernels
    return None


class _ByKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, kernels: ModuleType, x2: Tensor, params: Tensor, bound: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x2, params)
        ctx.kernels, ctx.plan = kernels, (bound, inverse)
        return kernels.couple(x2, params, bound, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, g_logdet: Tensor):
        return (None, *ctx.kernels.couple_backward(g, g_logdet, *ctx.saved_tensors, *ctx.plan), None, None)


class _ExpmCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
        y2, logdet, s, factor, starts, reach = couple(x2, params, bound, inverse, measure=True)
        ctx.save_for_backward(s, factor, *starts)
        ctx.plan = (reach, bound, inverse, params.shape)
        return y2, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, g_logdet: Tensor):
        s, factor, *starts = ctx.saved_tensors
        return (*couple_backward(g, g_logdet, s, factor, starts, *ctx.plan), None, None)


@torch.no_grad()
def expm_coupling_backward(
    y2: Tensor, params: Tensor, g: Tensor, g_logdet: Tensor, bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Undo ``y2, logdet = expm_coupling(x2, params, bound)`` and differentiate it, in one go.

    Args:
        y2: [n, B, H, W]; ``params`` and ``bound`` as there.
        g, g_logdet: gradients of y2 and of log|det| [B].

    Returns:
        x2, and the gradients of x2 and ``params``.
    """
    kernels = _kernels_for(y2, params, float(bound))
    if kernels is not None:
        x2, _ = kernels.couple(y2, params, float(bound), inverse=True)
        return x2, *kernels.couple_backward(g, g_logdet, x2, params, float(bound), inverse=False)
    n, _, height, width = y2.shape
    layout = _layout(n)
    s, factor, shift = layout.bounded(params, n, bound)
    kernel = make_kernel(s, n, norm_bound(factor, bound))
    # Undone segment by segment, the vectors on the way are the starts that the backward needs, last first.
    v, a = layout.vectors(y2) - shift, layout.vectors(g)
    for _ in range(kernel.segments):
        v = kernel.apply(v, inverse=True)
        a = kernel.adjoint(v, a, inverse=False)
    g_params = layout.params_grad(s, factor, kernel.grad_s(), layout.vectors(g), g_logdet, bound, params.shape)
    return layout.image(v, y2.shape), layout.image(a, y2.shape), g_params


def expm_coupling(x2: Tensor, params: Tensor, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """``exp(S) x2 + b`` per pixel, or its inverse ``exp(-S) (x2 - b)``, with S and b made from ``params``.

    Args:
        x2: [n, B, H, W], channel-major.
        params: [B, n^2 + n, H, W], channels last where that is at hand: raw S, row by row, then b. S is
            ``bound * raw / (1 + sum_j |raw_ij|)``, see ``coupling.row_bounded``.
        bound: r, the bound of ``||S||_inf``.
        inverse: which of the two.

    Returns:
        [n, B, H, W], and log|det| [B] in nats: the trace of S, summed over pixels, negated for the inverse. Can be
        differentiated once.
    """
    bound, inverse = float(bound), bool(inverse)
    kernels = _kernels_for(x2, params, bound)
    if torch.is_grad_enabled() and (x2.requires_grad or params.requires_grad):
        if kernels is not None:
            return _ByKernel.apply(kernels, x2, params, bound, inverse)
        return _ExpmCoupling.apply(x2, params, bound, inverse)
    if kernels is not None:
        return kernels.couple(x2, params, bound, inverse)
    return couple(x2, params, bound, inverse, measure=True)[:2]
