"""Decoded images cropped and resized to one size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_LONGEST = 16  # an image is cropped to this many times the needed length before it is resized


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize an image [C,H,W] so that it just covers height x width, then crop the centre."""
    h, w = pixels.shape[-2:]
    scale = max(height / h, width / w)
    # Without this crop, resizing an image of 1 x 50 million pixels would take gigabytes.
    h = min(h, math.ceil(_LONGEST * height / scale))
    w = min(w, math.ceil(_LONGEST * width / scale))
    pixels = F.center_crop(pixels, [h, w])
    target = [max(height, round(h * scale)), max(width, round(w * scale))]
    if target != [h, w]:
        if pixels.dtype == torch.uint16:  # torchvision truncates it
            pixels = F.resize(pixels.float(), target, antialias=True).round().to(pixels.dtype)
        else:
            pixels = F.resize(pixels, target, antialias=True)
    return F.center_crop(pixels, [height, width])
