"""Tiny models and images for the tests of this folder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment import GLEM

TINY = dict(depth=[1, 1], blocks=[1, 1], width=[6, 6])


def tiny_model(
    preset: str = "mef_tiny", shape=(1, 4, 4), classes=("a", "b", "c"), bits: int = 8, seed: int = 5, **options
) -> GLEM:
    """A model with every weight away from its start."""
    torch.manual_seed(seed)
    options = {**(TINY if preset != "identity" else {}), **options}
    model = GLEM.create(preset, shape, classes=list(classes), bits=bits, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def images(n: int = 6, shape=(1, 4, 4)) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photos(count: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth colour images uint8 [count,3,size,size] of two classes, the second of which is redder, and labels."""
    coarse = torch.rand(count, 3, 4, 4, generator=seeded(seed))
    y = torch.arange(count) % 2
    coarse[:, 0] = (coarse[:, 0] + y[:, None, None]) / 2
    return (F.interpolate(coarse, size=size, mode="bilinear") * 255).to(torch.uint8), y
