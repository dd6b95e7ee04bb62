"""The paper's RFCM: a mean and a full covariance per class, re-estimated from the latents of the training images.

For a class of n images in d dimensions (Enescu & Sahbi, ACCV 2024, Table 5: "Reestimated Full Covariance Matrix"),

    Cov_y  =  F_y^T F_y + diag(D_y),        F_y = X_y / sqrt(n - 1),

with the centred latents X_y [n, d] of the class and a ridge D_y. Samples are mu + T (F^T e + sqrt(D) e'). Scores use
Woodbury's identity, without a d x d matrix. The library's `ClassModes` is the truncated form: it keeps k modes, and the
remaining variance in D_y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glem_augment.classes.fit import REST_FLOOR

_LEAST_RIDGE = 1e-10  # with less, float64 can't tell the determinant of two images' covariance from zero


@torch.no_grad()
def fit_covariances(
    latents_of_class: Callable[[int], Tensor], num_classes: int, ridge: float = 1e-4
) -> ThinCovariances:
    """Estimate the covariances class by class, with one class in memory besides the result.

    Args:
        latents_of_class: gives the latents [n, d], n >= 2, of class y = 0 .. K - 1; called once for each.
        ridge: variance that is added in every dimension, as a share of the class's mean variance, at least 1e-10.
    """
    means, diagonals, factors = [], [], []
    for y in range(num_classes):
        latents = latents_of_class(y).double()
        mean = latents.mean(0)
        rows = (latents - mean) / math.sqrt(len(latents) - 1)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R  # the same F^T F in d rows
        means.append(mean.float())
        floor = max(REST_FLOOR, max(ridge, _LEAST_RIDGE) * float(rows.square().sum(0).mean()))
        diagonals.append(torch.full_like(means[-1], floor))
        factors.append(rows.float())
    return ThinCovariances(torch.stack(means), torch.stack(diagonals), factors)


@dataclass(repr=False)  # the tensors of 1000 classes would fill many screens
class ThinCovariances:
    """Means and diagonals D_y, float32 [K, d], and thin factors F_y, float32 [r_y, d], of all classes."""

    mean: Tensor
    diagonal: Tensor
    factors: list[Tensor]

    def to(self, device: str | torch.device) -> ThinCovariances:
        factors = [factor.to(device) for factor in self.factors]
        return ThinCovariances(self.mean.to(device), self.diagonal.to(device), factors)

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """mu_y + T (F_y^T e + sqrt(D_y) e') for y int64 [B]: float32 [B, d]. The generator is on the CPU."""
        most = max(len(factor) for factor in self.factors)
        noise = torch.randn(len(y), most + self.mean.shape[1], generator=generator).to(self.mean.device)
        along, outside = noise.split([most, self.mean.shape[1]], 1)
        z = torch.empty_like(outside)
        for c in y.unique().tolist():
            rows = (y == c).nonzero()[:, 0].to(z.device)
            factor = self.factors[c]
            spread = along[rows, : len(factor)] @ factor + outside[rows] * self.diagonal[c].sqrt()
            z[rows] = self.mean[c] + temperature * spread
        return z

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mu_y, Cov_y) under every class: [B, K] float64, nats; O(r^2 d + B r d) per class.

        Woodbury: with G = F D^-1/2, u = (z - mu) D^-1/2 and L L^T = I + G G^T, the quadratic form is
        |u|^2 - |L^-1 G u|^2, and the log-determinant is sum log D + 2 sum log L_ii.
        """
        z = z.to(self.mean.device, torch.float64)
        return torch.stack([self._log_prob_of_class(z, y) for y in range(len(self.mean))], 1)

    def _log_prob_of_class(self, z: Tensor, y: int) -> Tensor:
        diagonal = self.diagonal[y].double()
        g = self.factors[y].double() * diagonal.rsqrt()
        u = (z - self.mean[y].double()) * diagonal.rsqrt()
        low = torch.linalg.cholesky(g @ g.T + torch.eye(len(g), dtype=g.dtype, device=g.device))
        t = torch.linalg.solve_triangular(low, g @ u.T, upper=False)
        log_det = diagonal.log().sum() + 2 * low.diagonal().log().sum()
        return -0.5 * (u.square().sum(1) - t.square().sum(0) + log_det + z.shape[1] * math.log(2 * math.pi))
