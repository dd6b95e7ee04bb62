"""Decoded images: which are far outside the range of images, and their conversion to it."""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 1.0  # decoded images that leave [0, 1] by more are a failure of the decoding


def near_range(decoded: Tensor, margin: float) -> Tensor:
    """Which of the images [n, C, H, W] are finite and leave [0, 1] by `margin` at most: bool [n].

    This finds numerical failures. An image within the range may still be a ghost of no class.
    """
    low, high = decoded.flatten(1).aminmax(dim=1)
    return (low >= -margin) & (high <= 1.0 + margin)  # NaN compares false


def in_range(x: Tensor) -> Tensor:
    """Decoded images in [0,1]: NaN becomes grey, other values are clamped. Differentiable."""
    return x.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Decoded images, float of any values, as uint8."""
    return in_range(x).mul_(255).round_().to(torch.uint8)
