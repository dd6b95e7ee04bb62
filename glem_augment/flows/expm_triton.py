"""The matrix-exponential coupling by a Triton kernel, for float32 on a GPU, where it is asked for: ``GLEM_TRITON=1``.

As in ``expm_native``, S is made, exponentiated and applied without ever being written to memory, in one launch where
torch's operations take several for every term of its series. Not the default: nobody has timed it on a GPU yet, where
``benchmarks/triton_kernel.py`` compares the two; Triton's interpreter runs it in the tests.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import for_backward, images_like
from glem_augment.flows.matexp import taylor_plan
from glem_augment.flows.ordinary import are_ordinary_on_cuda

# Numbers that a program may hold, one warp: 80 for a thread. (What ptxas makes of it on compute capability 8.0 and 9.0
# then spills at most 48 bytes of a thread's registers, for n up to 24.)
_NUMBERS = 2560
_LARGEST = 32
# Of Triton's compiler: one warp; multiply and add as one instruction, which from 3.10 on is not its own choice.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


@cache
def _programs() -> ModuleType | None:
    """The kernels; None where they are not asked for or, with a warning, where there is no Triton."""
    if os.environ.get("GLEM_TRITON", "") in ("", "0"):
        return None
    try:
        from glem_augment.flows import expm_triton_programs
    except ImportError as error:
        warnings.warn(f"GLEM_TRITON is set, but there is no Triton ({error}): pip install triton", stacklevel=2)
        return None
    return expm_triton_programs


def has_kernel(n: int, bound: float) -> bool:
    """Whether there is a kernel for n x n matrices, with any ``bound``."""
    return n <= _LARGEST and _programs() is not None


def serves(x2: Tensor, params: Tensor, bound: float) -> bool:
    """Whether the kernel may stand for torch's operations here."""
    return has_kernel(x2.shape[0], bound) and are_ordinary_on_cuda((x2, params))


def _plan(n: int, pixels: int, bound: float, inverse: bool) -> tuple[tuple[int], dict[str, int | bool]]:
    """The grid, and the numbers that a program is compiled for."""
    segments, terms = taylor_plan(bound, torch.float32)
    terms = max(2, terms)  # of one term alone the derivative would be a constant
    padded, room = _power_of_two(n), _power_of_two(terms)
    fitting = max(1, _NUMBERS // (2 * padded**2 + room * padded))
    block = 1 << (fitting.bit_length() - 1)  # a power of two as well
    numbers = {"N": n, "PADDED": padded, "BLOCK": block, "SEGMENTS": segments, "TERMS": terms, "ROOM": room}
    return (-(-pixels // block),), {**numbers, "INVERSE": inverse, **_OPTIONS}


def _power_of_two(number: int) -> int:
    """The next one that is not below ``number``, 1 or more."""
    return 1 << (number - 1).bit_length()


def couple(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """``expm_coupling`` without a graph."""
    x2 = x2.contiguous()
    n, batch, height, width = x2.shape
    params, pixels = images_like(x2, params, n * n + n), batch * height * width
    y2, trace = torch.empty_like(x2), x2.new_empty(batch, height * width)
    programs = _programs()
    assert programs is not None
    if pixels:
        grid, numbers = _plan(n, pixels, bound, inverse)
        with torch.cuda.device_of(x2):
            programs.forward[grid](x2, params, y2, trace, pixels, bound, **numbers)
    # Summed here and not by the kernel, whose programs would add in a different order every time.
    return y2, trace.sum(1)


def couple_backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, params: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``couple``'s arguments from those of its results."""
    n, batch, height, width = x2.shape
    tensors, pixels = for_backward(g, g_logdet, x2, params, n * n + n), batch * height * width
    programs = _programs()
    assert programs is not None
    if pixels:
        grid, numbers = _plan(n, pixels, bound, inverse)
        with torch.cuda.device_of(x2):
            programs.backward[grid](*tensors, pixels, height * width, bound, **numbers)
    return tensors[4:]
