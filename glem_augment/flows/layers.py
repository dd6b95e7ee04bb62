"""The contract of a flow, the identity, and the layers that have no network inside."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from glem_augment.checks import Memory, check_choice
from glem_augment.flows.coupling import Subnet
from glem_augment.precision import full_precision

# An element's spread in a few images is mostly noise. Dividing by too small a spread would blow up other images, once
# more in every step. So the channel's spread is added with the weight of so many images, and there is a floor.
_PRIOR, _MIN_STD = 30, 1e-3
RIDGE = 1e-3


class Flow(nn.Module):
    """An invertible map with a tractable log-determinant: x [B,C,H,W] <-> flat z [B, C*H*W].

    `forward(x)` returns `(z, logdet)` and `inverse(z)` returns `(x, logdet)`. Both log-determinants are [B], in nats.
    Each belongs to its direction, so the two of a round trip cancel.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape: tuple[int, int, int] = image_shape
        self.memory: Memory = "stored"
        self.autocast: torch.dtype | None = None

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def initialise(self, x: Tensor) -> None:
        """Set the layers that depend on the first batch `x` [B,C,H,W], once."""

    def set_memory(self, memory: Memory) -> None:
        """How a backward pass gets the activations: "stored" (the default: the fastest), or "reversible".

        "reversible" rebuilds them from outputs through the exact inverse. Then activation memory does not grow with
        depth; steps take about a third longer. ValueError: another word, or "reversible" for a `CustomFlow`.
        """
        check_choice("memory", memory, get_args(Memory))
        self.memory = memory

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        """Run the subnets in `dtype` (float16 or bfloat16) or, with None, in float32. See `Subnet`."""
        self.autocast = dtype
        for module in self.modules():
            if isinstance(module, Subnet):
                module.autocast = dtype


class FlatIdentity(Flow):
    """`z = flatten(x)`: the linear control that every learned flow has to beat."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.reshape(z.shape[0], *self.image_shape), z.new_zeros(z.shape[0])


class Whiten(nn.Module):
    """A fixed linear map that makes a covariance V^T diag(s^2) V + diag(r) the identity, with V [k, d] orthonormal.

    With D = diag(r)^(1/2), and U, g from the thin SVD of diag(s) V D^-1 = Q diag(t) U, g = (1 + t^2)^(-1/2),

        z = (I + U^T diag(g - 1) U) D^-1 (x - mean),        log|det| = sum log g - sum log D.

    Where V is a whole basis, k = d, there is no rest: D = I, U = V and g = 1/s, and z is the ZCA whitening of x. It is
    the best linear flow for Gaussian classes with one covariance.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    gain: Tensor
    initialised: Tensor

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("directions", torch.zeros(rank, dim))
        self.register_buffer("gain", torch.ones(rank))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, mean: Tensor, directions: Tensor, scales: Tensor, rest: Tensor) -> None:
        """Set the map from a mean [d], V [j, d], s [j] and r [d], float64, with j <= k.

        A share `RIDGE` of the mean variance is added to all variances. Without it, directions in which a few images
        hardly vary would be blown up.
        """
        d = len(rest)
        ridge = RIDGE * (scales.square().sum() + rest.sum()) / d
        if len(scales) == d:
            scale, gain = torch.ones_like(rest), (scales.square() + ridge).rsqrt()
        else:
            scale = (rest + ridge).rsqrt()
            _, length, directions = torch.linalg.svd(scales[:, None] * directions * scale, full_matrices=False)
            gain = (1 + length.square()).rsqrt()
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.directions[: len(gain)], self.gain[: len(gain)] = directions.to(self.mean), gain.to(self.mean)
        self.initialised.fill_(True)

    def logdet(self) -> Tensor:
        """log|det dz/dx| in nats, the same for all x."""
        return self.scale.log().sum() + self.gain.log().sum()

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, d]."""
        z = (x - self.mean) * self.scale
        return z + (z @ self.directions.T * (self.gain - 1)) @ self.directions

    def inverse(self, z: Tensor) -> Tensor:
        """Undoes `forward`."""
        x = z + (z @ self.directions.T * (1 / self.gain - 1)) @ self.directions
        return x / self.scale + self.mean


class WhitenedFlow(Flow):
    """A flow behind a `Whiten` of rank `rank`."""

    def __init__(self, flow: Flow, rank: int) -> None:
        super().__init__(flow.image_shape)
        self.whiten, self.flow = Whiten(math.prod(flow.image_shape), rank), flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device.type):
            h = self.whiten(x.flatten(1)).view(x.shape)
            z, logdet = self.flow(h)
            return z, logdet + self.whiten.logdet()

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            h, logdet = self.flow.inverse(z)
            return self.whiten.inverse(h.flatten(1)).view(h.shape), logdet - self.whiten.logdet()

    def initialise(self, x: Tensor) -> None:
        self.flow.initialise(self.whiten(x.flatten(1)).view(x.shape))

    def set_memory(self, memory: Memory) -> None:
        self.flow.set_memory(memory)


class ActNorm(nn.Module):
    """`z = (x + bias) * exp(log_scale)`, initialised so that z has mean 0 and a variance of about 1 on the first batch.

    The buffer `initialised` is saved, so loading a model never repeats the initialisation.

    Args:
        per: "element" for one pair of parameters per channel and pixel (MEF), "channel" for one per channel (Glow,
            Kingma & Dhariwal 2018, Sec. 3.1).
    """

    initialised: Tensor

    def __init__(self, channels: int, height: int, width: int, per: str = "element") -> None:
        super().__init__()
        shape = (channels, height, width) if per == "element" else (channels, 1, 1)
        self.per = per
        self.pixels = 1 if per == "element" else height * width  # how many each log_scale stands for
        self.bias = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set bias and scale from the batch `x` [B,C,H,W], in float64, with dead channels guarded."""
        dims = (0,) if self.per == "element" else (0, 2, 3)
        x = x.double()
        own, channel = (x.var(over, unbiased=False, keepdim=True)[0] for over in (dims, (0, 2, 3)))
        std = torch.lerp(own, channel, _PRIOR / (_PRIOR + len(x))).sqrt().clamp_min(_MIN_STD)
        self.bias.copy_(-x.mean(dims, keepdim=True)[0])
        self.log_scale.copy_(-std.log())
        self.initialised.fill_(True)


class Mixing1x1(nn.Module):
    """Invertible 1x1 convolution `z = W x` with `W = exp(A)`: log|det| is trace(A) times the pixels.

    Any A gives an invertible W whose inverse is exp(-A), so nothing is ever inverted numerically. The start is a
    random rotation (A skew-symmetric), as in Glow.

    Source: Xiao & Liu 2020, Sec. 4.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        noise = torch.randn(channels, channels)
        self.weight = nn.Parameter((noise - noise.T) * (1.5 / channels**0.5))
