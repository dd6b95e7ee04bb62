"""Tiny models and images for the tests of this folder."""

from __future__ import annotations

import torch
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
