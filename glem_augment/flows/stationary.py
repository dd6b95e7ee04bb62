"""Public coordinates of latents on a grid: a fixed linear flow in which images like any others are uncorrelated.

The model is stationary. A rotation Q makes the C channels uncorrelated, and each rotated channel a has the variance v_a
and the correlation rho_a^|distance| along rows as along columns. Then the cosines B of the grid are nearly
uncorrelated, and their variances s follow from v and rho for a grid of any size, so that C (C + 3) numbers are all that
is estimated. With a power p,

    z  =  s^-p  B Q (h - c),        sorted by s, the largest first,

has variances s^(1 - 2p) under the model. p = 1/2 would whiten. Private noise falls on all coordinates alike, so p = 1/4
keeps the strong ones, which matter most, above it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glem_augment.flows.flow import Flow, register_flow
from glem_augment.precision import full_precision

POWER = 0.25
_LEAST_VARIANCE = 1e-6  # of a coordinate; keeps the inverse finite


@register_flow("stationary")
class StationaryFlow(Flow):
    """h [B,C,H,W] <-> z [B, C*H*W], the coordinates above; fixed, without parameters.

    Buffers:
        centre: [C], c.
        rotation: [C, C], Q; its rows are the rotated channels.
        variance, rho: [C], v and rho.
    """

    centre: Tensor
    rotation: Tensor
    variance: Tensor
    rho: Tensor

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        channels = image_shape[0]
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("rotation", torch.eye(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("rho", torch.zeros(channels))

    @torch.no_grad()
    def fit(self, h: Tensor) -> None:
        """Estimate the model from public numbers h [N, C, H, W] of a grid of any size."""
        h = h.double()
        self.centre.copy_(h.mean((0, 2, 3)))
        h = h - self.centre.double()[:, None, None]
        covariance = torch.einsum("nchw,ndhw->cd", h, h) / (h.numel() / h.shape[1])
        rotation = torch.linalg.eigh(covariance).eigenvectors.mT.flip(0)
        h = torch.einsum("ac,nchw->nahw", rotation, h)
        variance = h.square().mean((0, 2, 3)).clamp_min(_LEAST_VARIANCE)
        lagged = [h[:, :, 1:] * h[:, :, :-1], h[..., 1:] * h[..., :-1]]
        rho = sum((part.mean((0, 2, 3)) if part.numel() else torch.zeros(len(variance))) for part in lagged) / 2
        self.rotation.copy_(rotation)
        self.variance.copy_(variance)
        self.rho.copy_((rho / variance).clamp(0, 0.99))

    def spectrum(self) -> Tensor:
        """s [C*H*W] float64 before it is sorted, channel by channel."""
        _, height, width = self.image_shape
        pairs = zip(self.variance.double(), self.rho.double(), strict=True)
        found = [v * torch.outer(_variances(r, height), _variances(r, width)).flatten() for v, r in pairs]
        return torch.cat(found).clamp_min(_LEAST_VARIANCE)

    def prior(self) -> Tensor:
        """The variances [C*H*W] float64 of z under the model, sorted as z is."""
        return (self.spectrum() ** (1 - 2 * POWER)).sort(descending=True, stable=True).values

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        order, scale = self._order_and_scale(h)
        with full_precision(h.device.type):
            x = torch.einsum("ac,nchw->nahw", self.rotation.to(h), h - self.centre.to(h)[:, None, None])
            x = self._cosines(h, 0) @ x @ self._cosines(h, 1).mT
        z = (x.flatten(1) * scale)[:, order]
        return z, scale.double().log().sum().to(h).expand(len(h))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        order, scale = self._order_and_scale(z)
        x = (z[:, order.argsort()] / scale).unflatten(1, self.image_shape)
        with full_precision(z.device.type):
            x = self._cosines(z, 0).mT @ x @ self._cosines(z, 1)
            h = torch.einsum("ac,nahw->nchw", self.rotation.to(z), x) + self.centre.to(z)[:, None, None]
        return h, (-scale.double().log().sum()).to(z).expand(len(z))

    def _order_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        s = self.spectrum()
        order = s.sort(descending=True, stable=True).indices
        return order.to(like.device), (s**-POWER).to(like)

    def _cosines(self, like: Tensor, axis: int) -> Tensor:
        return cosines(self.image_shape[1 + axis]).to(like)


def cosines(n: int) -> Tensor:
    """The orthonormal cosine transform [n, n] float64 (DCT-II); row k is the k-th cosine."""
    place = torch.arange(n, dtype=torch.float64)
    found = torch.cos(math.pi * (place + 0.5) * place[:, None] / n) * math.sqrt(2 / n)
    found[0] /= math.sqrt(2)
    return found


def _variances(rho: Tensor, n: int) -> Tensor:
    """Variances [n] of the cosines of n numbers whose correlation is rho^|distance|."""
    place = torch.arange(n, dtype=torch.float64, device=rho.device)
    basis = cosines(n).to(rho)
    return (basis @ rho ** (place[:, None] - place).abs() @ basis.mT).diagonal()
