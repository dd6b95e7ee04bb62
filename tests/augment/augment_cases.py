"""Small images, labels and a flow whose latents are its pixels, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment import GLEM

CLASSES = ["ant", "bee", "cat", "dog"]


def images(n: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, channels, size, size), generator=g, dtype=torch.uint8)


def labels(n: int, classes: int = 4) -> Tensor:
    return torch.arange(n) % classes


def make_model(channels: int = 1, classes: list[str] = CLASSES, rank: int = 64, size: int = 8) -> GLEM:
    """The identity (z = x - 1/2) with modes of random images, and class means 0.1 to 0.7 apart."""
    model = GLEM.create("identity", (channels, size, size), classes=classes)
    n = 80 * len(classes)
    model.fit_modes((images(n, channels, size), labels(n, len(classes))), rank=rank)
    steps = 0.1 * torch.tensor([0.0, 1.0, 3.0, 7.0])[torch.arange(len(classes)) % 4]
    model.gaussians.mu.data.copy_(steps[:, None].expand_as(model.gaussians.mu))
    return model.eval().requires_grad_(False)
