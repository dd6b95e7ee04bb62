"""The C++ kernel of ``affine_joint``, for float32 on a CPU.

Between the networks of two steps there is little to compute, and the networks have emptied the caches: most of the time
goes into finding the way through a dozen of torch's operations and of autograd's nodes. So it is one of each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import images_like
from glem_augment.flows.native import Kernel, declare, library, threads_for

# Beyond so many channels a library's matrix products are faster than the kernel's loops.
_LARGEST = 48
# Pixels whose sums are made by the same thread.
_CHUNK = 1024


@cache
def _kernel(n: int) -> Kernel | None:
    made = library("affine_joint.cpp", N=n) if 2 * n <= _LARGEST and n % 2 == 0 else None
    if made is None:
        return None
    size, integer = ctypes.c_int64, ctypes.c_int32
    last = [ctypes.c_float, integer, integer]
    return Kernel(
        declare(made.glem_affine_joint, 7, [size, size, *last]),
        declare(made.glem_affine_joint_backward, 11, [size, size, size, *last]),
    )


def has_kernel(n: int) -> bool:
    """Whether there is a kernel for n mapped channels."""
    return _kernel(n) is not None


def _work(x: Tensor) -> int:
    """Multiply-adds, about."""
    return x.numel() * (len(x) + 20)


def _checked(x: Tensor, params: Tensor | None, matrix: Tensor | None, shift: Tensor | None) -> list[Tensor | None]:
    """All as the kernel takes them: it believes in shapes, so whatever comes here is held to them."""
    channels = len(x)
    if params is not None:
        params = images_like(x, params, channels)
    if matrix is None or shift is None:
        return [x.contiguous(), params, None, None]
    if matrix.shape != (channels, channels) or shift.shape != (channels, 1):
        raise ValueError(
            f"matrix {tuple(matrix.shape)} and shift {tuple(shift.shape)} are not those of {tuple(x.shape)}"
        )
    return [x.contiguous(), params, matrix.contiguous(), shift.contiguous()]


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def joint(
    x: Tensor, params: Tensor | None, matrix: Tensor | None, shift: Tensor | None, bound: float, inverse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``affine_joint.joint`` without a graph."""
    x, *rest = _checked(x, params, matrix, shift)
    channels, batch, height, width = x.shape
    kernel, y = _kernel(channels // 2), torch.empty_like(x)
    assert kernel is not None
    images = None if matrix is None else x.new_empty(batch, height, width, channels // 2)
    logdet = None if params is None else x.new_empty(batch)
    pointers = _pointers((x, *rest, y, images, logdet))
    kernel.forward(*pointers, batch, height * width, bound, inverse, threads_for(_work(x)))
    return y, None if images is None else images.permute(0, 3, 1, 2), logdet


def joint_backward(
    upstream: Sequence[Tensor | None],
    needed: Sequence[bool],
    x: Tensor,
    params: Tensor | None,
    matrix: Tensor | None,
    shift: Tensor | None,
    bound: float,
    inverse: bool,
) -> list[Tensor | None]:
    """Gradients of ``joint``'s first four arguments, as far as they are ``needed``, from those of its results."""
    x, params, matrix, shift = _checked(x, params, matrix, shift)
    channels, batch, height, width = x.shape
    g, g_images, g_logdet = upstream
    assert g is not None and (g_images is None) == (matrix is None) and (g_logdet is None) == (params is None)
    found = [tuple(t.shape) for t in (g, g_logdet) if t is not None]
    if found != [tuple(x.shape), (batch,)][: len(found)]:
        raise ValueError(f"gradients {', '.join(map(str, found))} are not those of x {tuple(x.shape)}")
    # Each keeps its name until the kernel is done: it is handed nothing but addresses.
    g = g.contiguous()
    if g_images is not None:
        g_images = images_like(x, g_images, channels // 2)
    if g_logdet is not None:
        g_logdet = g_logdet.contiguous()
    weights = needed[2] or needed[3]
    # The network that made the parameters needs their gradient wherever anything before it needs one.
    wanted = (needed[0], params is not None, weights, weights)
    made = [torch.empty_like(t) if w else None for t, w in zip((x, params, matrix, shift), wanted, strict=True)]
    each = max(1, _CHUNK // max(1, height * width))
    parts = x.new_empty(-(-batch // each), channels * (channels + 1)) if weights else None
    kernel = _kernel(channels // 2)
    assert kernel is not None
    pointers = _pointers((g, g_images, g_logdet, x, params, matrix, *made, parts))
    kernel.backward(*pointers, batch, height * width, each, bound, inverse, threads_for(3 * _work(x)))
    return made
