"""Objectives of training: their losses, and the Gaussians that they begin with.

`Trainer(objective=...)` takes any object with the methods of `Objective`. benchmarks/paper/research.py has one for
further published methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.codec.levels import draw_noise
from glem_augment.distributed import Share
from glem_augment.model.glem import GLEM
from glem_augment.training.config import TrainConfig
from glem_augment.training.moments import LatentStatistics

START_STD = 0.1  # of the random means that a joint objective begins with
CE_SCALE, LABEL_SMOOTHING = 0.1, 0.05  # of the cross-entropy
KLD_WEIGHT_END = 0.5  # of the weight at the start
PSI = (0.5, 0.2, 0.05)  # the paper's


class Progress(NamedTuple):
    """The E-steps that a run has taken, of how many, and the M-steps, of how many."""

    step: int
    steps: int
    m_step: int
    m_steps: int


class Objective:
    """Maximum likelihood ("mle"), which teaches the flow and the Gaussians together.

    Attributes:
        psi: of the variances of a new model, see `ClassGaussians`.
        joint: whether the E-step's loss teaches the Gaussians, too. learned: the parameters of the Gaussians that are
            learned, of "mu" and "s".
        m_rounds: M-steps in each epoch that has any, evenly spread.
    """

    psi: tuple[float, float, float] | None = None
    joint: bool = True
    learned: tuple[str, ...] = ("mu", "s")
    m_rounds: int = 1

    def settings(self) -> dict[str, Any]:
        """Settings beside `TrainConfig`, or in place of them, as JSON; a resumed run must have the same."""
        return {}

    def weights(self, progress: Progress) -> dict[str, float]:
        """Weights that change during the run, for the log."""
        return {}

    def m_epochs(self, epochs: int) -> int:
        """How many of the epochs, from the first on, have M-steps. They train the flow on D_nf, the rest on all."""
        return 0

    @torch.no_grad()
    def start(
        self,
        gaussians: ClassGaussians,
        statistics: Callable[[], LatentStatistics],
        generator: Callable[[int], torch.Generator],
    ) -> None:
        """Set the Gaussians of a new flow.

        Args:
            statistics: encodes D_g. generator: gives one for a number that is 2, or above 5.
        """
        gaussians.set_variance(torch.ones_like(gaussians.s))
        gaussians.mu.copy_(START_STD * torch.randn(gaussians.mu.shape, generator=generator(2)))
        gaussians.project()

    def gaussian_optimizer(self, gaussians: ClassGaussians) -> torch.optim.Optimizer:
        """The optimizer of the Gaussians; every step sets its rate."""
        return torch.optim.Adam(gaussians.parameters())

    def numbers(
        self, model: GLEM, x: Tensor, generator: torch.Generator, share: Share, latent_noise: float = 0.0
    ) -> Tensor:
        """The flow's numbers with noise, [b, ...].

        Args:
            x: uint8 [b,C,H,W], which are dequantised, or float16 latents of an autoencoder, which get Gaussian noise of
                the standard deviation `latent_noise`.
            share: the part of a batch that x is, see `draw_noise`.
        """
        if x.dtype == torch.uint8:
            return model.numbers(x, draw_noise(x, generator, share))
        return with_noise(x.to(model.dtype), latent_noise, generator, share)

    def e_loss(
        self, gaussians: ClassGaussians, z: Tensor, logdet: Tensor, y: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """The E-step's loss and its likelihood, means over the batch in nats per dimension.

        z [b,d], logdet [b], y int64 [b]. Both results are differentiable scalars.
        """
        nll = -(gaussians.log_prob_of(z, y) + logdet).mean() / gaussians.dim
        return nll, nll

    def statistics(self, num_classes: int, dim: int, device: torch.device) -> LatentStatistics:
        """Empty statistics for an M-step."""
        return LatentStatistics(num_classes, dim, device)

    def m_loss(self, gaussians: ClassGaussians, statistics: LatentStatistics, progress: Progress) -> Tensor:
        """The M-step's loss, a differentiable scalar that is the same on all ranks."""
        raise NotImplementedError(f"{type(self).__name__} has M-steps, so it needs m_loss")


