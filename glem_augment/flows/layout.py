"""A squeeze of channel-major tensors, see ``level``."""

from __future__ import annotations

from torch import Tensor


def squeeze(x: Tensor, side: int = 2) -> Tensor:
    """[C, B, H, W] -> [side^2 C, B, H/side, W/side], channels in the order of ``layers.Squeeze``."""
    c, b, h, w = x.shape
    tall, wide = h // side, w // side
    return x.view(c, b, tall, side, wide, side).permute(0, 3, 5, 1, 2, 4).reshape(side * side * c, b, tall, wide)


def unsqueeze(x: Tensor, side: int = 2) -> Tensor:
    """Inverse of ``squeeze``."""
    c, b, h, w = x.shape
    c //= side * side
    return x.view(c, side, side, b, h, w).permute(0, 3, 4, 1, 5, 2).reshape(c, b, side * h, side * w)


def rows(x: Tensor) -> Tensor:
    """[C, B, H, W] -> [B, C * H * W]: every image's numbers in a row, as they lie in a latent."""
    return x.transpose(0, 1).flatten(1)
