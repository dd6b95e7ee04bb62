"""Training in an autoencoder's latents, which are computed once per run, so that a step costs only the flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from glem_augment.codec.autoencoder import Latents
from glem_augment.codec.codec import Codec
from glem_augment.distributed import Share, progress_bar
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM
from glem_augment.training.augmentation import augment_batch

VIEWS = 4  # latents of every image, with an augmentation that has more than two outcomes
_PIXELS = 2**19  # images of so many pixels in all are encoded at a time


@torch.no_grad()
def latent_views(codec: Codec, data: ImageData, augment: Sequence[str], seed: int, device: torch.device) -> Tensor:
    """Standardised latents of every image and of augmented copies of it, float16 [N, V, C, h, w] on the CPU.

    The first view is the image. Without augmentation there is no other view. With flips alone the second view is the
    flipped image. Otherwise `augment_batch` draws the second to the last of `VIEWS` views.
    """
    count = 1 if not augment else 2 if tuple(augment) == ("flip",) else VIEWS
    batch = max(1, min(256, _PIXELS // math.prod(data.image_shape[1:])))
    generator, parts = torch.Generator().manual_seed(seed), []
    with progress_bar("encoding", total=len(data)) as bar:
        for x, _ in data.batches(np.arange(len(data)), batch):
            others = [x.flip(3)] if count == 2 else [augment_batch(x, augment, generator) for _ in range(count - 1)]
            views = [codec.encode(v.to(device)).half() for v in (x, *others)]
            parts.append(torch.stack(views, 1).contiguous().cpu())
            bar.update(len(x))
    return torch.cat(parts)


def choose_views(x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    """One random view [b, C, h, w] of each of the images x [b, V, C, h, w], the part `share` of a batch."""
    view = torch.randint(x.shape[1], (share.total,), generator=generator)[share.rows].to(x.device)
    return x[torch.arange(len(x), device=x.device), view]


def model_of_latents(model: GLEM) -> GLEM:
    """`model` with its flow and Gaussians, for latents that are encoded already."""
    named = {"name": "latents", "sha256": "", "image_shape": list(model.config.flow_shape)}
    config = replace(model.config, autoencoder=named)
    return GLEM(config, model.flow, model.latent_classes, Latents(model.codec)).to(model.device)


def model_of_images(model: GLEM, original: GLEM) -> GLEM:
    """Undoes `model_of_latents`, with the flow, Gaussians and modes that `model` has now."""
    config = replace(model.config, autoencoder=original.config.autoencoder)
    return GLEM(config, model.flow, model.latent_classes, original.codec)
