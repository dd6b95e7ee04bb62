"""The losses of the E-step (Eq. 3) and of the M-step (Eq. 5), and the M-step's statistics of the latents.

For diagonal Gaussians the summed NLL depends on the latents only through n_y, sum z and sum z^2 of each class. So one
pass over D_g serves any number of gradient steps on the Gaussians, each in O(K d). The same pass records the range of
the per-sample NLL.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.codec.levels import draw_noise
from glem_augment.distributed import Share, add_up, rank, world_size
from glem_augment.model.glem import GLEM
from glem_augment.training.config import TrainConfig

SATURATION = 0.05  # of the bounded repulsion, nats per dimension
NOISE_STD = 0.5  # levels; the dequantisation of IB-INN
SHRINKAGE = 10  # number of images at which a class's first mean and variance are half shrunk


# ---- the E-step -------------------------------------------------------------------------------------------------


def encode(
    model: GLEM, x: Tensor, config: TrainConfig, generator: torch.Generator, share: Share, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`model.encode` with the run's dequantisation: uniform, or Gaussian of `NOISE_STD` levels for "ib".

    Latents of an autoencoder get Gaussian noise of the standard deviation `noise` instead. `share`: see `draw_noise`.
    """
    if model.codec.key == "bits_per_dim" and config.objective != "ib":
        return model.encode(x, draw_noise(x, generator, share))
    h = model.numbers(x)
    std = noise if model.codec.key != "bits_per_dim" else NOISE_STD * 2.0**-config.bits
    if std:
        drawn = torch.randn(share.total, *h.shape[1:], generator=generator, dtype=h.dtype)[share.rows]
        h = h + std * drawn.to(h.device)
    return model.encode_numbers(h)


def e_step_loss(
    gaussians: ClassGaussians, z: Tensor, logdet: Tensor, y: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """`mean NLL / d + beta * cross-entropy` and its first term, in nats per dimension; see `TrainConfig`."""
    if config.beta or config.objective == "ib":
        scores = gaussians.log_prob(z)
        own = scores.gather(1, y[:, None])[:, 0]
        if config.objective == "ib":
            own = torch.logsumexp(scores, 1) - math.log(gaussians.num_classes)
    else:
        own = gaussians.log_prob_of(z, y)
    nll = -(own + logdet).mean() / gaussians.dim
    if not config.beta:
        return nll, nll
    entropy = F.cross_entropy(config.ce_scale * scores, y, label_smoothing=config.label_smoothing)
    return nll + config.beta * entropy, nll


# ---- the M-step -------------------------------------------------------------------------------------------------


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

    @torch.no_grad()
    def most_likely(self, gaussians: ClassGaussians, means: bool = True, variances: bool = True) -> None:
        """Set the means, the variances or both to the minimum of `balanced_nll` within the range of the variances."""
        mean, variance = self.moments()
        if means:
            gaussians.mu.copy_(mean)
        if variances:
            # About the Gaussian's mean, which is the class mean only if it was just set.
            gaussians.set_variance(variance + (mean - gaussians.mu.double()).square())


def value_range(low: float, high: float) -> float:
    """R = max - min + 0.2 (|max| + |min|), the authors' normaliser."""
    return high - low + 0.2 * (abs(high) + abs(low))


def saturating_kld(gaussians: ClassGaussians, scale: float) -> Tensor:
    """Mean over pairs of `scale * (1 - exp(-KLD / scale))` in nats: the KLD if it is small, `scale` if large."""
    k = gaussians.num_classes
    kld = gaussians.kld_matrix()
    return (scale * -torch.expm1(-kld / scale)).sum() / max(1, k * (k - 1))


def m_step_loss(
    gaussians: ClassGaussians, statistics: LatentStatistics, config: TrainConfig, kld_weight: float
) -> Tensor:
    """The M-step's loss with the given lambda; `TrainConfig` has the formula and the units."""
    dim, k = gaussians.dim, gaussians.num_classes
    nll = statistics.balanced_nll(gaussians)
    repel = kld_weight > 0 and k > 1
    if config.objective == "glem":
        unit = value_range(float(statistics.nll_low), float(statistics.nll_high))
        loss = nll / unit
        sums = gaussians.kld_class_sums()
        means = sums.detach() / max(1, k - 1)
        spread = value_range(float(means.min()), float(means.max()))
        # Identical Gaussians have neither a gradient nor a range, so only the likelihood counts.
        if repel and spread > 1e-9 * dim:
            # The authors sum over ordered pairs and divide by K d: in nats per dimension, unlike the range.
            loss = loss - kld_weight * sums.sum() / (k * dim) / spread
        return loss
    loss = nll / dim
    if config.objective == "saturating" and repel:
        loss = loss - kld_weight * saturating_kld(gaussians, SATURATION * dim) / dim
    return loss


def m_learning_rates(m_steps: int, each: int, e_steps: int) -> list[float]:
    """Adam's learning rates in `m_steps` M-steps of `each` steps; they sum to 1.45, which is how far a mean can move.

    The sum keeps range-normalised repulsion finite. The authors let a mean move by 0.1 in each of 10 epochs, 880
    E-steps in all. Then it moves by 0.01, falling geometrically to 0.001 at epoch 100. Here the first tenth of the
    M-steps shares 1.0 of the sum. In short runs more M-steps share it, so that the flow can follow the means.
    """
    early = max(10, round(0.1 * m_steps), math.ceil(880 * m_steps / max(1, e_steps)))
    late = max(0, m_steps - early)
    tail = [0.1 ** (i / max(1, late - 1)) for i in range(late)]
    moves = [1.0 / early] * (m_steps - late) + [min(1.0 / early, 0.45 * v / sum(tail)) for v in tail]
    return [move / each for move in moves for _ in range(each)]
