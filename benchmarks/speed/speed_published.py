"""A flow in the manner of the published matrix-exponential flows, as an opponent for `speed.py`.

Written from the description in Xiao & Liu, "Generative Flows with Matrix Exponential" (ICML 2020): every exponential
is *formed*. It is scaled by a power of two that follows the largest norm of the whole batch (a value read back from the
device), summed as a Taylor series until the terms vanish (another read per term), and squared again. The coupling does
that for one n x n matrix per pixel, in [B, H, W, n, n] layout, and keeps every product for the backward.

The subnets come from outside, so that all sides of a comparison run the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Terms below this add nothing in float32; in float64 the series goes on to its own rounding.
_VANISHED = {torch.float32: 1e-8, torch.float64: 1e-17}
_RANK = 3
_FULL_UP_TO = 24


def _largest_norm(m: Tensor) -> float:
    """Largest row norm (sum of absolute values) in the batch, on the host."""
    return float(torch.linalg.vector_norm(m.detach(), ord=1, dim=-1).max())


def _eye(m: Tensor) -> Tensor:
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)


def expm(m: Tensor) -> Tensor:
    """exp of matrices [..., n, n] by one scaling for all of them, a Taylor series and squaring (their Algorithm 1)."""
    squarings = max(0, math.ceil(math.log2(max(_largest_norm(m), 0.5))) + 1)
    x = m / 2.0**squarings
    total, term, k = _eye(m), x, 2
    while _largest_norm(term) > _VANISHED[m.dtype]:
        total = total + term
        term = x @ term / k
        k += 1
    for _ in range(squarings):
        total = total @ total
    return total


def phi(m: Tensor) -> Tensor:
    """sum_k m^k / (k+1)! of matrices [..., q, q], for exp(U V) = I + U phi(V U) V (their Sec. 4.2)."""
    total, term, k = _eye(m), m / 2, 3
    while _largest_norm(term) > _VANISHED[m.dtype]:
        total = total + term
        term = m @ term / k
        k += 1
    return total


class PublishedActNorm(nn.Module):
    """`softplus(scale) * x + shift` with one pair of parameters per channel and pixel.

    Args:
        shape: (C, H, W).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        inverse = 1 / x.std(0).clamp_min(1e-3)
        # The inverse of softplus, without overflow.
        self.scale.copy_(inverse + torch.log(-torch.expm1(-inverse)))
        self.shift.copy_(-x.mean(0) * inverse)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = F.softplus(self.scale)
        return scale * x + self.shift, scale.log().sum()

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        scale = F.softplus(self.scale)
        return (z - self.shift) / scale, -scale.log().sum()


