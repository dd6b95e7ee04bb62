"""Statistics of the latents of a run's images.

For diagonal Gaussians the summed NLL depends on the latents only through n_y, sum z and sum z^2 of each class. So one
pass over D_g serves any number of gradient steps on the Gaussians, each in O(K d). The same pass records the range of
the per-sample NLL.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.distributed import add_up, rank, world_size

SHRINKAGE = 10  # number of images at which a class's first mean and variance are half shrunk


class LatentStatistics:
    """Sufficient statistics of one pass over D_g, in float64.

    Attributes:
        count [K], total [K,d], square [K,d]: number of images, sum z and sum z^2 per class.
        nll_low, nll_high: range of the per-sample NLL in nats, log-determinant included.
    """

    def __init__(self, num_classes: int, dim: int, device: torch.device | str = "cpu") -> None:
        zeros: dict[str, Any] = dict(dtype=torch.float64, device=device)
        self.count = torch.zeros(num_classes, **zeros)
        self.total = torch.zeros(num_classes, dim, **zeros)
        self.square = torch.zeros(num_classes, dim, **zeros)
        self.nll_low = torch.full((), math.inf, **zeros)
        self.nll_high = torch.full((), -math.inf, **zeros)

    def add(self, z: Tensor, y: Tensor, nll: Tensor) -> None:
        """Take in a batch: z [B,d], y int64 [B], nll [B] nats."""
        wide = z.double()
        self.count += torch.bincount(y, minlength=len(self.count))
        self.total.index_add_(0, y, wide)
        self.square.index_add_(0, y, wide * wide)
        self.nll_low = torch.minimum(self.nll_low, nll.min().double())
        self.nll_high = torch.maximum(self.nll_high, nll.max().double())

    def add_ranks(self) -> None:
        """Add up the sums, and join the ranges, over all ranks."""
        ranges = torch.zeros(2, world_size(), dtype=torch.float64, device=self.count.device)
        ranges[:, rank()] = torch.stack([self.nll_low, self.nll_high])
        add_up(self.count, self.total, self.square, ranges)
        self.nll_low, self.nll_high = ranges[0].min(), ranges[1].max()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [K,d] of each class's latents."""
        n = self.count[:, None]
        mean = self.total / n
        return mean, (self.square / n - mean * mean).clamp_min(0)

    def balanced_nll(self, gaussians: ClassGaussians) -> Tensor:
        """Mean over the classes of their mean -log N(z; mu_y, sigma_y^2), nats; differentiable.

        Classes weigh the same. Otherwise the repulsion would outweigh the likelihood of rare classes.
        """
        n = self.count[:, None]
        mu, var = gaussians.mu.double(), gaussians.variance().double()
        spread = self.square / n - 2 * mu * self.total / n + mu * mu
        per_class = 0.5 * (var.log() + spread / var).sum(1) + 0.5 * gaussians.dim * math.log(2 * math.pi)
        return per_class.mean()

    @torch.no_grad()
    def start_of_new_flow(self, gaussians: ClassGaussians) -> None:
        """Set the means to shrunk class means, at the scale of the Gaussians."""
        # ActNorm leaves unit variance, and the flow will shrink to the Gaussians' a/2 + c. The means of a few images
        # are mostly noise, which would set classes hundreds of nats apart. Rare pixels have extreme means, which
        # would dominate the first steps.
        means = self.total / (self.count[:, None] + SHRINKAGE)
        gaussians.mu.copy_(means.clamp(-2, 2) * gaussians.variance().mean().sqrt())

    @torch.no_grad()
    def start_of_trained_flow(self, gaussians: ClassGaussians) -> None:
        """Set the class means, and the variances shrunk towards the pooled one: a class may have few images."""
        means, spread = self.moments()
        gaussians.mu.copy_(means)
        n = self.count[:, None]
        pooled = (spread * n).sum(0) / n.sum()
        gaussians.set_variance((n * spread + SHRINKAGE * pooled) / (n + SHRINKAGE))
