"""Optimizers, learning-rate schedules and weight averages, timm's and torch's own; and when a run has diverged.

**Not finite.** A step whose loss or gradient is not finite is skipped, and nothing moves. `MAX_BAD_STEPS` of them in a
row, in the E-step or in the M-step, are a divergence.

**Exploded.** A divergence need not be NaN. An E-step loss counts as exploded when it exceeds

    r + max(1, |r|, 10 v)      nats per dimension

for one of two references r. The recent one is the median of the last `WINDOW` (200) losses that had not exploded; it
is used once there are `MIN` (50). The other is the untrained flow: the median of the first `START` (5) losses, or what
a uniform distribution over the pixel levels costs, bits * ln 2, if that is more. A run whose learning rate was too high
from the start has no better days to compare with. v is the median absolute difference from one of those 200 losses to
the next, a measure of noise that neither a trend nor a few spikes can raise. When `SHARE` (80) of the last `PATIENCE`
(100) losses have exploded or were not finite, the run has diverged.

The rule is meant to be wrong on the side of patience. Noise can't meet it, since half of all losses lie below their
median, nor can a slow rise. A sudden doubling by more than a nat per dimension that does not heal within some 100 steps
meets it, and so does twice the loss of having learned nothing.

A diverged run returns to its last good checkpoint and goes on at half the learning rates, at most `MAX_ROLLBACKS`
times.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glem_augment.errors import TrainingError
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.training.config import TrainConfig

CLIP_NORM = 1.0
MILESTONES = (0.5, 0.75)  # shares of the run
EMA_DECAY, SWA_START = 0.999, 0.75
MAX_BAD_STEPS, MAX_ROLLBACKS = 10, 3
WINDOW, MIN, START, PATIENCE, SHARE = 200, 50, 5, 100, 80
# A checkpoint is good if each of the last so many losses was finite and had not exploded.
CALM = 10


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


class WeightAverage:
    """EMA of the flow's weights, SWA over the last part of the run, or neither; it begins with a copy of them."""

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


# ---- divergence -------------------------------------------------------------------------------------------------


class DivergenceError(TrainingError):
    """The run has diverged; a return to the last good checkpoint may help."""


class LossGuard:
    """Watches the losses of the E-steps one by one. `bits` of the pixels give the cost of a uniform distribution.

    >>> guard = LossGuard(bits=8)
    >>> for _ in range(300):
    ...     guard.see(2.0)
    >>> guard.threshold()
    4.0
    """

    def __init__(self, bits: int) -> None:
        self.uniform = bits * math.log(2)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.start: list[float] = []
        self.bad: deque[bool] = deque(maxlen=PATIENCE)

    def threshold(self) -> float:
        """Losses above this have exploded, nats per dimension; infinite while there is nothing to compare with."""
        references = []
        if len(self.losses) >= MIN:
            references.append(_median(self.losses))
        if len(self.start) >= START:
            references.append(max(self.uniform, _median(self.start)))
        if not references:
            return math.inf
        noise = _median(abs(after - before) for before, after in pairwise(self.losses))
        return min(r + max(1.0, abs(r), 10 * noise) for r in references)

    def see(self, loss: float) -> None:
        """Take in the loss of one E-step, nats per dimension; NaN and infinity are allowed.

        Raises:
            DivergenceError: the losses have exploded, and stayed so.
        """
        limit, finite = self.threshold(), math.isfinite(loss)
        good = finite and loss <= limit
        self.bad.append(not good)
        if finite and len(self.start) < START:
            self.start.append(loss)
        if good:
            self.losses.append(loss)
        elif sum(self.bad) >= SHARE:
            raise DivergenceError(
                f"{sum(self.bad)} of the last {len(self.bad)} losses were above {limit:.4g} nats per dimension or not "
                f"finite (now {loss:.4g}, median of those before {_median(self.losses):.4g})"
            )

    @property
    def calm(self) -> bool:
        """Whether a diverged run may return to a checkpoint that is written now."""
        return not any(list(self.bad)[-CALM:])

    def state(self) -> tuple[dict[str, Any], Tensor]:
        """For a checkpoint: which losses were bad, as JSON, and the losses, float64 [<= START + WINDOW]."""
        facts = {"bad": "".join("x" if bad else "." for bad in self.bad), "start": len(self.start)}
        return facts, torch.tensor([*self.start, *self.losses], dtype=torch.float64)

    def load(self, facts: dict[str, Any], losses: Tensor) -> None:
        """Go on where `state` was taken."""
        count, values = int(facts["start"]), losses.tolist()
        self.start, self.losses = values[:count], deque(values[count:], maxlen=WINDOW)
        self.bad = deque((mark == "x" for mark in facts["bad"]), maxlen=PATIENCE)


def _median(values: Iterable[float]) -> float:
    """The upper median, an element of the list; 0 for none."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
