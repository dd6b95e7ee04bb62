"""The affine coupling by a C++ kernel, for float32 on a CPU.

The same formulas as in ``affine_coupling``, in one pass over memory where torch's operations make eight. The backward
recomputes all from the networks' output, so that is all that is kept.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import for_backward, images_like
from glem_augment.flows.native import Kernel, declare, library, threads_for
from glem_augment.flows.ordinary import is_ordinary

# Channels for which the parameters of sixteen pixels stay in the first cache.
_LARGEST = 96
# Multiply-adds for a number, about: two exponentials and their surroundings.
_WORK = 40


@cache
def _kernel(n: int) -> Kernel | None:
    made = library("affine.cpp", N=n) if n <= _LARGEST else None
    if made is None:
        return None
    size, integer = ctypes.c_int64, ctypes.c_int32
    rest = [size, size, ctypes.c_float, integer, integer]
    return Kernel(declare(made.glem_affine, 4, rest), declare(made.glem_affine_backward, 6, rest))


def has_kernel(n: int) -> bool:
    """Whether there is a kernel for n mapped channels."""
    return _kernel(n) is not None


def serves(x2: Tensor, params: Tensor) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    return is_ordinary(x2) and is_ordinary(params) and has_kernel(x2.shape[0])


def couple(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """``affine_coupling`` without a graph."""
    x2 = x2.contiguous()
    n, batch, height, width = x2.shape
    params = images_like(x2, params, 2 * n)
    kernel = _kernel(n)
    assert kernel is not None
    y2, logdet = torch.empty_like(x2), x2.new_empty(batch)
    pointers = [t.data_ptr() for t in (x2, params, y2, logdet)]
    kernel.forward(*pointers, batch, height * width, bound, inverse, threads_for(x2.numel() * _WORK))
    return y2, logdet


def couple_backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, params: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``couple``'s arguments from those of its results."""
    n, batch, height, width = x2.shape
    kernel, tensors = _kernel(n), for_backward(g, g_logdet, x2, params, 2 * n)
    assert kernel is not None
    pointers = [t.data_ptr() for t in tensors]
    kernel.backward(*pointers, batch, height * width, bound, inverse, threads_for(2 * x2.numel() * _WORK))
    return tensors[4:]
