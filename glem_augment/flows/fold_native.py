"""ActNorms per channel and mixings folded by a C++ kernel, for float32 on a CPU: see ``prepared``.

Two dozen small tensors go in and come out; torch's operations on them, and autograd's, took several times as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.flows.generators import PRODUCTS, SMALL
from glem_augment.flows.native import Kernel, declare, library, threads_for
from glem_augment.flows.ordinary import is_ordinary

Tensors = Sequence[Tensor]


@cache
def _kernel() -> Kernel | None:
    made = library("fold.cpp")
    if made is None:
        return None
    size, real, integer = ctypes.c_int64, ctypes.c_double, ctypes.c_int32
    rest = [size, size, size, real, real, integer]
    return Kernel(declare(made.glem_fold, 6, rest), declare(made.glem_fold_backward, 10, rest))


def serves(biases: Tensors, log_scales: Tensors, generators: Tensors) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    c = len(generators[0])
    weights = [*((w, c) for w in (*biases, *log_scales)), *((w, c * c) for w in generators)]
    return (
        c <= SMALL
        and is_ordinary(biases[0])
        and all(
            type(w) is nn.Parameter
            and w.is_cpu
            and w.dtype is torch.float32
            and w.is_contiguous()
            and w.numel() == size
            for w, size in weights
        )
        and _kernel() is not None
    )


def _pointers(addresses: Sequence[int]) -> Any:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _of(tensors: Tensors) -> Any:
    return _pointers([t.data_ptr() for t in tensors])


def _rest(generators: Tensors, logdet: Tensor, pixels: tuple[int, int], works: int) -> list[Any]:
    steps, c = len(generators), len(generators[0])
    return [steps, c, logdet.numel(), *pixels, threads_for(steps * works * PRODUCTS * c**3)]


def fold(
    biases: Tensors, log_scales: Tensors, generators: Tensors, pixels: tuple[int, int], batch: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """Of S steps, of c channels each: matrices [S, c, c], shifts [S, c, 1] and the log|det| that all images share.

    Args:
        biases, log_scales: of the ActNorms, with c entries.
        generators: of the mixings, [c, c].
        pixels: that an entry of a log_scale stands for, and those of an image.
        batch: the shape of log|det|, all of whose entries are the same.
    """
    kernel, steps, c = _kernel(), len(generators), len(generators[0])
    assert kernel is not None
    made = [generators[0].new_empty(shape) for shape in ((steps, c, c), (steps, c, 1), batch)]
    pointers = [_of(tensors) for tensors in (biases, log_scales, generators)]
    pointers += [t.data_ptr() for t in made]
    kernel.forward(*pointers, *_rest(generators, made[-1], pixels, 1))
    return tuple(made)


def fold_backward(
    g_matrices: Sequence[int],
    g_shifts: Sequence[int],
    g_logdet: Tensor,
    biases: Tensors,
    log_scales: Tensors,
    generators: Tensors,
    matrices: Tensor,
    pixels: tuple[int, int],
) -> list[Tensor]:
    """Gradients of biases, log_scales and generators, one after the other, in their shapes.

    Args:
        g_matrices, g_shifts: addresses of every step's, contiguous.
        g_logdet: contiguous.
        biases, log_scales, generators, pixels: as for ``fold``.
        matrices: that it made.
    """
    kernel, steps = _kernel(), len(generators)
    assert kernel is not None and len(g_matrices) == len(g_shifts) == steps
    made = [matrices.new_empty(steps, *ws[0].shape) for ws in (biases, log_scales, generators)]
    pointers = [_pointers(g_matrices), _pointers(g_shifts), g_logdet.data_ptr()]
    pointers += [_of(tensors) for tensors in (biases, log_scales, generators)]
    pointers += [t.data_ptr() for t in (matrices, *made)]
    kernel.backward(*pointers, *_rest(generators, g_logdet, pixels, 3))
    return [gradient for kind in made for gradient in kind.unbind()]
