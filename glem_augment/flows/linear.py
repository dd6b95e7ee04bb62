"""Fixed linear maps: the identity, or a whitening before another flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glem_augment.errors import DataError
from glem_augment.flows.flow import Flow, register_flow
from glem_augment.precision import full_precision

# Of equal images whose numbers differ by rounding, the variance is below the second number.
RIDGE, _LEAST_VARIANCE = 1e-3, 1e-8


@register_flow("identity")
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

        `RIDGE` times the mean variance is added to all variances. Without it, directions in which a few images
        hardly vary would be blown up. DataError: there is no variance.
        """
        d = len(rest)
        variance = (scales.square().sum() + rest.sum()) / d
        if not float(variance) > _LEAST_VARIANCE:
            raise DataError("whitening needs images of a class that differ, and these are equal: leave whiten out")
        ridge = RIDGE * variance
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
