"""What the kernels of couplings are handed: they believe in shapes and layouts, so whatever comes is held to them."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that the kernels work on at a time, as in kernels/lanes.h.
LANES = 16


def images_like(x2: Tensor, params: Tensor, channels: int) -> Tensor:
    """``params`` in channels_last format.

    Raises:
        ValueError: it is not [B, channels, H, W] for x2 [n, B, H, W].
    """
    _, batch, height, width = x2.shape
    if params.shape != (batch, channels, height, width):
        raise ValueError(f"parameters {tuple(params.shape)} are not those of x2 {tuple(x2.shape)}")
    return params.contiguous(memory_format=torch.channels_last)


def for_backward(
    g: Tensor, g_logdet: Tensor, x2: Tensor, params: Tensor, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of these as a kernel takes them, and room for the gradients of x2 and ``params``.

    Raises:
        ValueError: ``params`` as above; or g and g_logdet are not like a coupling's results, [n, B, H, W] and [B].
    """
    if g.shape != x2.shape or g_logdet.shape != x2.shape[1:2]:
        raise ValueError(f"gradients {tuple(g.shape)}, {tuple(g_logdet.shape)} are not those of x2 {tuple(x2.shape)}")
    x2, params = x2.contiguous(), images_like(x2, params, channels)
    return g.contiguous(), g_logdet.contiguous(), x2, params, torch.empty_like(x2), torch.empty_like(params)
