"""Class probabilities averaged over what the flow should not care about: dequantisation noise and mirror images."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.model.glem import GLEM


@torch.no_grad()
def averaged_posterior(model: GLEM, x: Tensor, draws: int = 4, flip: bool = False, seed: int = 0) -> Tensor:
    """Mean of p(y | x + u) over draws of the noise u, and over both mirror images with ``flip``.

    Averaging the densities p(x + u | y) instead would let the one draw with the largest density decide, since they
    differ by many nats.

    Args:
        x: uint8 [N,C,H,W]. draws: 0 takes the middle of the bin, as ``model.posterior`` does.
        flip: only where mirror images keep their class.

    Returns:
        [N, K] float64 on the CPU.
    """
    if draws < 0:
        raise ValueError(f"draws must be 0 or more, got {draws}")
    g = torch.Generator().manual_seed(seed)
    out = []
    for part in x.split(256):
        views = [part, part.flip(3)] if flip else [part]
        total = torch.zeros(len(part), model.num_classes, dtype=torch.float64)
        for view in views:
            for _ in range(max(1, draws)):
                z, _ = model.encode(view, g if draws else None)
                total += torch.softmax(model.gaussians.log_prob(z).double(), 1).cpu()
        out.append(total / (len(views) * max(1, draws)))
    return torch.cat(out)
