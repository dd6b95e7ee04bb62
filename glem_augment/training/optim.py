"""Optimizers and learning-rate schedules, torch's and timm's own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.training.config import TrainConfig

CLIP_NORM = 1.0
MILESTONES, COSINE_END = (0.5, 0.75), 0.01  # shares of the run, and of the learning rate


def flow_optimizer(flow: nn.Module, config: TrainConfig, total_steps: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Adamax with linear warm-up, then two halvings or a cosine (GLEM, Sec. 5.2).

    A flow without weights has the same schedule, which jointly learned Gaussians follow.
    """
    optimizer = torch.optim.Adamax([{"params": list(flow.parameters())}], lr=config.lr)
    warmup = min(config.warmup_steps, total_steps // 2)
    common: dict[str, Any] = dict(warmup_t=warmup, warmup_lr_init=config.lr / max(1, warmup), t_in_epochs=False)
    scheduler: Scheduler
    if config.schedule == "cosine":
        span, low = max(1, total_steps - warmup), COSINE_END * config.lr
        scheduler = CosineLRScheduler(optimizer, t_initial=span, lr_min=low, warmup_prefix=True, **common)
    else:
        halvings = [round(share * total_steps) for share in MILESTONES]
        scheduler = MultiStepLRScheduler(optimizer, decay_t=halvings, decay_rate=0.5, warmup_prefix=False, **common)
    scheduler.step_update(0)
    return optimizer, scheduler


def gaussian_optimizer(gaussians: ClassGaussians, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam on the means and on the variances' free parameters; every step sets the learning rates anew."""
    groups = [
        {"params": [gaussians.mu], "lr": 0.0, "lr_scale": 1.0},
        {"params": [gaussians.s], "lr": 0.0, "lr_scale": config.sigma_lr_scale},
    ]
    return torch.optim.Adam(groups)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named `<index of the parameter>/<entry>`.

    The rest of its state, the learning rates, follows from the settings and the step.
    """
    state = optimizer.state_dict()["state"]
    return {f"{index}/{key}": tensor for index, entries in state.items() for key, tensor in entries.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned. Raises RuntimeError, IndexError or ValueError for another optimizer's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = defaultdict[int, dict[str, Tensor]](dict)
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        if key != "step":
            # Files hold plain rows; the optimizer is fastest with the strides of the weights (channels_last).
            tensor = torch.empty_like(parameters[int(index)], requires_grad=False).copy_(tensor)
        state[int(index)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
