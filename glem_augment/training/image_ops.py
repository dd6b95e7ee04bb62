"""The paper's training augmentations on whole batches: flip, pad + crop, rotation, colour jitter.

Own code because torchvision's transforms draw one set of parameters per call, hence one per batch here.
Magnitudes are those of Ardizzone et al. 2020 (IB-INN), which the paper follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.devices import move

PAD_SHARE = 1 / 8
ROTATION_DEGREES = 12.0
JITTER = 0.1


def augment_batch(x: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Augment every image with parameters of its own.

    Args:
        x: uint8 [B,C,H,W]; not changed.
        names: any of "flip" (horizontal), "crop" (shift by up to an eighth of the side, edges repeated), "rotate"
            (up to 12 degrees) and "jitter" (brightness, contrast and, for RGB, saturation by up to 10 %).
        generator: CPU generator of all parameters.

    Returns:
        uint8 [B,C,H,W]; rounded, so that what dequantisation assumes stays true.
    """
    if not names:
        return x
    batch, _, height, width = x.shape

    def draw(*shape: int) -> Tensor:
        return move(torch.rand(shape, generator=generator), x.device) * 2 - 1

    if "flip" in names:
        x = torch.where((draw(batch) > 0)[:, None, None, None], x.flip(3), x)
    if "crop" in names:
        shift_y, shift_x = draw(batch) * height * PAD_SHARE, draw(batch) * width * PAD_SHARE
        rows = (torch.arange(height, device=x.device) + shift_y.round().long()[:, None]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + shift_x.round().long()[:, None]).clamp(0, width - 1)
        index = torch.arange(batch, device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if not {"rotate", "jitter"} & set(names):
        return x.contiguous()
    y = x.float()
    if "rotate" in names:
        angle = draw(batch) * math.radians(ROTATION_DEGREES)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        aspect = height / width
        theta = torch.stack([torch.stack([cos, -sin * aspect, zero], 1), torch.stack([sin / aspect, cos, zero], 1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        y = F.grid_sample(y, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if "jitter" in names:
        factors = 1 + JITTER * draw(3, batch)[:, :, None, None, None]
        y = y * factors[0]
        mean = y.mean((1, 2, 3), keepdim=True)
        y = mean + (y - mean) * factors[1]
        if x.shape[1] == 3:
            grey = (y * y.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
            y = grey + (y - grey) * factors[2]
    return y.round_().clamp_(0, 255).to(torch.uint8)
