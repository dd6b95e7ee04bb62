"""Decoded images: which of them are plausible, and their conversion to the range of images."""

from __future__ import annotations

from torch import Tensor

from glem_augment.codec.pixel_range import UINT8, PixelRange

MARGIN = 1.0  # decoded images that leave their range by more than its width are not plausible


def plausible(decoded: Tensor, margin: float, pixel_range: PixelRange = UINT8) -> Tensor:
    """Which of the images [n, C, H, W] are finite and leave the range by `margin` times its width at most: bool [n]."""
    (bottom, top), (low, high) = pixel_range.limits, decoded.flatten(1).aminmax(dim=1)
    away = margin * (top - bottom)
    return (low >= bottom - away) & (high <= top + away)  # NaN compares false


def in_range(x: Tensor) -> Tensor:
    """Decoded images in [0,1]: NaN becomes grey, other values are clamped. Differentiable."""
    return UINT8.clamp(x)


def to_uint8(x: Tensor) -> Tensor:
    """Decoded images, float of any values, as uint8."""
    return UINT8.from_floats(x)
