"""torchvision's ColorJitter for a batch, with other numbers for each image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["color_jitter"]

LUMA = 0.2989, 0.587, 0.114  # of torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def color_jitter(x: Tensor, size: float) -> Tensor:
    """`ColorJitter(size, size, size, size / 4)` of each image of uint8 [B, C, H, W], drawn from torch's generator.

    torchvision takes an image at a time, in twice the time of a training step of a small network.
    """
    order = torch.rand(len(x), 4).argsort(1)
    factors = 1 + size * (2 * torch.rand(4, len(x), 1, 1, 1) - 1)
    y = x.float() / 255
    for place in range(4):
        for kind in range(4) if x.shape[1] == 3 else (BRIGHTNESS, CONTRAST):
            rows = (order[:, place] == kind).nonzero()[:, 0]
            y[rows] = adjusted(y[rows], kind, factors[kind, rows])
    return (y * 255).round().to(torch.uint8)


def adjusted(x: Tensor, kind: int, factor: Tensor) -> Tensor:
    """Images float [B, C, H, W] in [0, 1] with factors [B, 1, 1, 1]; the hue turns by a quarter of the factor - 1."""
    if kind == HUE:
        red, green, blue = x.unbind(1)
        high, low = x.amax(1), x.amin(1)
        chroma = high - low
        sector = torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma)
        sector = torch.where(high == red, green - blue, sector) / chroma.clamp_min(1e-12)
        place = torch.tensor([5.0, 3.0, 1.0])[:, None, None] + sector[:, None] + 6 * (factor - 1) / 4
        place = place.remainder(6)
        return high[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)
    base = torch.zeros(())
    if kind != BRIGHTNESS:
        base = (x * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True) if x.shape[1] == 3 else x
    if kind == CONTRAST:
        base = base.mean((1, 2, 3), keepdim=True)
    return (base + factor * (x - base)).clamp(0, 1)
