"""The networks inside couplings: from the half that passes unchanged to the parameters for the other half.

All keep one contract (`Subnet`), so a coupling need not know which one it holds:

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
    """An elementwise nonlinearity of the convolutional subnets. It may overwrite its input.

    Args:
        name: one of `ACTIVATIONS`.
    """

    def __init__(self, name: str = "elu") -> None:
        super().__init__()
        self.name = name
        self.options = {"inplace": True} if name in _IN_PLACE else {}

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x, **self.options)


def zero_convolution(in_channels: int, out_channels: int, side: int) -> nn.Conv2d:
    """A convolution that keeps the size and starts with all weights at zero."""
    layer = nn.Conv2d(in_channels, out_channels, side, padding=side // 2)
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


class Subnet(nn.Module):
    """What every subnet promises.

    `forward(x)` takes [B, in_channels, H, W], float32 (or float64), in any memory format, and returns
    [B, out_channels, H, W] of the same dtype in channels_last format. The last convolution, `tail`, runs in the
    input's dtype and starts at zero, so that a coupling starts as the identity.

    `autocast` (a dtype or None) runs the rest in reduced precision. It is a switch for training. Encoding and
    decoding must use the same value, and only float32 meets the library's round-trip promise, so models are loaded
    with it off.

    Subclasses make `tail` with `zero_convolution`, after their other weights.
    """

    tail: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.autocast: torch.dtype | None = None

    def body(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> features [B, width, H, W]."""
        raise NotImplementedError

    def last(self, h: Tensor) -> Tensor:
        """What stands before the last convolution, in its precision. May overwrite the features."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            h = self.body(x)
        return self.tail(self.last(h.to(x.dtype))).contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """`x + conv3(act(conv2(act(conv1(act(x))))))`.

    Args:
        width: channels of x.
        inner: channels between the convolutions.
        kernels: sides of the three.
        activation: see `Activation`.
    """

    def __init__(self, width: int, inner: int, kernels: tuple[int, int, int], activation: str = "elu") -> None:
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

    def __init__(self, width: int, activation: str = "elu") -> None:
        super().__init__()
        self.act = Activation(activation)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.expand(self.depthwise(x)))) + x


class ConvSubnet(Subnet):
    """conv3x3, residual blocks, activation, last convolution.

    Args:
        in_channels, out_channels: of the half that is read, and of the coupling's parameters.
        width: channels of the residual stream.
        blocks: how many.
        kind: of the blocks, one of `CONV_SUBNETS`. The last convolution is 3x3 for "residual", as published, and
            1x1 for the others, where a 3x3 one would cost more than all the blocks.
        activation: one of `ACTIVATIONS`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, blocks: int, kind: str, activation: str = "elu"
    ) -> None:
        super().__init__()
        self.act = Activation(activation)
        self.head = nn.Conv2d(in_channels, width, 3, padding=1)

        def block() -> ResidualBlock | DepthwiseBlock:
            if kind == "residual":
                return ResidualBlock(width, width, (3, 1, 3), activation)
            if kind == "bottleneck":
                return ResidualBlock(width, max(1, width // 2), (1, 3, 1), activation)
            return DepthwiseBlock(width, activation)

        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.tail = zero_convolution(width, out_channels, 3 if kind == "residual" else 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    def body(self, x: Tensor) -> Tensor:
        h = self.head(x)
        for block in self.blocks:
            h = block(h)
        return h

    def last(self, h: Tensor) -> Tensor:
        return self.act(h)


class TokenLinear(nn.Conv2d):
    """A 1x1 convolution, applied to tokens [B, T, c] as the linear map that it is, which trains faster on a CPU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over tokens [B, T, c], then a pre-norm MLP of four times the width with GELU.

    Args:
        width: channels.
        heads: of the attention. None: heads of 32 channels where 32 divides the width, else of the next larger size
            that does.
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
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, channels]
        x = x + self.attend(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


class TransformerSubnet(Subnet):
    """A small vision transformer whose tokens are the level's pixels, with learned position embedding.

    Args:
        in_channels, out_channels: of the half that is read, and of the coupling's parameters.
        width: channels of a token.
        blocks: how many.
        size: (H, W) of the level; it works for no other.
        heads: see `TransformerBlock`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, blocks: int, size: tuple[int, int], heads: int | None
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(in_channels, width, 1)
        self.position = nn.Parameter(torch.empty(1, width, *size))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.tail = zero_convolution(width, out_channels, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    def body(self, x: Tensor) -> Tensor:
        h = (self.head(x) + self.position).permute(0, 2, 3, 1)
        tokens = h.flatten(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.reshape(h.shape).permute(0, 3, 1, 2)

    def last(self, h: Tensor) -> Tensor:
        return self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_subnet(
    kind: str, in_channels: int, out_channels: int, width: int, blocks: int, size: tuple[int, int], activation: str
) -> Subnet:
    """A subnet of one of the `SUBNETS`; the classes say what the arguments are. ValueError: an unknown name."""
    if kind == "transformer":
        return TransformerSubnet(in_channels, out_channels, width, blocks, size, None)
    return ConvSubnet(in_channels, out_channels, width, blocks, kind, activation)
