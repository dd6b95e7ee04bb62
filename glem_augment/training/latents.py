"""Training in an autoencoder's latents: they are computed once per run, so that a step costs only the flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from glem_augment.data.dataset import ImageData
from glem_augment.data.pixels import to_unit
from glem_augment.distributed import Share
from glem_augment.training.batches import augment_batch

VIEWS = 4  # of every image, with an augmentation that has more than two outcomes
_PIXELS = 2**19  # images of so many pixels in all are encoded at a time


class AlreadyEncoded(nn.Module):
    """Stands in for the autoencoder while the data are latents."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, h: Tensor) -> Tensor:
        return h


@torch.no_grad()
def latent_views(
    autoencoder: nn.Module, data: ImageData, augment: Sequence[str], seed: int, device: torch.device, progress: bool
) -> Tensor:
    """Latents of every image and of augmented copies of it, float16 [N, V, C, h, w] on the CPU.

    The first view is the image itself. V is 1 without augmentation, 2 for flips alone, whose second view is the flipped
    image, and otherwise `VIEWS`, of which the others are drawn by `augment_batch`.
    """
    count = 1 if not augment else 2 if tuple(augment) == ("flip",) else VIEWS
    batch = max(1, min(256, _PIXELS // math.prod(data.image_shape[1:])))
    generator, parts = torch.Generator().manual_seed(seed), []
    with tqdm(total=len(data), unit="image", desc="encoding", disable=not progress, dynamic_ncols=True) as bar:
        for x, _ in data.batches(np.arange(len(data)), batch):
            others = [x.flip(3)] if count == 2 else [augment_batch(x, augment, generator) for _ in range(count - 1)]
            views = [autoencoder.encode(to_unit(v.to(device), torch.float32)).half() for v in (x, *others)]  # type: ignore[operator]
            parts.append(torch.stack(views, 1).contiguous().cpu())
            bar.update(len(x))
    return torch.cat(parts)


def choose_views(x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    """One view [b, C, h, w] of each of the images [b, V, C, h, w], which are the part `share` of a batch."""
    view = torch.randint(x.shape[1], (share.total,), generator=generator)[share.rows].to(x.device)
    return x[torch.arange(len(x), device=x.device), view]
