"""What a run measures on held-out images, and what it says about the Gaussians."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from glem_augment.flows import MultiscaleFlow
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.model.glem import GLEM


@contextmanager
def float32_subnets(model: GLEM) -> Iterator[None]:
    """Measure in float32 even where the flow trains in bf16, since that is how it will be used."""
    flow = model.flow if isinstance(model.flow, MultiscaleFlow) else None
    before = flow.autocast if flow is not None else None
    if before is not None:
        flow.set_autocast(None)
    try:
        yield
    finally:
        if before is not None:
            flow.set_autocast(before)


@torch.no_grad()
def held_out(model: GLEM, batches: Iterable[tuple[Tensor, Tensor]], generator: torch.Generator) -> dict[str, float]:
    """Number of images, NF accuracy, and bits/dim given the class, with dequantisation noise from ``generator``."""
    images, right, bits = 0, 0, 0.0
    with float32_subnets(model):
        for x, y in batches:
            scores = model.log_prob_per_class(x, generator)
            right += int((scores.argmax(1) == y).sum())
            bits += float(-scores.gather(1, y[:, None]).double().sum()) / (model.dim * math.log(2))
            images += len(y)
    return {"val_images": images, "val_accuracy": right / images, "val_bits_per_dim": bits / images}


@torch.no_grad()
def gaussian_state(gaussians: ClassGaussians) -> dict[str, float]:
    """max |mu|, least and mean pairwise KLD in nats, and the share of saturated variances."""
    k = gaussians.num_classes
    kld = gaussians.kld_matrix()
    pairs = kld[~torch.eye(k, dtype=torch.bool, device=kld.device)] if k > 1 else kld.flatten()
    return {
        "mu_max": float(gaussians.mu.abs().max()),
        "kld_min": float(pairs.min()),
        "kld_mean": float(pairs.mean()),
        "saturated_variances": float(gaussians.saturated_share()),
    }
