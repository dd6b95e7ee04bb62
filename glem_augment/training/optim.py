"""Optimizers and learning-rate schedules, torch's and timm's own, and the guard that notices a divergence."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from itertools import pairwise
from statistics import median_high
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from glem_augment.distributed import add_up, world_size
from glem_augment.errors import TrainingError
from glem_augment.training.config import TrainConfig

CLIP_NORM = 1.0
# A wide flow jumped above uniform noise where a short run's rate rose faster (`benchmarks/proof/training_is_calm.py`).
MOST_RISE = 1e-4  # of the learning rate, per step of a warm-up that had to be cut short
MILESTONES, COSINE_END = (0.5, 0.75), 0.01  # shares of the run, and of the learning rate
SPAN, WINDOW = 25, 500  # losses of a median, and medians whose lowest is the best
MAX_BAD_STEPS, PATIENCE = 10, 100  # steps in a row, not finite or away, that make a divergence
START = 5  # losses before the guard has something to compare with
CALM = 10  # steps in a row that were not away make a checkpoint good


# ---- the optimizers ----------------------------------------------------------------------------------------------


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
        halvings = [round(share * total_steps) for share in MILESTONES]
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


# ---- the guard ---------------------------------------------------------------------------------------------------


class DivergenceError(TrainingError):
    """The run has diverged; a rollback to the last good checkpoint may help."""


def independent_pixels(x: Tensor, bits: int) -> float:
    """Bits/dim of independent pixels: the mean entropy of the channels' histograms.

    One histogram serves all positions of a channel. A histogram per position would suit aligned images better, but it
    takes more images than many sets have. x is uint8 [N,C,H,W], and its top `bits` bits count.
    """
    channels = (x >> (8 - bits)).transpose(0, 1).flatten(1).long()
    shares = torch.stack([channel.bincount(minlength=2**bits) for channel in channels]) / channels.shape[1]
    return float(torch.special.entr(shares.double()).sum(1).mean() / math.log(2))


def independent_latents(std: Tensor) -> float:
    """Bits per number of latents that are independent Gaussians with their channel's `std`."""
    return float((0.5 * math.log2(2 * math.pi * math.e) + std.double().log2()).mean())


class LossGuard:
    """Detects that a run has diverged, from medians of the last 25 steps, which a few spikes can't move.

    A step that is not finite counts as infinite. A run is away in two cases:

    - its loss exceeds b + max(1, |b|, 10 v). b is the lowest median of the last 500 steps. v, the median absolute
      difference from one loss to the next, measures noise: neither a trend nor a few spikes can raise it;
    - its likelihood is worse, by a bit per dimension, than uniform noise and than the untrained flow. Once it was
      better than independent pixels, the limit is halfway from independent pixels to uniform noise. Repulsion of the
      classes may cost some likelihood.

    A run has diverged after 100 steps away in a row, or 10 steps in a row that were not finite. Neither noise nor a
    slow rise leads to this.
    """

    def __init__(self, bits: int) -> None:
        self.uniform, self.pixels = float(bits), math.inf  # bits/dim of uniform noise, of independent pixels once known
        self.losses, self.medians = deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW)
        self.bits = deque[float](maxlen=SPAN)
        self.start = 0.0  # bits/dim of the untrained flow, once they are known
        self.away = 0  # steps in a row
        self.learned = False  # whether the likelihood was better than independent pixels

    def limit(self) -> float:
        """Median losses above this are away, nats per dimension; infinite while there is nothing to compare with."""
        if not self.medians:
            return math.inf
        best, finite = min(self.medians), [loss for loss in self.losses if loss < math.inf]
        changes = [abs(after - before) for before, after in pairwise(finite)] or [0.0]
        return best + max(1.0, abs(best), 10 * median_high(changes))

    def see(self, loss: float, bits: float) -> None:
        """Add one E-step: its loss, nats per dimension, and its likelihood, bits/dim. DivergenceError: it has diverged.

        NaN and infinity are allowed.
        """
        good = math.isfinite(loss)
        self.losses.append(loss if good else math.inf)
        self.bits.append(bits if good else math.inf)
        recent = list(self.losses)[-SPAN:]
        if recent[-MAX_BAD_STEPS:] == [math.inf] * MAX_BAD_STEPS:
            raise DivergenceError(f"{MAX_BAD_STEPS} steps in a row were not finite")
        if len(recent) < START:
            return
        now, limit, likelihood = median_high(recent), self.limit(), median_high(self.bits)
        if not self.start and likelihood < math.inf:
            self.start = likelihood
        most = (self.pixels + self.uniform) / 2 if self.learned else max(self.uniform, self.start) + 1
        self.learned = self.learned or likelihood < self.pixels < math.inf
        self.away = self.away + 1 if now > limit or likelihood > most else 0
        self.medians.append(now)
        if self.away >= PATIENCE:
            if now > limit:
                raise DivergenceError(f"the loss stays high: {now:.4g} nats/dim, after {min(self.medians):.4g}")
            raise DivergenceError(
                f"the flow has become worse than independent pixels: {likelihood:.4g} bits/dim, not {self.pixels:.4g}"
            )

    @property
    def calm(self) -> bool:
        """Whether a diverged run may return to a checkpoint that is written now."""
        return not self.away and all(loss <= self.limit() for loss in list(self.losses)[-CALM:] if self.medians)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: facts as JSON, and series, which may hold infinity, as float64 tensors."""
        facts = {name: getattr(self, name) for name in ("uniform", "pixels", "start", "away", "learned")}
        series = {"losses": self.losses, "medians": self.medians, "bits": self.bits}
        return facts, {name: torch.tensor(values, dtype=torch.float64) for name, values in series.items()}

    def load(self, facts: dict[str, Any], series: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for name in ("uniform", "pixels", "start", "away", "learned"):
            setattr(self, name, facts[name])
        for name in ("losses", "medians", "bits"):
            setattr(self, name, deque(series[name].tolist(), getattr(self, name).maxlen))
