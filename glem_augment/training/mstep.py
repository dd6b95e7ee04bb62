"""The M-step: the Gaussians are moved with the flow fixed (GLEM, Algorithm 1).

For diagonal Gaussians the summed NLL depends on the latents only through n_y, sum z and sum z^2 of each class, so one
pass over D_g serves any number of gradient steps at O(K d). Two things need more: the range of the per-sample NLL and,
with a cross-entropy term, the latents themselves; both are recorded in the same pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.training.config import TrainConfig


@dataclass
class LatentStatistics:
    """Sufficient statistics of one pass over D_g, in float64.

    Attributes:
        count [K], total [K,d], square [K,d]: images, sum z, sum z^2 per class.
        nll_low, nll_high: range of the per-sample NLL in nats, log-determinant included.
        latents, labels: kept when ``keep_latents``.
    """

    num_classes: int
    dim: int
    keep_latents: bool = False
    device: torch.device | str = "cpu"
    latents: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        zeros = dict(dtype=torch.float64, device=self.device)
        self.count = torch.zeros(self.num_classes, **zeros)
        self.total = torch.zeros(self.num_classes, self.dim, **zeros)
        self.square = torch.zeros(self.num_classes, self.dim, **zeros)
        self.nll_low = torch.full((), math.inf, **zeros)
        self.nll_high = torch.full((), -math.inf, **zeros)

    def add(self, z: Tensor, y: Tensor, nll: Tensor) -> None:
        """z [B,d], y int64 [B], nll [B] nats."""
        wide = z.double()
        self.count += torch.bincount(y, minlength=self.num_classes)
        self.total.index_add_(0, y, wide)
        self.square.index_add_(0, y, wide * wide)
        self.nll_low = torch.minimum(self.nll_low, nll.min().double())
        self.nll_high = torch.maximum(self.nll_high, nll.max().double())
        if self.keep_latents:
            self.latents.append(z)
            self.labels.append(y)

    def kept(self) -> tuple[Tensor, Tensor]:
        """The kept latents [N,d] and labels [N], joined once."""
        if len(self.latents) > 1:
            self.latents, self.labels = [torch.cat(self.latents)], [torch.cat(self.labels)]
        return self.latents[0], self.labels[0]

    def balanced_nll(self, gaussians: ClassGaussians) -> Tensor:
        """Mean over the classes present of their mean -log N(z; mu_y, sigma_y^2), nats; classes weigh the same,
        or rare ones would run away. Differentiable."""
        present = self.count > 0
        n = self.count.clamp_min(1)[:, None]
        mu, var = gaussians.mu.double(), gaussians.variance().double()
        spread = self.square / n - 2 * mu * self.total / n + mu * mu
        per_class = 0.5 * (var.log() + spread / var).sum(1) + 0.5 * self.dim * math.log(2 * math.pi)
        return per_class[present].mean()

    @torch.no_grad()
    def most_likely(self, gaussians: ClassGaussians, mu: bool = True, variance: bool = True) -> None:
        """Set the means and variances, those that are asked for, to their maximum of ``balanced_nll``, as far as psi
        and the lower bound allow. Classes without images stay as they are."""
        rows = self.count > 0
        n = self.count[rows][:, None]
        mean, square = self.total[rows] / n, self.square[rows] / n
        if mu:
            gaussians.mu[rows] = mean.to(gaussians.mu.dtype)
        if variance:
            about = gaussians.mu[rows].double()
            gaussians.set_variance((square - 2 * about * mean + about * about).clamp_min(0), rows)


def value_range(low: float, high: float) -> float:
    """R = max - min + 0.2 (|max| + |min|), the authors' normaliser."""
    return high - low + 0.2 * (abs(high) + abs(low))


def saturating_kld(gaussians: ClassGaussians, scale: float) -> Tensor:
    """Mean over pairs of ``scale * (1 - exp(-KLD / scale))``, nats: grows with the KLD at first, never beyond."""
    k = gaussians.num_classes
    kld = gaussians.kld_matrix()
    return (scale * -torch.expm1(-kld / scale)).sum() / max(1, k * (k - 1))


def m_step_loss(
    gaussians: ClassGaussians, statistics: LatentStatistics, config: TrainConfig, kld_weight: float
) -> Tensor:
    """The M-step's loss; see ``TrainConfig`` for the units."""
    dim, k = gaussians.dim, gaussians.num_classes
    nll = statistics.balanced_nll(gaussians)
    repel = kld_weight > 0 and k > 1
    if config.repulsion == "kld":
        unit = value_range(float(statistics.nll_low), float(statistics.nll_high))
        loss = nll / unit
        means = gaussians.kld_class_means()
        spread = value_range(float(means.min()), float(means.max()))
        # Identical Gaussians: neither a gradient nor a range, so this step is the likelihood's alone.
        if repel and spread > 1e-9 * dim:
            # The authors sum over ordered pairs and divide by K d: in nats per dimension, unlike the range.
            loss = loss - kld_weight * gaussians.kld_sum().double() / (k * dim) / spread
    else:
        unit = float(dim)
        loss = nll / unit
        if config.repulsion == "saturating" and repel:
            loss = loss - kld_weight * saturating_kld(gaussians, config.saturation * dim) / dim
    if config.beta:
        # beta is against the likelihood per dimension; where that was divided by R_nf instead, so is this. Classes
        # weigh the same, as in the likelihood.
        z, y = statistics.kept()
        weight = (1 / statistics.count.clamp_min(1)).to(z.dtype)
        # Weighted here: torch would weight the smoothing by the classes that it is spread over.
        each = F.cross_entropy(
            config.ce_scale * gaussians.log_prob(z), y, label_smoothing=config.label_smoothing, reduction="none"
        )
        entropy = ((weight[y] * each).sum() / weight[y].sum()).double()
        loss = loss + config.beta * dim / unit * entropy
    return loss


def m_learning_rates(config: TrainConfig, total_steps: int) -> list[float]:
    """Adam's learning rate at each of ``total_steps`` M-steps; they sum to ``m_budget``.

    The authors: 0.1 for 10 epochs, then 0.01 falling geometrically to 0.001 at epoch 100, one step each, so that a
    mean moves by about 1.45 in all. Here the first tenth of the steps shares 1.0 / 1.45 of the budget.
    """
    early = max(1, round(0.1 * total_steps))
    late = total_steps - early
    if late == 0:
        return [config.m_budget / early] * early
    tail = [0.1 ** (i / max(1, late - 1)) for i in range(late)]
    share = 1.0 / 1.45
    return [config.m_budget * share / early] * early + [config.m_budget * (1 - share) * v / sum(tail) for v in tail]
