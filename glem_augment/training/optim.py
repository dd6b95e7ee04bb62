"""Optimizers, learning-rate schedules and weight averages of a run; timm's and torch's own."""

from __future__ import annotations

import math

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.training.config import TrainConfig

CLIP_NORM = 1.0
MILESTONES = (0.5, 0.75)  # shares of the run
EMA_DECAY, SWA_START = 0.999, 0.75
# What torch's optimizers keep per parameter: one number, and tensors of its shape.
_ENTRIES = {
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
}


def flow_optimizer(flow: nn.Module, config: TrainConfig, total_steps: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """Adamax with linear warm-up, then halvings or a cosine (GLEM, Sec. 5.2).

    A flow without weights has the same schedule, which jointly learned Gaussians follow.
    """
    optimizer = torch.optim.Adamax([{"params": list(flow.parameters())}], lr=config.lr)
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
        halvings = [round(share * total_steps) for share in MILESTONES][:allowed]
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
    """Load what `optimizer_tensors` returned.

    Raises:
        ValueError: a name or shape that this optimizer can't have, or one that is missing.
    """
    rest, state = dict(tensors), {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        names = [f"{index}/{key}" for key in _ENTRIES[type(optimizer)]]
        if not any(name in rest for name in names):
            continue
        step, *moments = (rest.pop(name, None) for name in names)
        if step is None or step.shape != () or any(m is None or m.shape != parameter.shape for m in moments):
            raise ValueError(f"the optimizer's parameter {index} has a state of other shapes")
        # Files hold plain rows; the optimizer is fastest with the strides of the weights (channels_last).
        moments = [torch.empty_like(parameter, requires_grad=False).copy_(moment) for moment in moments]
        state[index] = dict(zip(_ENTRIES[type(optimizer)], (step, *moments), strict=True))
    if rest:
        raise ValueError(f"the optimizer has no {sorted(rest)[:3]}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class WeightAverage:
    """EMA of the flow's weights, or SWA over the last part of the run, or neither; the weights are copied at once."""

    def __init__(self, flow: nn.Module, averaging: str, total_steps: int) -> None:
        self.average: ModelEmaV3 | AveragedModel | None = None
        self.swa_from = SWA_START * total_steps
        if not any(True for _ in flow.parameters()):
            return
        if averaging == "ema":
            self.average = ModelEmaV3(flow, decay=EMA_DECAY, use_warmup=True)
        elif averaging == "swa":
            self.average = AveragedModel(flow)

    def update(self, flow: nn.Module, step: int) -> None:
        """Take in the weights after `step`, counted from 1."""
        if isinstance(self.average, ModelEmaV3):
            self.average.update(flow, step=step)
        elif isinstance(self.average, AveragedModel) and step >= self.swa_from:
            self.average.update_parameters(flow)

    def best(self, flow: nn.Module) -> nn.Module:
        """The averaged flow, or `flow` itself if there is no average yet."""
        if isinstance(self.average, AveragedModel) and not int(self.average.n_averaged):
            return flow
        return flow if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Tensor]:
        """The average's tensors; empty without an average."""
        return {} if self.average is None else self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError unless `state` is that of an average of the same kind."""
        if self.average is not None:
            self.average.load_state_dict(state, strict=True)
        elif state:
            raise RuntimeError(f"this run averages no weights, but the checkpoint holds {len(state)} of them")
