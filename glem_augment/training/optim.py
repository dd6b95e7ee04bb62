"""Optimizers and their schedules, of torch and timm."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from glem_augment.distributed import add_up, world_size
from glem_augment.training.config import TrainConfig

CLIP_NORM = 1.0
# A wide flow jumped above uniform noise where a short run's rate rose faster (`benchmarks/proof/training_is_calm.py`).
MOST_RISE = 1e-4  # of the learning rate, per step of a warm-up that had to be cut short
MILESTONES, COSINE_END = (0.5, 0.75), 0.01  # parts of the run, and of the learning rate


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named `<index of the parameter>/<entry>`.

    The rest of its state, the learning rates, follows from the settings and the step.
    """
    state = optimizer.state_dict()["state"]
    return {f"{index}/{key}": tensor for index, entries in state.items() for key, tensor in entries.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undoes `optimizer_tensors`. RuntimeError, IndexError, ValueError: the tensors of another optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = defaultdict[int, dict[str, Tensor]](dict)
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        if key != "step":
            # Files hold contiguous tensors; the optimizer is fastest with the strides of the weights (channels_last).
            tensor = torch.empty_like(parameters[int(index)], requires_grad=False).copy_(tensor)
        state[int(index)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
