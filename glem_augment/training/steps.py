"""The steps of the EM-like procedure (Sec. 4.3, Algorithm 1).

E-step: the flow's weights by Eq. 3 on D_nf, the Gaussians fixed. M-step: the Gaussians by Eq. 5 on D_g, the flow fixed.
A joint objective has E-steps only, which teach the Gaussians as well.

Every random draw is a function of the seed and of the step's number. So a killed and resumed run takes exactly the
steps of an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.distributed import Share, add_up, progress_bar, world_size
from glem_augment.errors import TrainingError
from glem_augment.flows import Flow
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import EVAL_BATCH, Batches, seeded
from glem_augment.training.config import TrainConfig
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import Objective, Progress

CLIP_NORM = 1.0
# A wide flow jumped above uniform noise where a short run's rate rose faster.
MOST_RISE = 1e-4  # of the learning rate, per step of a warm-up that had to be cut short
MILESTONES, COSINE_END = (0.5, 0.75), 0.01  # parts of the run, and of the learning rate
EMA_DECAY = 0.999
JOINT_LR = 1e-2  # the best of a few on held-out training images of a 14x14 Fashion-MNIST


class GaussianSteps:
    """The optimizer of the Gaussians, which both steps may use."""

    def __init__(self, gaussians: ClassGaussians, objective: Objective) -> None:
        self.gaussians, self.learned = gaussians, objective.learned
        self.optimizer = objective.gaussian_optimizer(gaussians)

    def let_learn(self, learn: bool) -> None:
        """Whether the next loss has gradients with respect to the parameters that the run learns."""
        self.gaussians.mu.requires_grad_(learn and "mu" in self.learned)
        self.gaussians.s.requires_grad_(learn and "s" in self.learned)

    def step(self, rate: float) -> None:
        """One step at a learning rate, with the gradients that the Gaussians have."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.gaussians.project()


