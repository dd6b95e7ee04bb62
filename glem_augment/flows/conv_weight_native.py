"""The gradient of a convolution's weight by a C++ kernel, for few images in float32 on a CPU with AVX-512.

oneDNN leaves it in blocks. For a weight in channels_last format torch puts these in order in two passes, by way of a
contiguous one; with as few pixels as a flow's last levels have, that takes as long as a third of all the products.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import LANES
from glem_augment.flows.native import declare, library, threads_for
from glem_augment.flows.ordinary import is_known

# Of a batch: with more of them, what the passes take no longer counts.
_MOST_PIXELS = 2048
# Channels that come out, at a time: as many as there are registers for.
_OUT = 8


@cache
def _kernel() -> Any:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    made = library("conv_weight.cpp", OUT=_OUT)
    if made is None:
        return None
    return declare(made.glem_conv_weight, 4, [*[ctypes.c_int64] * 6, ctypes.c_int32])


def _filled(channels: int, whole: int) -> int:
    return -(-channels // whole) * whole


def serves(x: Tensor, weight: Tensor, geometry: tuple) -> bool:
    """Whether the kernel may stand for torch's here, and is the faster one.

    Args:
        x: what the convolution was given, float32 on a CPU.
        weight: [O, I, side, side]; geometry: stride, padding, dilation, groups.
    """
    batch, channels, height, width = x.shape
    side = weight.shape[2]
    return (
        batch * height * width <= _MOST_PIXELS
        and channels >= LANES  # else most of a vector would be empty
        and side > 1  # else the blocks are small
        and side % 2 == 1
        and weight.shape[3] == side
        and geometry == ((1, 1), (side // 2, side // 2), (1, 1), 1)
        and weight.is_contiguous(memory_format=torch.channels_last)
        and _kernel() is not None
    )


def conv_weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """That of ``weight`` [O, I, side, side], in its format, where ``serves`` says yes.

    Args:
        g: gradient of the convolution's result, [B, O, H, W], channels last.
        x: what it was given, [B, I, H, W], channels last.
    """
    (batch, channels, height, width), out, side = x.shape, len(weight), weight.shape[2]
    assert g.shape == (batch, out, height, width) and weight.shape[1] == channels
    assert all(is_known(t) and t.is_contiguous(memory_format=torch.channels_last) for t in (g, x, weight))
    made, pixels = torch.empty_like(weight), batch * height * width
    room = x.new_empty(pixels * (_filled(out, _OUT) + _filled(channels, LANES)))
    threads = threads_for(pixels * out * channels * side * side)
    addresses = [t.data_ptr() for t in (g, x, made, room)]
    _kernel()(*addresses, batch, height, width, channels, out, side, threads)
    return made
