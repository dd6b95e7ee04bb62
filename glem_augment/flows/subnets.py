"""The networks inside couplings: from the half that passes unchanged to the parameters for the other half.

There are four kinds of blocks:

- "residual": the published block, 3x3, 1x1, 3x3 convolutions at full width (Xiao & Liu 2020);
- "bottleneck": 1x1 down to half the width, 3x3, 1x1 up, pre-activation (He et al. 2016, arXiv:1603.05027);
- "depthwise": depthwise 3x3, then 1x1 to twice the width and back, as in ConvNeXt (Liu et al. 2022, arXiv:2201.03545)
  but without normalisation, which on a CPU costs more than the block;
- "transformer": a small pre-norm vision transformer on the level's pixels, as in Jet (Kolesnikov et al. 2024,
  arXiv:2412.15129).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_SUBNETS = ("residual", "bottleneck", "depthwise")
SUBNETS = (*CONV_SUBNETS, "transformer")
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"elu": F.elu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu}
# Their derivative follows from their result. Done in place, autograd keeps one tensor instead of two.
_IN_PLACE = ("elu", "relu")
# Channels per attention head, where the width allows.
_HEAD = 32


class Activation(nn.Module):
    """An elementwise nonlinearity, one of `ACTIVATIONS`. It may overwrite its input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.options = {"inplace": True} if name in _IN_PLACE else {}

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x, **self.options)


class ResidualBlock(nn.Module):
    """`x + conv3(act(conv2(act(conv1(act(x))))))`.

    Args:
        width: channels of x.
        inner: channels between the convolutions.
        kernels: sides of the three.
        activation: see `Activation`.
    """

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


class DepthwiseBlock(nn.Module):
    """`x + conv1x1(act(conv1x1(depthwise3x3(x))))`, twice the width in between."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.act = Activation(activation)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.expand(self.depthwise(x)))) + x


class TokenLinear(nn.Conv2d):
    """A 1x1 convolution, applied to tokens [B, T, c] as a linear map, which trains faster on a CPU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over the pixels of x, then a pre-norm MLP of four times the width with GELU.

    By default a head has 32 channels, or the next larger number that divides the width.
    """

    def __init__(self, width: int, heads: int | None = None) -> None:
        super().__init__()
        self.heads = heads or next(h for h in range(max(1, width // _HEAD), 0, -1) if width % h == 0)
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

    `forward(x)` takes [B, in_channels, H, W], float32 (or float64), in any memory format. It returns
    [B, out_channels, H, W] of the same dtype in channels_last format.

    `autocast` (a dtype or None) runs the first convolution and the blocks in reduced precision; the rest runs in the
    input's dtype. It is a switch for training. Encoding and decoding must use the same value. Models are loaded with
    it off, because only float32 meets the library's round-trip promise.

    Args:
        kind: of the blocks, one of `SUBNETS`. The last convolution is 3x3 for "residual", as published. Elsewhere it is
            1x1, because 3x3 would cost more than all the blocks.
        in_channels, out_channels: of the half that is read, and of the coupling's parameters.
        width: channels of the residual stream.
        blocks: how many.
        size: (H, W) of the level; a transformer, which learns where its pixels are, works for no other.
        activation: of the convolutional kinds, one of `ACTIVATIONS`.
        heads: see `TransformerBlock`.
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
        heads: int | None = None,
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
            return TransformerBlock(width, heads) if self.transformer else DepthwiseBlock(width, activation)

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
