"""The networks inside couplings.

There are two kinds of blocks:

- "residual": the published block, 3x3, 1x1, 3x3 convolutions at full width (Xiao & Liu 2020);
- "bottleneck": 1x1 down to half the width, 3x3, 1x1 up, pre-activation (He et al. 2016, arXiv:1603.05027).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUBNETS = ("residual", "bottleneck")
# Their derivatives follow from their results, so they overwrite their inputs and autograd keeps one tensor, not two.
ACTIVATIONS: dict[str, type[nn.ELU | nn.ReLU]] = {"elu": nn.ELU, "relu": nn.ReLU}


class ResidualBlock(nn.Module):
    """`x + conv3(act(conv2(act(conv1(act(x))))))`, with `inner` channels between the convolutions."""

    def __init__(self, width: int, inner: int, kernels: tuple[int, int, int], activation: str) -> None:
        super().__init__()
        first, second, third = kernels
        self.act = ACTIVATIONS[activation](inplace=True)
        self.conv1 = nn.Conv2d(width, inner, first, padding=first // 2)
        self.conv2 = nn.Conv2d(inner, inner, second, padding=second // 2)
        self.conv3 = nn.Conv2d(inner, width, third, padding=third // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(x.clone()))
        h = self.conv2(self.act(h))
        return self.conv3(self.act(h)) + x


class Subnet(nn.Module):
    """A convolution, residual blocks, and a last convolution that starts at zero: a coupling starts as the identity.

    `forward(x)` maps [B, in_channels, H, W], float32 or float64, to [B, out_channels, H, W] in channels_last format.

    Two methods are switches for training. `set_dropout` leaves out a part of the channels before the last convolution,
    per image. After `set_autocast` of a dtype, the first convolution and the blocks run in it, the rest in the dtype of
    x. Encoding and decoding must use the same dtype. Only float32, with None, meets the round-trip promise.

    Args:
        kind: of the blocks, one of `SUBNETS`. The last convolution is 3x3 for "residual", as published, and 1x1
            otherwise, because 3x3 would cost more than all the blocks.
        width: channels of the residual stream.
        activation: one of `ACTIVATIONS`.
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        width: int,
        blocks: int,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self.autocast: torch.dtype | None = None
        self.dropout = 0.0
        # Sizes of the inner convolutions and of the last one, and the channels between them.
        residual = kind == "residual"
        kernels, last, inner = ((3, 1, 3), 3, width) if residual else ((1, 3, 1), 1, max(1, width // 2))
        self.head = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, inner, kernels, activation) for _ in range(blocks))
        self.act = ACTIVATIONS[activation](inplace=True)
        self.tail = nn.Conv2d(width, out_channels, last, padding=last // 2)
        for weight in self.tail.parameters():
            nn.init.zeros_(weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    def set_dropout(self, part: float) -> None:
        self.dropout = part

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        self.autocast = dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            h = self.head(x)
            for block in self.blocks:
                h = block(h)
        h = F.dropout2d(self.act(h.to(x.dtype)), self.dropout, self.dropout > 0)
        return self.tail(h).contiguous(memory_format=torch.channels_last)
