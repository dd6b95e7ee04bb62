"""Augmentation of a model's training images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.codec.codec import LUMA
from glem_augment.distributed import Share
from glem_augment.tensors import send

# Magnitudes from Ardizzone et al. 2020 (IB-INN), whom the paper follows.
PAD, ROTATION_DEGREES, JITTER = 1 / 8, 12.0, 0.1


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
        shift_y, shift_x = draw() * height * PAD, draw() * width * PAD
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
