"""What the kernels of couplings are handed: they believe in shapes and layouts, so whatever comes is held to them."""

from __future__ import annotations

import torch
from torch import Tensor


def images_like(x2: Tensor, params: Tensor, channels: int) -> Tensor:
    """``params`` in channels_last format.

    Raises:
        ValueError: it is not [B, channels, H, W] for x2 [n, B, H, W].
    """
    _, batch, height, width = x2.shape
    if params.shape != (batch, channels, height, width):
        raise ValueError(f"parameters {tuple(params.shape)} are not those of x2 {tuple(x2.shape)}")
    return params.contiguous(memory_format=torch.channels_last)


def check_gradients(x2: Tensor, g: Tensor, g_logdet: Tensor) -> None:
    """ValueError unless these are gradients of a coupling's results, for x2 [n, B, H, W]."""
    if g.shape != x2.shape or g_logdet.shape != x2.shape[1:2]:
        raise ValueError(f"gradients {tuple(g.shape)}, {tuple(g_logdet.shape)} are not those of x2 {tuple(x2.shape)}")
