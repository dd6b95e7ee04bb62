"""The networks inside couplings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``x + conv3x3(elu(conv1x1(elu(conv3x3(elu(x))))))`` at constant width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.elu(x))
        h = self.conv2(F.elu(h))
        return x + self.conv3(F.elu(h))


class ResidualSubnet(nn.Module):
    """conv3x3, residual blocks, conv3x3 initialised at zero (so that a coupling starts as the identity).

    Args:
        in_channels, out_channels: of the half that is read, and of the coupling's parameters.
        width: channels of the residual blocks; ``blocks``: how many of them.

    ``autocast`` (a dtype or None) runs the body in reduced precision; the last convolution stays in float32. It is a
    switch for training: encoding and decoding must use the same value, and only float32 meets the library's
    round-trip promise, so models are loaded with it off.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.tail = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)
        self.autocast: torch.dtype | None = None
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            h = self.head(x)
            for block in self.blocks:
                h = block(h)
        # contiguous(): the couplings work on planes of pixels, one per parameter.
        return self.tail(F.elu(h.to(x.dtype))).contiguous()
