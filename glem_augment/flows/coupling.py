"""Coupling layers, and the networks inside them.

One half of the channels passes unchanged. A network turns this half into the parameters of a linear map of the other
half. There are three kinds of blocks in these networks:

- "residual": the published block, 3x3, 1x1, 3x3 convolutions at full width (Xiao & Liu 2020);
- "bottleneck": 1x1 down to half the width, 3x3, 1x1 up, pre-activation (He et al. 2016, arXiv:1603.05027);
- "transformer": a small pre-norm vision transformer on the level's pixels, as in Jet (Kolesnikov et al. 2024,
  arXiv:2412.15129).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glem_augment.flows.matexp import PLANES_UP_TO, expm_apply, expm_apply_low_rank

# (in_channels, out_channels) -> network
SubnetFactory = Callable[[int, int], nn.Module]
# Above this size S is the product of two thin factors: a full S would need n^2 outputs per pixel.
FULL_MATRIX_UP_TO = 24


class Coupling(nn.Module):
    """Splits the channels in halves x1, x2; x1 passes unchanged, x2 is mapped with parameters made from x1."""

    net: nn.Module

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n = channels // 2

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The map of the second half x2 [c/2, B, H, W], channel-major (see `multiscale`), or its inverse.

        `params` [B, m, H, W] come from the network. Returns the result and log|det| [B] in nats.
        """
        raise NotImplementedError

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves."""
        first, second = x.split(self.n)
        return first, second

    def merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Undoes `split`."""
        return torch.cat([x1, x2])

    def params(self, x1: Tensor) -> Tensor:
        """The network's output for the first half."""
        return self.net(x1.transpose(0, 1))

    def couple(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The whole layer on channel-major x [c, B, H, W]: ([c, B, H, W], log|det| [B])."""
        x1, x2 = self.split(x)
        y2, logdet = self.transform(x2, self.params(x1), inverse)
        return self.merge(x1, y2), logdet


class AffineCoupling(Coupling):
    """`y2 = exp(s(x1)) * x2 + b(x1)` with `s = bound * tanh(raw / bound)`; log|det| = sum of s.

    Source: Dinh et al. 2017, Sec. 3.4, here with log-scales bounded on both sides. `subnet` makes the network c/2 -> c.
    """

    def __init__(self, channels: int, subnet: SubnetFactory, bound: float = 2.0) -> None:
        super().__init__(channels)
        self.bound = float(bound)
        self.net = subnet(self.n, 2 * self.n)

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        raw, shift = params.transpose(0, 1).contiguous().split(self.n)
        # bound * tanh(raw / bound), by way of the sigmoid: on many processors tanh takes several times as long.
        log_scale = torch.sigmoid(raw * (2 / self.bound)).sub(0.5).mul_(2 * self.bound)
        logdet = log_scale.sum((0, 2, 3))
        if inverse:
            return (x2 - shift) * (-log_scale).exp(), -logdet
        return torch.addcmul(shift, x2, log_scale.exp()), logdet


def row_bounded(raw: Tensor, bound: float, dim: int) -> tuple[Tensor, Tensor]:
    """`S = bound * raw / (1 + sum |raw|)` with the sum along `dim`, and the denominators. Row sums of |S| are < bound.

    A single entry may use the whole budget of its row. So a diagonal S can scale by e^(+-bound) for every n.
    """
    denominators = 1 + raw.abs().sum(dim, keepdim=True)
    return raw * (bound / denominators), denominators


def _norm_bound(denominators: Tensor, bound: float) -> float:
    """An upper bound of `||S||_inf` over the batch, `bound` / 2^0..10: early in training S needs few terms.

    The largest row sum of S is `bound - bound / denominator`. It is read only on a CPU, which waits for no device.
    """
    if denominators.device.type != "cpu" or not denominators.numel():
        return bound
    norm = bound - bound / float(denominators.detach().max()) + 1e-6 * bound
    if not norm < bound:  # also if a network has diverged to NaN
        return bound
    return bound * 0.5 ** min(10, math.floor(math.log2(bound / norm)))


class MatExpCoupling(Coupling):
    """`y2 = exp(S(x1)) x2 + b(x1)` per pixel, S an n x n matrix with `||S||_inf <= bound`; log|det| = trace S.

    Source: Xiao & Liu 2020, Sec. 4.2. Their S is a tanh with a free scale and shift, which bounds nothing.

    Args:
        channels: c = 2n, even.
        subnet: factory of the network n -> n^2 + n (or 2 n rank + n for n > 24).
        bound: r; the number of terms of the series grows with it, see `taylor_plan`.
        rank: of the factors S = U W used for n > 24.
    """

    def __init__(self, channels: int, subnet: SubnetFactory, bound: float = 1.0, rank: int = 3) -> None:
        super().__init__(channels)
        n = self.n
        self.bound, self.rank = float(bound), int(rank)
        self.low_rank = n > FULL_MATRIX_UP_TO
        outputs = 2 * n * self.rank if self.low_rank else n * n
        self.net = subnet(n, outputs + n)
        if self.low_rank:
            # U starts at zero, so S = 0. W must not, or the gradients of both factors would vanish for ever.
            self.factor_offset = nn.Parameter(torch.randn(self.rank, n, 1, 1) / n)

    @torch.compiler.disable  # Code fused through an unrolled series would compute its terms over and over.
    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        n, q, r = self.n, self.rank, self.bound
        if n <= PLANES_UP_TO:  # Each parameter becomes a plane of pixels.
            params = params.transpose(0, 1).contiguous().transpose(0, 1)
        raw, shift = params.split([params.shape[1] - n, n], 1)
        v = x2.transpose(0, 1)
        if inverse:
            v = v - shift
        if self.low_rank:
            raw_u, raw_w = raw.split(n * q, 1)
            # ||U|| ||W|| <= r, with the root of r for each.
            u, _ = row_bounded(raw_u.unflatten(1, (n, q)), r**0.5, 2)
            w, _ = row_bounded(raw_w.unflatten(1, (q, n)) + self.factor_offset, r**0.5, 2)
            v = expm_apply_low_rank(u, w, v, r, inverse)
            logdet = torch.einsum("bnqhw,bqnhw->b", u, w)
        else:
            s, denominators = row_bounded(raw.unflatten(1, (n, n)), r, 2)
            v = expm_apply(s, v, _norm_bound(denominators, r), inverse)
            logdet = s.diagonal(dim1=1, dim2=2).sum((1, 2, 3))
        if inverse:
            return v.transpose(0, 1), -logdet
        return (v + shift).transpose(0, 1), logdet


# ---- the networks ----------------------------------------------------------------------------------------------------

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
