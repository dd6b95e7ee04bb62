"""The matrix-exponential coupling by a C++ kernel, for float32 on a CPU.

The same formulas as in ``expm_coupling`` for a few pixels at a time: S is bounded, exponentiated and applied while it
is in the processor's caches, and neither it nor a term of its series is ever written to memory. The backward recomputes
all from the networks' output, so that is all that is kept.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import for_backward, images_like
from glem_augment.flows.matexp import taylor_plan
from glem_augment.flows.native import declare, library, threads_for
from glem_augment.flows.ordinary import is_ordinary

# As in kernels/expm.cpp.
_MAX_TERMS, _MAX_SEGMENTS, _PLANS = 16, 8, 11
_LARGEST = 24


class _Kernel(NamedTuple):
    forward: Any
    backward: Any
    plans: Any
    work: int  # multiply-adds per pixel


@cache
def _kernel(n: int, bound: float) -> _Kernel | None:
    plans = [taylor_plan(bound * 0.5**k, torch.float32) for k in range(_PLANS)]
    # Of one term alone the derivative would be a constant.
    plans = [(segments, max(2, terms)) for segments, terms in plans]
    segments, terms = plans[0]
    if n > _LARGEST or segments > _MAX_SEGMENTS or max(t for _, t in plans) > _MAX_TERMS:
        return None
    made = library("expm.cpp", N=n)
    if made is None:
        return None
    size, integer = ctypes.c_int64, ctypes.c_int32
    rest = [size, size, ctypes.c_float, integer, ctypes.c_void_p, integer]
    numbers = [number for plan in plans for number in plan]
    return _Kernel(
        declare(made.glem_expm, 5, rest),
        declare(made.glem_expm_backward, 6, rest),
        (integer * len(numbers))(*numbers),
        n * n * segments * terms,
    )


def has_kernel(n: int, bound: float) -> bool:
    """Whether there is a kernel for n x n matrices with ``||S||_inf <= bound``."""
    return _kernel(n, bound) is not None


def serves(x2: Tensor, params: Tensor, bound: float) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    return is_ordinary(x2) and is_ordinary(params) and _kernel(x2.shape[0], bound) is not None


def couple(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """``expm_coupling`` without a graph."""
    x2 = x2.contiguous()
    n, batch, height, width = x2.shape
    params = images_like(x2, params, n * n + n)
    kernel, pixels = _kernel(n, bound), batch * height * width
    assert kernel is not None
    y2, trace, logdet = torch.empty_like(x2), x2.new_empty(pixels), x2.new_empty(batch)
    pointers = [t.data_ptr() for t in (x2, params, y2, trace, logdet)]
    threads = threads_for(pixels * kernel.work)
    kernel.forward(*pointers, batch, height * width, bound, inverse, kernel.plans, threads)
    return y2, logdet


def couple_backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, params: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``couple``'s arguments from those of its results."""
    n, batch, height, width = x2.shape
    kernel, tensors = _kernel(n, bound), for_backward(g, g_logdet, x2, params, n * n + n)
    assert kernel is not None
    pointers = [t.data_ptr() for t in tensors]
    threads = threads_for(3 * batch * height * width * kernel.work)
    kernel.backward(*pointers, batch, height * width, bound, inverse, kernel.plans, threads)
    return tensors[4:]