class Hybrid(Objective):
    """`mean NLL / d + beta * cross-entropy`, which teaches the flow and the Gaussians together.

    beta falls linearly to `beta_end`. A high beta at the end teaches the training images' classes by heart.

    The cross-entropy of the posterior has class scores multiplied by `CE_SCALE`. A sum over d dimensions is
    overconfident, so a scale below 1 teaches wider margins.
    """

    def __init__(self, beta: float, beta_end: float | None = None) -> None:
        self.beta, self.beta_end = beta, beta if beta_end is None else beta_end

    def beta_at(self, progress: Progress) -> float:
        """beta at a step."""
        return self.beta + (self.beta_end - self.beta) * progress.step / max(1, progress.steps)

    def weights(self, progress: Progress) -> dict[str, float]:
        return {} if self.beta_end == self.beta else {"beta": self.beta_at(progress)}

    def e_loss(
        self, gaussians: ClassGaussians, z: Tensor, logdet: Tensor, y: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        beta = self.beta_at(progress)
        if not beta:
            return super().e_loss(gaussians, z, logdet, y, progress)
        scores = gaussians.log_prob(z)
        nll = -(scores.gather(1, y[:, None])[:, 0] + logdet).mean() / gaussians.dim
        return nll + beta * F.cross_entropy(CE_SCALE * scores, y, label_smoothing=LABEL_SMOOTHING), nll


class Repulsion(Objective):
    """The paper's objective ("glem"): the flow learns by Eq. 3, the Gaussians by Eq. 5 in M-steps.

    The M-step's loss is `mean NLL / R_nf - lambda * sum KLD / (K d R_kld)`, as the authors compute it. Classes weigh
    the same in the NLL. The sum is over ordered pairs of classes. `R = max - min + 0.2 (|max| + |min|)`, without
    gradient, is the range of the per-sample NLLs, or of the classes' mean KLDs, in nats. lambda is `kld_weight`, and
    falls linearly to half of it at the last M-step.
    """

    psi = PSI
    joint = False

    def __init__(self, kld_weight: float) -> None:
        self.kld_weight = kld_weight

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"kld_weight": falling(self.kld_weight, progress)}

    def m_epochs(self, epochs: int) -> int:
        return epochs

    def start(
        self,
        gaussians: ClassGaussians,
        statistics: Callable[[], LatentStatistics],
        generator: Callable[[int], torch.Generator],
    ) -> None:
        statistics().start_of_new_flow(gaussians)

    def m_loss(self, gaussians: ClassGaussians, statistics: LatentStatistics, progress: Progress) -> Tensor:
        dim, k = gaussians.dim, gaussians.num_classes
        unit = value_range(float(statistics.nll_low), float(statistics.nll_high))
        loss = statistics.balanced_nll(gaussians) / unit
        sums = gaussians.kld_class_sums()
        means = sums.detach() / max(1, k - 1)
        spread = value_range(float(means.min()), float(means.max()))
        weight = falling(self.kld_weight, progress)
        # Identical Gaussians have neither a gradient nor a range, so only the likelihood counts.
        if weight > 0 and k > 1 and spread > 1e-9 * dim:
            # The authors sum over ordered pairs and divide by K d: in nats per dimension, unlike the range.
            loss = loss - weight * sums.sum() / (k * dim) / spread
        return loss


def objective_of(config: TrainConfig) -> Objective:
    """The objective that the settings name."""
    if config.objective == "glem":
        return Repulsion(config.kld_weight)
    return Hybrid(config.beta or 0.0, config.beta_end) if config.objective == "hybrid" else Objective()


def with_noise(h: Tensor, std: float, generator: torch.Generator, share: Share) -> Tensor:
    """Numbers h [b, ...] with Gaussian noise of the standard deviation `std`."""
    if not std:
        return h
    drawn = torch.randn(share.total, *h.shape[1:], generator=generator, dtype=h.dtype)[share.rows]
    return h + std * drawn.to(h.device)


def falling(weight: float, progress: Progress) -> float:
    """`weight` at the first M-step, falling linearly to half of it at the last."""
    done = min(1.0, progress.m_step / max(1, progress.m_steps - 1))
    return weight * (1 + (KLD_WEIGHT_END - 1) * done)


def value_range(low: float, high: float) -> float:
    """R = max - min + 0.2 (|max| + |min|), the authors' normaliser."""
    return high - low + 0.2 * (abs(high) + abs(low))
