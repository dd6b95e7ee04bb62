"""Other implementations of the work of a flow, as opponents for `speed.py`. Subnets come from outside.

`PublishedFlow` is written from Xiao & Liu, "Generative Flows with Matrix Exponential" (ICML 2020): every exponential is
*formed*. It is scaled by a power of two that follows the largest norm of the whole batch, summed as a Taylor series
until the terms vanish, and squared again. The coupling does that for one n x n matrix per pixel. The published code
itself is not run.

The libraries are used the way their documentation builds image flows, on a tensor that is already squeezed. All have
ActNorm or its equivalent, a 1x1 mixing and one affine coupling per step (`pip install FrEIA normflows nflows`).

One contract for all: `forward(x) -> (z, logdet)` and `inverse(z) -> x`. The first forward in train mode initialises.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RANK, _FULL_UP_TO = 3, 24


def _norm(m: Tensor) -> float:
    """Largest row norm (sum of absolute values) in the batch, on the host."""
    return float(torch.linalg.vector_norm(m.detach(), ord=1, dim=-1).max())


def _series(m: Tensor, term: Tensor, k: int) -> Tensor:
    """I + term + term m / k + ..., until terms add nothing."""
    total = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    while _norm(term) > (1e-8 if m.dtype == torch.float32 else 1e-17):
        total, term, k = total + term, m @ term / k, k + 1
    return total


def expm(m: Tensor) -> Tensor:
    """exp of matrices [..., n, n] by one scaling for all of them, a Taylor series and squaring (their Algorithm 1)."""
    squarings = max(0, math.ceil(math.log2(max(_norm(m), 0.5))) + 1)
    total = _series(m / 2.0**squarings, m / 2.0**squarings, 2)
    for _ in range(squarings):
        total = total @ total
    return total


def phi(m: Tensor) -> Tensor:
    """sum_k m^k / (k+1)! of matrices [..., q, q], for exp(U V) = I + U phi(V U) V (their Sec. 4.2)."""
    return _series(m, m / 2, 3)


class _ActNorm(nn.Module):
    """`softplus(scale) * x + shift` with one pair of parameters per channel and pixel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.initialised = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.initialised:
            self.initialised = True
            inverse = 1 / x.detach().std(0).clamp_min(1e-3)
            self.scale.data.copy_(inverse + torch.log(-torch.expm1(-inverse)))  # the inverse of softplus
            self.shift.data.copy_(-x.detach().mean(0) * inverse)
        scale = F.softplus(self.scale)
        return scale * x + self.shift, scale.log().sum()

    def inverse(self, z: Tensor) -> Tensor:
        return (z - self.shift) / F.softplus(self.scale)


