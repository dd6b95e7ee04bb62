"""exp(A) of the mixings' generators, for a whole level at once, with a backward pass in the weights' own precision.

Small ones on a CPU have a C++ kernel (``kernels/generators.cpp``); torch's many small operations took several times as
long.

The exponential itself is taken in float64 and rounded once, since it enters the round trip. Its gradient does not, and
torch's backward of ``matrix_exp``, which exponentiates matrices of twice the side in float64, was several percent of a
training step where images are small and channels many.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glem_augment.flows.native import declare, library, threads_for
from glem_augment.flows.ordinary import gradients_of, is_ordinary
from glem_augment.flows.precision import full_precision

# The series is summed where the norm is at most 1/2: x^k/k! is then below rounding after so many terms.
_TERMS = {torch.float32: 8, torch.float64: 14}
# That the kernel needs for an exponential, about; with a derivative three times as many.
PRODUCTS = 10
# Beyond this side a library's matrix products are faster than the kernel's loops.
SMALL = 96


@cache
def _kernel() -> tuple[Any, Any] | None:
    """The exponential in float64 and its adjoint, as C++."""
    made = library("generators.cpp")
    if made is None:
        return None
    size, integer = ctypes.c_int64, ctypes.c_int32
    rest = [size, size, ctypes.c_float, integer]
    return declare(made.glem_exp, 2, rest), declare(made.glem_exp_backward, 3, rest)


# Which of the two.
_EXP, _ADJOINT = 0, 1


def _serves(generators: Tensor) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    return generators.shape[-1] <= SMALL and is_ordinary(generators) and _kernel() is not None


def _call(which: int, sign: float, *tensors: Tensor) -> Tensor:
    """One of the two kernels on contiguous [S, c, c]."""
    kernel, tensors = _kernel(), tuple(t.contiguous() for t in tensors)
    assert kernel is not None and all(t.shape == tensors[0].shape for t in tensors)
    count, c, _ = tensors[0].shape
    out = torch.empty_like(tensors[0])
    threads = threads_for(count * (1 if which == _EXP else 3) * PRODUCTS * c**3)
    kernel[which](*(t.data_ptr() for t in (*tensors, out)), count, c, sign, threads)
    return out


def _frechet(x: Tensor, direction: Tensor) -> Tensor:
    """Derivative of exp at ``x`` along ``direction``, both [S, c, c], by scaling and squaring.

    Source: Al-Mohy & Higham, "Computing the Frechet derivative of the matrix exponential", SIAM J. Matrix Anal. Appl.
    2009: every product of the scheme is differentiated along with it.
    """
    norm = float(x.abs().sum(2).max())
    halvings = max(0, math.ceil(math.log2(norm)) + 1) if norm > 0 and math.isfinite(norm) else 0
    x, d = x * 0.5**halvings, direction * 0.5**halvings
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    terms = _TERMS[x.dtype]
    value, change = torch.add(eye, x, alpha=1 / terms), d / terms
    for k in range(terms - 1, 0, -1):
        change = torch.baddbmm(torch.bmm(d, value), x, change).div_(k)
        value = torch.baddbmm(eye, x, value, alpha=1 / k)
    for _ in range(halvings):
        change = torch.baddbmm(torch.bmm(value, change), change, value)
        value = torch.bmm(value, value)
    return change


def _plain(generators: Tensor, sign: float) -> tuple[Tensor]:
    """By torch's operations."""
    return (torch.matrix_exp(generators.double() * sign).to(generators.dtype),)


class _ExpOfGenerators(torch.autograd.Function):
    @staticmethod
    def forward(ctx, generators: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(generators)
        ctx.sign = sign
        if _serves(generators):
            return _call(_EXP, sign, generators)
        return _plain(generators, sign)[0]

    @staticmethod
    def backward(ctx, g: Tensor):
        (generators,) = ctx.saved_tensors
        if generators.dtype not in _TERMS:
            raise TypeError(f"the weights of a flow are float32 or float64, got {generators.dtype}")
        if torch.is_grad_enabled():
            # This gradient is to be differentiated in turn.
            return *gradients_of(_plain, (generators,), (ctx.sign,), ctx.needs_input_grad, (g,)), None
        if _serves(generators) and is_ordinary(g):
            return _call(_ADJOINT, ctx.sign, generators, g), None
        # The adjoint of the derivative at X is the derivative at its transpose.
        with full_precision(g.device.type):
            return _frechet(generators.transpose(1, 2) * ctx.sign, g) * ctx.sign, None


def exp_of_generators(generators: Tensor, sign: float) -> Tensor:
    """``exp(sign * A)``.

    Args:
        generators: A, [S, c, c] float32 or float64.
        sign: 1 or, for the inverse, -1.

    Returns:
        [S, c, c], exact but for one rounding to the dtype of A.
    """
    return _ExpOfGenerators.apply(generators, float(sign))
