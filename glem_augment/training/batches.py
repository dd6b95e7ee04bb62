"""The images of a step: the split, the order of an epoch, augmentation, and an autoencoder's latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from glem_augment.data.dataset import ImageData
from glem_augment.data.pixels import LUMA, to_unit
from glem_augment.devices import send
from glem_augment.distributed import Share
from glem_augment.errors import DataError

G_FRACTION, MAX_HELD_OUT = 0.1, 2000
# Magnitudes of the augmentations, from Ardizzone et al. 2020 (IB-INN), whom the paper follows.
PAD_SHARE, ROTATION_DEGREES, JITTER = 1 / 8, 12.0, 0.1
VIEWS = 4  # latents of every image, with an augmentation that has more than two outcomes
_PIXELS = 2**19  # images of so many pixels in all are encoded at a time


@dataclass(frozen=True)
class Split:
    """Disjoint, sorted indices of the images that train the flow (D_nf), fit the Gaussians (D_g) and only measure."""

    nf: np.ndarray
    g: np.ndarray
    val: np.ndarray


def stratified_split(targets: np.ndarray, num_classes: int, val_fraction: float, seed: int) -> Split:
    """Split every class in the same proportions (GLEM, Sec. 4.3: |D_g| = 0.1 |D|).

    Every class has at least one image in `nf` and in `g`. A class of three images or more has one in `val`.

    `val_fraction`, the share of each class for `val`, is lowered so that `val` has about `MAX_HELD_OUT` images at most.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    counts = np.bincount(targets, minlength=num_classes)
    if counts.min() < 2:
        few = np.nonzero(counts < 2)[0][:5].tolist()
        raise DataError(
            f"classes {few} have fewer than the 2 images that a Gaussian needs: add images, or leave these classes out"
        )
    scale = min(1.0, MAX_HELD_OUT / max(1.0, val_fraction * len(targets)))
    parts: dict[str, list[np.ndarray]] = {"nf": [], "g": [], "val": []}
    for index in range(num_classes):
        members = rng.permutation(np.nonzero(targets == index)[0])
        n = len(members)
        n_val = min(max(1, round(n * val_fraction * scale)), n - 2) if val_fraction > 0 and n >= 3 else 0
        n_g = min(max(1, round((n - n_val) * G_FRACTION)), n - n_val - 1)
        parts["val"].append(members[:n_val])
        parts["g"].append(members[n_val : n_val + n_g])
        parts["nf"].append(members[n_val + n_g :])
    return Split(**{name: np.sort(np.concatenate(value)).astype(np.int64) for name, value in parts.items()})


def epoch_order(indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [steps, B] of the batches of one epoch, a function of seed and epoch alone.

    So a resumed run takes the batches that the killed run would have taken. The incomplete last batch is dropped; a set
    that is smaller than a batch is one batch.
    """
    order = np.random.default_rng([seed, 0xE90C, epoch]).permutation(indices)
    batch = min(batch_size, len(order))
    steps = len(order) // batch
    return order[: steps * batch].reshape(steps, batch)


def augment_batch(x: Tensor, names: Sequence[str], generator: torch.Generator, share: Share | None = None) -> Tensor:
    """The paper's training augmentations of uint8 images [B,C,H,W], with other parameters for every image.

    Torchvision's transforms would draw one set of parameters for the whole batch.

    Args:
        names: any of "flip" (horizontal); "crop" (shift by up to an eighth of the side, edges repeated); "rotate" (up
            to 12 degrees); "jitter" (brightness, contrast and, for RGB, saturation by up to 10 %).
        share: the part of a batch that x is, see `draw_noise`.

    Returns:
        uint8 [B,C,H,W]; rounded, because dequantisation assumes levels.
    """
    if not names:
        return x
    batch, _, height, width = x.shape
    first, last, total = share or (0, batch, batch)

    def draw(*shape: int) -> Tensor:
        return send(torch.rand(*shape, total, generator=generator)[..., first:last] * 2 - 1, x.device)

    if "flip" in names:
        x = torch.where((draw() > 0)[:, None, None, None], x.flip(3), x)
    if "crop" in names:
        shift_y, shift_x = draw() * height * PAD_SHARE, draw() * width * PAD_SHARE
        rows = (torch.arange(height, device=x.device) + shift_y.round().long()[:, None]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + shift_x.round().long()[:, None]).clamp(0, width - 1)
        index = torch.arange(batch, device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if not {"rotate", "jitter"} & set(names):
        return x.contiguous()
    y = x.float()
    if "rotate" in names:
        angle = draw() * math.radians(ROTATION_DEGREES)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        aspect = height / width
        theta = torch.stack([torch.stack([cos, -sin * aspect, zero], 1), torch.stack([sin / aspect, cos, zero], 1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        y = F.grid_sample(y, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if "jitter" in names:
        factors = 1 + JITTER * draw(3)[:, :, None, None, None]
        y = y * factors[0]
        mean = y.mean((1, 2, 3), keepdim=True)
        y = mean + (y - mean) * factors[1]
        if x.shape[1] == 3:
            grey = (y * y.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
            y = grey + (y - grey) * factors[2]
    return y.round_().clamp_(0, 255).to(torch.uint8)


# ---- an autoencoder's latents, computed once per run, so that a step costs only the flow ----------------------------


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

    The first view is the image. Without augmentation there is no other view. With flips alone the second view is the
    flipped image. Otherwise `augment_batch` draws the second to the last of `VIEWS` views.
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
    """One random view [b, C, h, w] of each of the images x [b, V, C, h, w], the part `share` of a batch."""
    view = torch.randint(x.shape[1], (share.total,), generator=generator)[share.rows].to(x.device)
    return x[torch.arange(len(x), device=x.device), view]