class PublishedMixing(nn.Module):
    """1x1 convolution with `W = exp(A)`; starts as a rotation (A skew-symmetric)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        noise = torch.randn(channels, channels)
        skew = noise - noise.T
        # The angles of a random rotation fill (-pi, pi).
        self.weight = nn.Parameter(skew * (math.pi / torch.linalg.matrix_norm(skew, 2)))

    def _apply_matrix(self, x: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        matrix = expm(self.weight if sign > 0 else -self.weight)
        logdet = sign * self.weight.diagonal().sum() * (x.shape[2] * x.shape[3])
        return F.conv2d(x, matrix[:, :, None, None]), logdet

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_matrix(x, 1.0)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_matrix(z, -1.0)


class PublishedCoupling(nn.Module):
    """`x2 <- exp(S(x1)) x2 + b(x1)` with exp(S) formed for every pixel; above n = 24, S = U V of rank 3.

    S is `rescale * tanh(scale * raw + shift) + reshift` with four learned numbers.

    Args:
        channels: 2n.
        net: maps [B, n, H, W] to [B, n + n^2, H, W] (or n + 2 n rank): b first.
    """

    def __init__(self, channels: int, net: nn.Module) -> None:
        super().__init__()
        self.half = n = channels // 2
        self.net = net
        self.scale, self.shift = nn.Parameter(torch.tensor(1 / 8)), nn.Parameter(torch.tensor(0.0))
        self.rescale, self.reshift = nn.Parameter(torch.tensor(1 / n)), nn.Parameter(torch.tensor(0.0))

    def _squash(self, raw: Tensor) -> Tensor:
        return self.rescale * torch.tanh(self.scale * raw + self.shift) + self.reshift

    def _exponential(self, raw: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """exp(sign S) [B,H,W,n,n] and trace S [B]."""
        n = self.half
        # One copy into the layout that the products want.
        raw = raw.permute(0, 2, 3, 1)
        if n <= _FULL_UP_TO:
            s = self._squash(raw.unflatten(-1, (n, n)).contiguous())
            return expm(s if sign > 0 else -s), s.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))
        # tanh(0) = 0 in both factors would leave both without a gradient; hence the small constant.
        v = self._squash(raw[..., : n * _RANK].unflatten(-1, (_RANK, n)).contiguous()) + 1e-8
        u = self._squash(raw[..., n * _RANK :].unflatten(-1, (n, _RANK)).contiguous()) + 1e-8
        small = v @ u
        matrix = _eye(small.new_empty(n, n)) + sign * (u @ phi(small if sign > 0 else -small) @ v)
        return matrix, small.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, 1)
        params = self.net(x1)
        matrix, trace = self._exponential(params[:, self.half :], 1.0)
        y2 = (matrix @ x2.permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2) + params[:, : self.half]
        return torch.cat([x1, y2], 1), trace

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = z.chunk(2, 1)
        params = self.net(z1)
        matrix, trace = self._exponential(params[:, self.half :], -1.0)
        z2 = (z2 - params[:, : self.half]).permute(0, 2, 3, 1).unsqueeze(-1)
        return torch.cat([z1, (matrix @ z2).squeeze(-1).permute(0, 3, 1, 2)], 1), -trace


class PublishedFlow(nn.Module):
    """Squeeze, steps of ActNorm, mixing and coupling, half of the channels out; the latents flat, as in this library.

    Args:
        image_shape: (C, H, W).
        depth: steps per level.
        nets: one network per coupling, first step first.
    """

    def __init__(self, image_shape: tuple[int, int, int], depth: list[int], nets: Iterable[nn.Module]) -> None:
        super().__init__()
        nets = iter(nets)
        self.levels, self.shapes = nn.ModuleList(), []
        c, h, w = image_shape
        for level, steps in enumerate(depth):
            c, h, w = 4 * c, h // 2, w // 2
            layers = nn.ModuleList()
            for _ in range(steps):
                layers += [PublishedActNorm((c, h, w)), PublishedMixing(c), PublishedCoupling(c, next(nets))]
            self.levels.append(layers)
            c = c // 2 if level < len(depth) - 1 else c
            self.shapes.append((c, h, w))

    def forward(self, x: Tensor, initialise: bool = False) -> tuple[Tensor, Tensor]:
        """[B,C,H,W] to (z [B,d], log|det| [B]); with `initialise` every ActNorm starts from what reaches it."""
        parts, total = [], x.new_zeros(x.shape[0])
        for index, layers in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for layer in layers:
                if initialise and isinstance(layer, PublishedActNorm):
                    layer.initialise(x)
                x, logdet = layer(x)
                total = total + logdet
            if index < len(self.levels) - 1:
                x, out = x.chunk(2, 1)
                parts.append(out.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), total

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Data-dependent start of every ActNorm."""
        self(x, initialise=True)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [part.unflatten(1, shape) for part, shape in zip(z.split(sizes, 1), self.shapes, strict=True)]
        x, total = parts[-1], z.new_zeros(z.shape[0])
        for index in reversed(range(len(self.levels))):
            if index < len(self.levels) - 1:
                x = torch.cat([x, parts[index]], 1)
            for layer in reversed(self.levels[index]):
                x, logdet = layer.inverse(x)
                total = total + logdet
            x = F.pixel_shuffle(x, 2)
        return x, total
