"""What the steps of a run share: their optimizer and rates, and a pass over images for latents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from glem_augment.distributed import add_up, progress_bar, world_size
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import EVAL_BATCH, Batches, seeded
from glem_augment.training.config import TrainConfig
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import Objective

# A wide flow jumped above uniform noise where a short run's rate rose faster.
MOST_RISE = 1e-4  # of the learning rate, per step of a warm-up that had to be cut short
MILESTONES, COSINE_END = (0.5, 0.75), 0.01  # parts of the run, and of the learning rate


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
