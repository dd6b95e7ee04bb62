"""ELU and its gradient by C++ kernels, for float32 on a CPU: in one pass over memory each."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from glem_augment.flows.native import Kernel, declare, library, threads_for
from glem_augment.flows.ordinary import is_ordinary

LOG2_E = 1 / math.log(2)
# Multiply-adds for a number, about.
_WORK = 15


@cache
def _kernel() -> Kernel | None:
    made = library("elu.cpp")
    if made is None:
        return None
    size, number, integer = ctypes.c_int64, ctypes.c_float, ctypes.c_int32
    return Kernel(
        declare(made.glem_elu, 2, [size, number, number, integer]), declare(made.glem_elu_backward, 4, [size, integer])
    )


def has_kernel() -> bool:
    """Whether there is one."""
    return _kernel() is not None


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
    kernel, size, here = _kernel(), x.numel(), x.data_ptr()
    assert kernel is not None
    if owned:
        y, there = x, here
    else:
        y = torch.empty_like(x)
        there = y.data_ptr()
    kernel.forward(here, there, size, LOG2_E / unit, unit, threads_for(size * _WORK))
    return y


def elu_backward(g: Tensor, y: Tensor, added: Tensor | None = None) -> Tensor:
    """From the gradient of y = elu(x) to that of x, in the place of ``g``.

    Args:
        g, y: of one shape, channels last.
        added: likewise, to be added to the result.
    """
    kernel, here, size = _kernel(), g.data_ptr(), g.numel()
    assert kernel is not None
    assert _is_dense(g, size) and _is_dense(y, size)
    other = None
    if added is not None:
        assert _is_dense(added, size)
        other = added.data_ptr()
    kernel.backward(here, y.data_ptr(), other, here, size, threads_for(size * _WORK))
    return g


def _is_dense(x: Tensor, size: int) -> bool:
    return x.numel() == size and x.is_contiguous(memory_format=torch.channels_last)
