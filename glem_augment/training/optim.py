"""Optimizers, learning-rate schedules and weight averages of a run; timm's and torch's own."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.training.config import TrainConfig


def flow_optimizer(
    flow: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer | None, Scheduler | None]:
    """Adamax with linear warm-up, then halvings or a cosine (GLEM, Sec. 5.2); (None, None) without weights to train."""
    if not any(True for _ in flow.parameters()):
        return None, None
    optimizer = create_optimizer_v2(flow, opt="adamax", lr=config.lr, weight_decay=0.0)
    warmup = min(config.warmup_steps, total_steps // 2)
    common = dict(warmup_t=warmup, warmup_lr_init=config.lr / max(1, warmup), t_in_epochs=False)
    scheduler: Scheduler
    if config.schedule == "cosine":
        span = max(1, total_steps - warmup)
        low = min(config.min_lr, config.lr)  # a cosine to a higher rate would raise it
        scheduler = CosineLRScheduler(optimizer, t_initial=span, lr_min=low, warmup_prefix=True, **common)
    else:
        # Halve at each milestone, but not below min_lr.
        allowed = int(math.log2(max(1.0, config.lr / max(config.min_lr, 1e-12))) + 1e-9)
        halvings = [round(share * total_steps) for share in sorted(config.milestones)][:allowed]
        scheduler = MultiStepLRScheduler(optimizer, decay_t=halvings, decay_rate=0.5, warmup_prefix=False, **common)
    scheduler.step_update(0)
    return optimizer, scheduler


def gaussian_optimizer(gaussians: ClassGaussians, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam on the means and the variances' parameters, those that may be learned."""
    gaussians.mu.requires_grad_(config.learn_mu)
    gaussians.s.requires_grad_(config.learn_sigma)
    groups = [
        {"params": [gaussians.mu], "lr": 0.0, "lr_scale": 1.0},
        {"params": [gaussians.s], "lr": 0.0, "lr_scale": config.sigma_lr_scale},
    ]
    return torch.optim.Adam(groups)


# What torch's optimizers keep per parameter: one number, and tensors of its shape.
_ENTRIES = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Adamax: {"step", "exp_avg", "exp_inf"},
}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named ``<index of the parameter>/<entry>``; the rest of its state (the
    learning rates) follows from the settings and the step."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{key}": tensor for index, entries in state.items() for key, tensor in entries.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take up what ``optimizer_tensors`` gave.

    Raises:
        ValueError: a name, shape or dtype that this optimizer can't have, or one that is missing.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        if not (index.isdecimal() and int(index) < len(parameters) and key.isidentifier()):
            raise ValueError(f"the optimizer has no {name!r}")
        parameter = parameters[int(index)]
        wanted = () if key == "step" else parameter.shape
        if tensor.shape != wanted or not tensor.is_floating_point():
            raise ValueError(f"the optimizer's {name} is {tensor.dtype} {list(tensor.shape)}")
        if tensor.shape == parameter.shape:
            # Files hold plain rows; the optimizer's fast path wants the strides of the weights (channels_last).
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    for index, entries in state.items():
        if set(entries) != _ENTRIES[type(optimizer)]:
            raise ValueError(f"the optimizer's parameter {index} comes with {sorted(entries)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class WeightAverage:
    """EMA of the flow's weights, or SWA over the last part of the run, or neither.

    Args:
        flow: its weights are copied at once.
        config: ``averaging``, ``ema_decay``, ``swa_start``.
        total_steps: of the run.
    """

    def __init__(self, flow: nn.Module, config: TrainConfig, total_steps: int) -> None:
        self.average: ModelEmaV3 | AveragedModel | None = None
        self.swa_from = config.swa_start * total_steps
        if not any(True for _ in flow.parameters()):
            return
        if config.averaging == "ema":
            self.average = ModelEmaV3(flow, decay=config.ema_decay, use_warmup=True)
        elif config.averaging == "swa":
            self.average = AveragedModel(flow)

    def update(self, flow: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` (counted from 1)."""
        if isinstance(self.average, ModelEmaV3):
            self.average.update(flow, step=step)
        elif isinstance(self.average, AveragedModel) and step >= self.swa_from:
            self.average.update_parameters(flow)

    def best(self, flow: nn.Module) -> nn.Module:
        """The averaged flow where there is one by now, else ``flow`` itself."""
        if isinstance(self.average, AveragedModel) and not int(self.average.n_averaged):
            return flow
        return flow if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Tensor]:
        """The average's tensors; empty where there is none."""
        return {} if self.average is None else self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError unless ``state`` is of an average of the same kind."""
        if self.average is not None:
            self.average.load_state_dict(state, strict=True)
        elif state:
            raise RuntimeError(f"this run averages no weights, but there are {len(state)} of them")
