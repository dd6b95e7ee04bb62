"""ELU and its gradient by C++ kernels, for float32 on a CPU: in one pass over memory each."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import LANES
from glem_augment.flows.native import declare, library, threads_for
from glem_augment.flows.ordinary import is_ordinary

LOG2_E = 1 / math.log(2)
# Multiply-adds for a number, about.
_WORK = 15
# Pixels whose sums are made by the same thread.
_CHUNK = 64


class _Kernels(NamedTuple):
    forward: Any
    backward: Any
    backward_sums: Any


@cache
def _kernels() -> _Kernels | None:
    made = library("elu.cpp")
    if made is None:
        return None
    size, number, integer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32
    return _Kernels(
        declare(made.glem_elu, 2, [size, number, number, integer]),
        declare(made.glem_elu_backward, 4, [size, integer]),
        declare(made.glem_elu_backward_sums, 6, [size, size, size, integer]),
    )


def has_kernel() -> bool:
    """Whether there is one."""
    return _kernels() is not None


def serves(x: Tensor) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    return (x.is_contiguous() or _is_channels_last(x)) and is_ordinary(x) and has_kernel()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def elu(x: Tensor, unit: float = 1.0, owned: bool = False) -> Tensor:
    """``unit * elu(x / unit)``, without a graph.

    Args:
        x: any shape, contiguous or channels last.
        unit: a positive number.
        owned: x may be overwritten.
    """
    kernels, size, here = _kernels(), x.numel(), x.data_ptr()
    assert kernels is not None
    if owned:
        y, there = x, here
    else:
        y = torch.empty_like(x)
        there = y.data_ptr()
    kernels.forward(here, there, size, LOG2_E / unit, unit, threads_for(size * _WORK))
    return y


def elu_backward(
    g: Tensor, y: Tensor, added: Tensor | None = None, with_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of y = elu(x) to that of x, in the place of ``g``.

    Args:
        g, y: [B, C, H, W], channels last.
        added: likewise, to be added to the result.
        with_sums: come with those of the result by channel, [C], where they can be had in the same pass.
    """
    kernels, size, channels = _kernels(), g.numel(), g.shape[1]
    assert kernels is not None
    assert all(_is_dense(t, size) for t in (g, y, *(() if added is None else (added,))))
    here = g.data_ptr()
    pointers = here, y.data_ptr(), None if added is None else added.data_ptr(), here
    threads = threads_for(size * _WORK)
    if not with_sums or channels % LANES:
        kernels.backward(*pointers, size, threads)
        return g, None
    pixels = size // channels
    sums, parts = g.new_empty(channels), g.new_empty(-(-pixels // _CHUNK) * channels)
    kernels.backward_sums(*pointers, sums.data_ptr(), parts.data_ptr(), pixels, channels, _CHUNK, threads)
    return g, sums


def _is_dense(x: Tensor, size: int) -> bool:
    return x.dtype is torch.float32 and x.numel() == size and x.is_contiguous(memory_format=torch.channels_last)
