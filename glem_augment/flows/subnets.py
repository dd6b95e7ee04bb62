"""The networks inside couplings.

There are three kinds of blocks:

- "residual": the published block, 3x3, 1x1, 3x3 convolutions at full width (Xiao & Liu 2020);
- "bottleneck": 1x1 down to half the width, 3x3, 1x1 up, pre-activation (He et al. 2016, arXiv:1603.05027);
- "transformer": a small pre-norm vision transformer on the level's pixels, as in Jet (Kolesnikov et al. 2024,
  arXiv:2412.15129).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_SUBNETS = ("residual", "bottleneck")
SUBNETS = (*CONV_SUBNETS, "transformer")
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"elu": F.elu, "relu": F.relu}


class Activation(nn.Module):
    """An elementwise nonlinearity, one of `ACTIVATIONS`, which overwrites its input.

    Their derivatives follow from their results, so that autograd keeps one tensor instead of two.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x, inplace=True)


class ResidualBlock(nn.Module):
    """`x + conv3(act(conv2(act(conv1(act(x))))))`, with `inner` channels between the convolutions."""

    def __init__(self, width: int, inner: int, kernels: tuple[int, int, int], activation: str) -> None:
        super().__init__()
        first, second, third = kernels
        self.act = Activation(activation)
        self.conv1 = nn.Conv2d(width, inner, first, padding=first // 2)
        self.conv2 = nn.Conv2d(inner, inner, second, padding=second // 2)
        self.conv3 = nn.Conv2d(inner, width, third, padding=third // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(x.clone()))
        h = self.conv2(self.act(h))
        return self.conv3(self.act(h)) + x


class TokenLinear(nn.Conv2d):
    """A 1x1 convolution, applied to tokens [B, T, c] as a linear map, which trains faster on a CPU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over the pixels of x, then a pre-norm MLP of four times the width with GELU.

    A head has 32 channels, or the next larger number that divides the width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, width // 32), 0, -1) if width % h == 0)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = TokenLinear(width, 3 * width)
        self.attend = TokenLinear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = TokenLinear(width, 4 * width)
        self.project = TokenLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        qkv = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, channels]
        tokens = tokens + self.attend(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        tokens = tokens + self.project(F.gelu(self.expand(self.norm2(tokens))))
        return tokens.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


class Subnet(nn.Module):
    """A convolution, residual blocks, and a last convolution that starts at zero: a coupling starts as the identity.

    `forward(x)` maps [B, in_channels, H, W], float32 or float64, to [B, out_channels, H, W] in channels_last format.

    `autocast` (a dtype or None) is a switch for training: the first convolution and the blocks run in that dtype, the
    rest in the dtype of x. Encoding and decoding must use the same value. Only float32 meets the round-trip promise.

    Args:
        kind: of the blocks, one of `SUBNETS`. The last convolution is 3x3 for "residual", as published, and 1x1
            otherwise, because 3x3 would cost more than all the blocks.
        width: channels of the residual stream.
        size: (H, W) of the level, to which a transformer is bound by its learned positions.
        activation: of the convolutional kinds, one of `ACTIVATIONS`.
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        width: int,
        blocks: int,
        size: tuple[int, int],
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self.autocast: torch.dtype | None = None
        self.transformer = kind == "transformer"
        first, last = 1 if self.transformer else 3, 3 if kind == "residual" else 1
        self.head = nn.Conv2d(in_channels, width, first, padding=first // 2)
        if self.transformer:
            self.position = nn.Parameter(torch.empty(1, width, *size))
            nn.init.trunc_normal_(self.position, std=0.02)

        def block() -> nn.Module:
            if kind == "residual":
                return ResidualBlock(width, width, (3, 1, 3), activation)
            if kind == "bottleneck":
                return ResidualBlock(width, max(1, width // 2), (1, 3, 1), activation)
            return TransformerBlock(width)

        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        if self.transformer:
            self.norm = nn.LayerNorm(width)
        else:
            self.act = Activation(activation)
        self.tail = nn.Conv2d(width, out_channels, last, padding=last // 2)
        for weight in self.tail.parameters():
            nn.init.zeros_(weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            h = self.head(x) + self.position if self.transformer else self.head(x)
            for block in self.blocks:
                h = block(h)
        h = h.to(x.dtype)
        h = self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.transformer else self.act(h)
        return self.tail(h).contiguous(memory_format=torch.channels_last)
