"""The latents of a run's images, which are encoded once per run, so that a step costs only the flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glem_augment.codec.codec import Codec
from glem_augment.distributed import is_primary, progress_bar
from glem_augment.images.dataset import ImageData
from glem_augment.io import atomic_write
from glem_augment.training.augmentation import augment_batch
from glem_augment.training.batches import seeded

LATENTS = "latents.pt"  # in the folder of a run, until the run ends
_PIXELS = 2**19  # images of so many pixels in all are encoded at a time


@torch.no_grad()
def latent_views(
    codec: Codec, data: ImageData, augment: Sequence[str], views: int, seed: int, device: torch.device
) -> Tensor:
    """Standardised latents of every image and of augmented copies of it, float16 [N, V, C, h, w] on the CPU.

    The first view is the image. Without augmentation there is no other view. With flips alone the second view is the
    flipped image. Otherwise `augment_batch` draws the second to the last of `views`.
    """
    count = 1 if not augment else 2 if tuple(augment) == ("flip",) else views
    batch = max(1, min(256, _PIXELS // math.prod(data.image_shape[1:])))
    generators, parts = [seeded(seed, 8, view) for view in range(count)], []
    with progress_bar("encoding", total=len(data)) as bar:
        for x, _ in data.batches(np.arange(len(data)), batch):
            flipped = tuple(augment) == ("flip",)
            others = [x.flip(3)] if flipped else [augment_batch(x, augment, each) for each in generators[1:]]
            parts.append(torch.stack([codec.encode(v.to(device)).half().cpu() for v in (x, *others)], 1))
            bar.update(len(x))
    return torch.cat(parts)


def kept_views(path: Path, made_of: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """The latents in the file `path`, or, if it has none that are made of the same, the result of `make`, kept there.

    Encoding may take hours, which a stopped run would lose. `made_of` identifies the images and how they are encoded.
    """
    if path.is_file():
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if found["made_of"] == made_of:
            return found["views"]
    views = make()
    if is_primary():
        with atomic_write(path) as file:
            torch.save({"made_of": made_of, "views": views}, file)
    return views
