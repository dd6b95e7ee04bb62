"""Features [N, m] of images, from a classifier or from an autoencoder of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glem_augment.codec.published import open_autoencoder
from glem_augment.codec.resize import resized
from glem_augment.distributed import progress_bar
from glem_augment.tensors import evaluating

__all__ = ["AUTOENCODER", "COMPONENTS", "features_and_logits", "latent_features"]

AUTOENCODER, COMPONENTS, LONGEST = "taef2", 32, 64  # of `latent_features`
_MIN_STD = 1e-3  # the least spread of a feature


@torch.no_grad()
def features_and_logits(
    network: Any, x: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Penultimate features and logits of a timm network, in eval mode.

    Args:
        x: images [N,C,H,W] of the network's size, uint8 or float in [0, 1].
        mean, std: normalise the network's input, broadcast to [B,C,H,W].

    Returns:
        features [N, m] and logits [N, K], on the CPU.
    """
    device = next(network.parameters()).device
    features, logits = [], []
    with evaluating(network):
        for part in x.split(batch_size):
            part = part.to(device)
            part = part.float() / 255 if part.dtype == torch.uint8 else part
            pooled = network.forward_head(network.forward_features((part - mean) / std), pre_logits=True)
            features.append(pooled.cpu())
            logits.append(network.get_classifier()(pooled).cpu())
    return torch.cat(features), torch.cat(logits)


@torch.no_grad()
def latent_features(real: Tensor, *sets: Tensor) -> list[Tensor]:
    """Features of colour images from the latents of TAEF2, an autoencoder of photographs that ships with the package.

    Latents have mean 0 and variance 1 per channel over the real images. Features are a latent's means over positions
    and its first 32 principal components (fewer for under 128 real images), each with variance 1 over the real images.
    Images are reduced to 64 pixels.

    Args:
        real: images uint8 [N,3,H,W] for statistics and components. sets: images of the same size.

    Returns:
        Features float32 [M, m] of each set.
    """
    module: Any = open_autoencoder(AUTOENCODER, fetch=lambda name: (Path(name), name))[0]  # it ships with the package
    shrink = min(1.0, LONGEST / max(real.shape[2:]))
    size = [8 * max(1, round(side * shrink / 8)) for side in real.shape[2:]]

    def encoded(images: Tensor) -> Tensor:
        bar = progress_bar("features", images.split(32), unit="batch")
        return torch.cat([module.encode(resized(part.float() / 255, size)) for part in bar])

    def features(h: Tensor) -> Tensor:
        h = (h - mean) / std
        return torch.cat([h.mean((2, 3)), (h.flatten(1) - centre) @ components], 1)

    h = encoded(real)
    mean, std = h.mean((0, 2, 3), keepdim=True), h.std((0, 2, 3), keepdim=True).clamp_min(_MIN_STD)
    flat = ((h - mean) / std).flatten(1)
    centre, count = flat.mean(0), min(COMPONENTS, len(real) // 4)  # later components overfit the real images
    components = torch.linalg.svd(flat - centre, full_matrices=False).Vh[:count].T
    scale = features(h).std(0).clamp_min(_MIN_STD)
    return [features(encoded(images)) / scale for images in sets]
