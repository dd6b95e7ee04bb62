"""Terms and gradients of ``densities`` by C++ kernels, for float32 on a CPU: in one pass over memory each."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from glem_augment.flows.native import Kernel, declare, library, threads_for
from glem_augment.flows.ordinary import are_ordinary

if TYPE_CHECKING:
    from glem_augment.latent.densities import Parametrisation, Products

# Multiply-adds for a number, about: an exponential and two reciprocals.
_WORK = 30


@cache
def _kernel() -> Kernel | None:
    made = library("densities.cpp")
    if made is None:
        return None
    size, number = ctypes.c_int64, ctypes.c_float
    rest = [size, size, size, number, number, number, ctypes.c_int32]
    return Kernel(declare(made.glem_densities, 5, rest), declare(made.glem_densities_backward, 7, rest))


def serves(mu: Tensor, s: Tensor) -> bool:
    """Whether the kernels may stand for torch's operations here."""
    return are_ordinary((mu, s)) and mu.is_contiguous() and s.is_contiguous() and _kernel() is not None


def _rest(mu: Tensor, how: Parametrisation) -> tuple[int, int, int, float, float, float, int]:
    return (*mu.shape, mu.stride(0), *(how.psi or (-1.0, 0.0, how.low)), threads_for(mu.numel() * _WORK))


def terms(mu: Tensor, s: Tensor, how: Parametrisation, inverse: Tensor, scaled: Tensor, totals: Tensor) -> None:
    """1/sigma^2 and mu/sigma^2 into the tensors for them; ``sum(log sigma^2 + mu^2/sigma^2)`` is added to ``totals``.

    Args:
        mu, s: [K, n], columns of tensors for which it ``serves``.
        inverse, scaled: [K, n], contiguous.
        totals: [K] float64.
    """
    kernel = _kernel()
    assert kernel is not None
    kernel.forward(*(t.data_ptr() for t in (mu, s, inverse, scaled, totals)), *_rest(mu, how))


def gradients(products: Products, mu: Tensor, s: Tensor, how: Parametrisation, d_mu: Tensor, d_s: Tensor) -> None:
    """Gradients of mu and s into ``d_mu`` and ``d_s``.

    Args:
        products: contiguous.
        mu, s, d_mu, d_s: [K, n], the same columns of tensors of one layout for which it ``serves``.
    """
    kernel = _kernel()
    assert kernel is not None
    tensors = (*products, mu, s, d_mu, d_s)
    kernel.backward(*(None if t is None else t.data_ptr() for t in tensors), *_rest(mu, how))