class _Mixing(nn.Module):
    """1x1 convolution with `W = exp(A)`; starts as a rotation, whose angles fill (-pi, pi)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        noise = torch.randn(channels, channels)
        self.weight = nn.Parameter((noise - noise.T) * (math.pi / torch.linalg.matrix_norm(noise - noise.T, 2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = self.weight.diagonal().sum() * (x.shape[2] * x.shape[3])
        return F.conv2d(x, expm(self.weight)[:, :, None, None]), logdet

    def inverse(self, z: Tensor) -> Tensor:
        return F.conv2d(z, expm(-self.weight)[:, :, None, None])


class PublishedCoupling(nn.Module):
    """`x2 <- exp(S(x1)) x2 + b(x1)` with exp(S) formed for every pixel; above n = 24, S = U V of rank 3.

    S is `rescale * tanh(scale * raw + shift) + reshift` with four learned numbers.

    Args:
        channels: 2n.
        net: maps [B, n, H, W] to [B, n + n^2, H, W] (or n + 2 n rank): b first.
    """

    def __init__(self, channels: int, net: nn.Module) -> None:
        super().__init__()
        self.half, self.net = channels // 2, net
        self.numbers = nn.Parameter(torch.tensor([1 / 8, 0.0, 2 / channels, 0.0]))

    def _apply_exponential(self, x1: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
        """exp(sign S) [B,H,W,n,n], b [B,n,H,W] and trace S [B]."""
        n, params = self.half, self.net(x1)
        scale, shift, rescale, reshift = self.numbers
        raw = rescale * torch.tanh(scale * params[:, n:].permute(0, 2, 3, 1).contiguous() + shift) + reshift
        if n <= _FULL_UP_TO:
            small = raw.unflatten(-1, (n, n))
            matrix = expm(sign * small)
        else:
            # tanh(0) = 0 in both factors would leave both without a gradient; hence the small constant.
            v = raw[..., : n * _RANK].unflatten(-1, (_RANK, n)) + 1e-8
            u = raw[..., n * _RANK :].unflatten(-1, (n, _RANK)) + 1e-8
            small = v @ u
            matrix = torch.eye(n, dtype=raw.dtype) + sign * (u @ phi(sign * small) @ v)
        return matrix, params[:, :n], small.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, 1)
        matrix, b, trace = self._apply_exponential(x1, 1.0)
        y2 = (matrix @ x2.permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2) + b
        return torch.cat([x1, y2], 1), trace

    def inverse(self, z: Tensor) -> Tensor:
        z1, z2 = z.chunk(2, 1)
        matrix, b, _ = self._apply_exponential(z1, -1.0)
        x2 = (matrix @ (z2 - b).permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2)
        return torch.cat([z1, x2], 1)


class PublishedFlow(nn.Module):
    """Squeeze, steps of ActNorm, mixing and coupling, half of the channels out.

    Args:
        image_shape: (C, H, W).
        depth: steps per level.
        nets: one network per coupling, first step first.
    """

    def __init__(self, image_shape: tuple[int, int, int], depth: list[int], nets: Iterable[nn.Module]) -> None:
        super().__init__()
        nets, (c, h, w) = iter(nets), image_shape
        self.levels = nn.ModuleList()
        for steps in depth:
            c, h, w = 4 * c, h // 2, w // 2
            layers = [(_ActNorm(c, h, w), _Mixing(c), PublishedCoupling(c, next(nets))) for _ in range(steps)]
            self.levels.append(nn.ModuleList(layer for step in layers for layer in step))
            c //= 2

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """[B,C,H,W] to the latents, a tensor per level, and log|det| [B]."""
        parts, total = [], x.new_zeros(x.shape[0])
        for index, layers in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for layer in layers:
                x, logdet = layer(x)
                total = total + logdet
            if index < len(self.levels) - 1:
                x, out = x.chunk(2, 1)
                parts.append(out)
        return (*parts, x), total

    def inverse(self, z: tuple[Tensor, ...]) -> Tensor:
        x = z[-1]
        for index in reversed(range(len(self.levels))):
            x = torch.cat([x, z[index]], 1) if index < len(self.levels) - 1 else x
            for layer in reversed(self.levels[index]):
                x = layer.inverse(x)
            x = F.pixel_shuffle(x, 2)
        return x


class Peer(nn.Module):
    """A library's flow, and how it encodes and decodes."""

    def __init__(self, flow: nn.Module, encode: Callable[..., Any], decode: Callable[..., Tensor]) -> None:
        super().__init__()
        self.flow, self.encode, self.decode = flow, encode, decode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(self.flow, x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.decode(self.flow, z)


def freia(c: int, h: int, w: int, nets: list[nn.Module]) -> Peer:
    """Its mixing is a fixed random rotation; its GLOWCouplingBlock would run two subnets per step."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    flow = SequenceINN(c, h, w)
    for net in nets:
        flow.append(AllInOneBlock, subnet_constructor=lambda n_in, n_out, net=net: net, permute_soft=True)
    return Peer(flow, lambda flow, x: flow(x), lambda flow, z: flow(z, rev=True)[0])


def normflows(c: int, h: int, w: int, nets: list[nn.Module]) -> Peer:
    """With the scale map "exp", cheaper than its default. Densities are its `inverse`, samples its `forward`."""
    from normflows.flows import GlowBlock

    def encode(blocks: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for block in blocks:
            x, logdet = block.inverse(x)
            total = total + logdet
        return x, total

    def decode(blocks: nn.ModuleList, z: Tensor) -> Tensor:
        for block in reversed(blocks):
            z, _ = block(z)
        return z

    blocks = nn.ModuleList(GlowBlock(c, hidden_channels=1, scale_map="exp") for _ in nets)
    for block, net in zip(blocks, nets, strict=True):
        block.flows[0].flows[1].param_map = net  # the coupling block is a split, the coupling and a merge
    return Peer(blocks, encode, decode)


class _IgnoresContext(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.net(x)


def nflows(c: int, h: int, w: int, nets: list[nn.Module]) -> Peer:
    """With its cache of the inverted matrix in eval mode."""
    warnings.filterwarnings("ignore", message=r"torch\.(lu|triangular_solve) is deprecated", category=UserWarning)
    from nflows import transforms
    from nflows.utils.torchutils import create_mid_split_binary_mask

    steps = []
    for net in nets:
        coupling = transforms.AffineCouplingTransform(
            create_mid_split_binary_mask(c), lambda n_in, n_out, net=net: _IgnoresContext(net)
        )
        steps += [transforms.ActNorm(c), transforms.OneByOneConvolution(c, using_cache=True), coupling]
    flow = transforms.CompositeTransform(steps)
    return Peer(flow, lambda flow, x: flow(x), lambda flow, z: flow.inverse(z)[0])


PEERS = {"FrEIA": freia, "normflows": normflows, "nflows": nflows}
