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

from glem_augment.checks import check_number
from glem_augment.classes.fit import REST_FLOOR

# With less, float64 can't tell the determinant of two images' covariance from zero.
_LEAST_RIDGE = 1e-10

__all__ = ["ThinCovariances", "fit_covariances"]


@torch.no_grad()
def fit_covariances(
    latents_of_class: Callable[[int], Tensor], num_classes: int, ridge: float = 1e-4
) -> ThinCovariances:
    """Estimate the covariances class by class, with one class in memory besides the result.

    Args:
        latents_of_class: gives the latents [n, d], n >= 2, of class y = 0 .. K - 1; called once for each.
        num_classes: K.
        ridge: variance that is added in every dimension, as a share of the class's mean variance, at least 1e-10.

    Raises:
        ValueError: the ridge is negative.
    """
    ridge = check_number("ridge", ridge, 0.0, math.inf)
    means, diagonals, factors, counts = [], [], [], []
    for y in range(num_classes):
        latents = latents_of_class(y).double()
        mean = latents.mean(0)
        rows = latents - mean
        counts.append(len(rows))
        rows = rows / math.sqrt(len(rows) - 1)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R  # the same F^T F in d rows
        means.append(mean.float())
        floor = max(REST_FLOOR, max(ridge, _LEAST_RIDGE) * float(rows.square().sum(0).mean()))
        diagonals.append(torch.full_like(means[-1], floor))
        factors.append(rows.float())
    return ThinCovariances(torch.stack(means), torch.stack(diagonals), factors, torch.tensor(counts))


@dataclass(repr=False)  # the tensors of 1000 classes would fill many screens
class ThinCovariances:
    """Mean and covariance of every class, as a thin factor and a diagonal.

    Attributes:
        mean, diagonal: float32 [K, d]; `diagonal` is D_y.
        factors: K tensors F_y, float32 [r_y, d].
        counts: int64 [K], images seen.

    >>> z = torch.randn(2, 10, 6)
    >>> thin = fit_covariances(lambda y: z[y], num_classes=2)
    >>> thin.sample(torch.tensor([0, 1, 1])).shape, thin.log_prob(z[0]).shape
    (torch.Size([3, 6]), torch.Size([10, 2]))
    """

    mean: Tensor
    diagonal: Tensor
    factors: list[Tensor]
    counts: Tensor

    @property
    def num_classes(self) -> int:
        """K."""
        return self.mean.shape[0]

    @property
    def dim(self) -> int:
        """d."""
        return self.mean.shape[1]

    def to(self, device: str | torch.device) -> ThinCovariances:
        """A copy on `device`."""
        factors = [factor.to(device) for factor in self.factors]
        return ThinCovariances(self.mean.to(device), self.diagonal.to(device), factors, self.counts.to(device))

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """mu_y + T (F_y^T e + sqrt(D_y) e').

        Args:
            y: int64 [B].
            temperature: factor on the standard deviation, >= 0.
            generator: on the CPU, so that one seed gives the same latents on every device.

        Returns:
            [B, d] float32.
        """
        check_number("temperature", temperature, 0.0, math.inf)
        y = torch.as_tensor(y).cpu()
        if y.numel() and not (0 <= int(y.min()) and int(y.max()) < self.num_classes):
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, got {int(y.min())}..{int(y.max())}")
        most = max(len(factor) for factor in self.factors)
        noise = torch.randn(len(y), most + self.dim, generator=generator).to(self.mean.device)
        along, outside = noise.split([most, self.dim], 1)
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
        return torch.stack([self._log_prob_of_class(z, y) for y in range(self.num_classes)], 1)

    def _log_prob_of_class(self, z: Tensor, y: int) -> Tensor:
        diagonal = self.diagonal[y].double()
        g = self.factors[y].double() * diagonal.rsqrt()
        u = (z - self.mean[y].double()) * diagonal.rsqrt()
        low = torch.linalg.cholesky(g @ g.T + torch.eye(len(g), dtype=g.dtype, device=g.device))
        t = torch.linalg.solve_triangular(low, g @ u.T, upper=False)
        log_det = diagonal.log().sum() + 2 * low.diagonal().log().sum()
        return -0.5 * (u.square().sum(1) - t.square().sum(0) + log_det + self.dim * math.log(2 * math.pi))
