"""ELU by a C++ kernel, for float32 on a CPU: in one pass over memory, where torch's operations make three."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glem_augment.flows.native import declare, library, threads_for
from glem_augment.flows.ordinary import is_ordinary

LOG2_E = 1 / math.log(2)
# Multiply-adds for a number, about.
_WORK = 15


@cache
def _kernel() -> Any | None:
    made = library("elu.cpp")
    if made is None:
        return None
    number, integer = ctypes.c_float, ctypes.c_int32
    return declare(made.glem_elu, 2, [ctypes.c_int64, number, number, integer])


def serves(x: Tensor) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and is_ordinary(x) and _kernel() is not None


def elu(x: Tensor, unit: float = 1.0, owned: bool = False) -> Tensor:
    """``unit * elu(x / unit)``, without a graph.

    Args:
        x: any shape, contiguous or channels last.
        unit: a positive number.
        owned: x may be overwritten.
    """
    kernel, y = _kernel(), x if owned else torch.empty_like(x)
    assert kernel is not None
    kernel(x.data_ptr(), y.data_ptr(), x.numel(), LOG2_E / unit, unit, threads_for(x.numel() * _WORK))
    return y