class EStep:
    """Adamax on the flow, with a moving average of the weights.

    Attributes:
        lr: the learning rate at the end of the warm-up. ema: the average, or None for a flow without weights.
    """

    def __init__(
        self,
        model: GLEM,
        objective: Objective,
        gaussians: GaussianSteps,
        batches: Batches,
        steps: int,
    ) -> None:
        self.model, self.objective, self.gaussians, self.batches = model, objective, gaussians, batches
        self.config = batches.config
        self.optimizer, self.scheduler = flow_optimizer(model.flow, self.config, steps)
        self.lr = float(self.scheduler.base_values[0])
        self.ema: ModelEmaV3 | None = None

    def start_average(self) -> None:
        """Begin the moving average at the weights of now."""
        if any(True for _ in self.model.flow.parameters()):
            self.ema = ModelEmaV3(self.model.flow, decay=EMA_DECAY, use_warmup=True)

    def take(self, x: Tensor, y: Tensor, share: Share, progress: Progress) -> tuple[float, float]:
        """One step on the flow (Eq. 3), and with a joint objective one on the Gaussians.

        x and y are this rank's `share` of the batch: images uint8 [b,C,H,W] and labels int64 [b]; b may be 0. Returns
        the loss, nats per dimension, and the likelihood, bits/dim, of the whole batch; NaN if the step was skipped
        because it was not finite.
        """
        model, objective = self.model, self.objective
        self.gaussians.let_learn(objective.joint)
        generator = seeded(self.config.seed, 4, progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.gaussians.optimizer.zero_grad(set_to_none=True)
        loss = nll = torch.zeros((), dtype=model.dtype, device=model.device)
        if len(x):
            shown = self.batches.augmented(x, generator, share)
            if self.config.dropout:  # M-steps and measurements are without
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                model.flow.set_dropout(self.config.dropout)
            h = objective.numbers(model, shown, generator, share, self.config.latent_noise)
            z, logdet = model.encode_numbers(h)
            # Means over the batch are sums of the ranks' means, each times its part of the images.
            means = objective.e_loss(model.gaussians, z, logdet, y, progress)
            loss, nll = (len(x) / share.total * mean for mean in means)
            if loss.requires_grad:  # not so for the identity flow with fixed Gaussians
                loss.backward()
            model.flow.set_dropout(0.0)
        loss, nll = loss.detach().clone(), nll.detach().clone()
        add_up_gradients(model, loss, nll)
        norm = nn.utils.clip_grad_norm_(list(model.flow.parameters()), CLIP_NORM)
        # One read per step, of all numbers at once: a bad step has to be known before the weights move.
        value, bits, norm_value = torch.stack([loss, nll / math.log(2), norm.to(loss)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            return math.nan, math.nan
        self.optimizer.step()
        if objective.joint:
            self.gaussians.step(JOINT_LR * self.optimizer.param_groups[0]["lr"] / self.lr)
        if self.ema is not None:
            self.ema.update(model.flow, step=progress.step + 1)
        return value, bits


class MStep:
    """Adam on the Gaussians, the flow fixed.

    Attributes:
        epochs: that have M-steps. total: M-steps of the run; done: so far.
    """

    def __init__(
        self,
        model: GLEM,
        objective: Objective,
        gaussians: GaussianSteps,
        batches: Batches,
        steps_per_epoch: int,
    ) -> None:
        self.model, self.objective, self.gaussians, self.batches = model, objective, gaussians, batches
        self.each, self.steps_per_epoch = batches.config.m_steps, steps_per_epoch
        self.epochs = objective.m_epochs(batches.config.epochs)
        self.total, self.done = objective.m_rounds * self.epochs, 0
        self.rates = m_learning_rates(self.total, self.each, self.epochs * steps_per_epoch)

    def due(self, epoch: int, position: int) -> int:
        """How many M-steps come before the batch number `position` of an epoch."""
        if epoch >= self.epochs:
            return 0
        rounds = self.objective.m_rounds
        here = [r for r in range(rounds) if r * self.steps_per_epoch // rounds == position]
        return sum(self.done <= epoch * rounds + r for r in here)

    def take(self, progress: Progress) -> None:
        """One pass over D_g, and a few steps of Adam (Eq. 5)."""
        statistics = latent_pass(self.model, self.batches, self.objective, self.batches.split.g, self.done)
        for rate in self.rates[self.done * self.each : (self.done + 1) * self.each]:
            self.descend(statistics, rate, progress)
        if self.done == 0:
            # As the authors do: the moments of the first, large gradients are forgotten.
            self.gaussians.optimizer.state.clear()
        self.done += 1

    def descend(self, statistics: LatentStatistics, rate: float, progress: Progress) -> None:
        """One step of Adam down the M-step's loss. TrainingError: the loss or its gradient is not finite."""
        gaussians = self.model.gaussians
        self.gaussians.let_learn(True)
        loss = self.objective.m_loss(gaussians, statistics, progress)
        self.gaussians.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in gaussians.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads)):
            raise TrainingError(
                f"the run diverged: the M-step's loss ({loss.item():.4g}) or its gradient is not finite; train with a "
                "lower kld_weight or lr"
            )
        self.gaussians.step(rate)


@torch.no_grad()
def latent_pass(
    model: GLEM, batches: Batches, objective: Objective, rows: np.ndarray, number: int, title: str = "M-step"
) -> LatentStatistics:
    """Statistics of the latents of the images `rows`, with the noise of M-step `number`; -1 for the start of a run."""
    statistics = objective.statistics(model.num_classes, model.dim, model.device)
    generator = seeded(batches.config.seed, 3, number + 1)
    with progress_bar(title, total=len(rows)) as bar:
        for x, y, share in batches.read(rows, EVAL_BATCH, batches.views):
            shown = batches.augmented(x, generator, share)
            z, logdet = model.encode_numbers(objective.numbers(model, shown, generator, share))
            statistics.add(z, y, -(model.gaussians.log_prob_of(z, y) + logdet))
            bar.update(share.total)
    statistics.add_ranks()
    return statistics


def m_learning_rates(m_steps: int, each: int, e_steps: int) -> list[float]:
    """Adam's learning rates in `m_steps` M-steps of `each` steps; they sum to 1.45, which is how far a mean can move.

    The sum keeps range-normalised repulsion finite. The authors let a mean move by 0.1 in each of 10 epochs, 880
    E-steps in all. Then it moves by 0.01, falling geometrically to 0.001 at epoch 100. Here the first tenth of the
    M-steps has 1.0 of the sum. In short runs this part has more M-steps, so that the flow can follow the means.
    """
    early = max(10, round(0.1 * m_steps), math.ceil(880 * m_steps / max(1, e_steps)))
    late = max(0, m_steps - early)
    tail = [0.1 ** (i / max(1, late - 1)) for i in range(late)]
    moves = [1.0 / early] * (m_steps - late) + [min(1.0 / early, 0.45 * v / sum(tail)) for v in tail]
    return [move / each for move in moves for _ in range(each)]


@contextmanager
def training_mode(flow: Flow, config: TrainConfig) -> Iterator[None]:
    """Apply `precision` to the flow that is trained; outside, it is float32."""
    flow.set_autocast(torch.bfloat16 if config.precision == "bf16" else None)
    try:
        yield
    finally:
        flow.set_autocast(None)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def flow_optimizer(flow: nn.Module, config: TrainConfig, total_steps: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Adamax with linear warm-up, then two halvings or a cosine (GLEM, Sec. 5.2).

    A run that is too short for its warm-up has a lower rate, reached at half of its steps. A flow without
    weights has the same schedule, which jointly learned Gaussians follow.
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    lr = config.lr if warmup == config.warmup_steps else min(config.lr, MOST_RISE * max(1, warmup))
    optimizer = torch.optim.Adamax([{"params": list(flow.parameters())}], lr=lr)
    common: dict[str, Any] = dict(warmup_t=warmup, warmup_lr_init=lr / max(1, warmup), t_in_epochs=False)
    scheduler: Scheduler
    if config.schedule == "cosine":
        span, low = max(1, total_steps - warmup), COSINE_END * lr
        scheduler = CosineLRScheduler(optimizer, t_initial=span, lr_min=low, warmup_prefix=True, **common)
    else:
        halvings = [round(part * total_steps) for part in MILESTONES]
        scheduler = MultiStepLRScheduler(optimizer, decay_t=halvings, decay_rate=0.5, warmup_prefix=False, **common)
    scheduler.step_update(0)
    return optimizer, scheduler


def add_up_gradients(module: nn.Module, *values: Tensor) -> None:
    """Replace the gradients of the learned parameters, and `values`, by their sums over all ranks."""
    if world_size() == 1:
        return
    learned = [p for p in module.parameters() if p.requires_grad]
    for p in learned:  # a rank without images has no gradients
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    add_up(*values, *(p.grad for p in learned if p.grad is not None))
