"""The EM-like procedure of the paper (Sec. 4.3, Algorithm 1): its two steps, and the refit at its end.

E-step: the flow's weights by Eq. 3 on D_nf, the Gaussians fixed. M-step: the Gaussians by Eq. 5 on D_g, the flow fixed.
Every random draw is a function of the seed and of the step's number, and `state` holds everything else. So a killed and
resumed run takes exactly the steps of an undisturbed one.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from glem_augment.distributed import Share
from glem_augment.errors import TrainingError
from glem_augment.flows import Flow
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM
from glem_augment.training.config import TrainConfig
from glem_augment.training.folder import Checkpoint, gaussian_state, held_out
from glem_augment.training.objective import LatentStatistics, e_step_loss, encode, m_learning_rates, m_step_loss
from glem_augment.training.optim import (
    CLIP_NORM,
    DivergenceError,
    add_up_gradients,
    flow_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from glem_augment.training.start import EVAL_BATCH, LEAST_IMAGES, MOST_NUMBERS, Start

KLD_WEIGHT_END, EMA_DECAY = 0.5, 0.999
JOINT_LR = 1e-2  # the best of a few on held-out training images of a 14x14 Fashion-MNIST
_COUNTERS = ("step", "m_done", "bad_steps", "rollbacks")


class EM(Start):
    """A GLEM in training: the model, its optimizers, and the two steps; `Trainer` runs them."""

    def __init__(
        self,
        data: ImageData,
        config: TrainConfig,
        init_model: GLEM | None = None,
        begun: Checkpoint | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        ready: Callable[[Any], object] | None = None,
    ) -> None:
        super().__init__(data, config, init_model, begun, device, progress)
        # Gaussians that are learned jointly, or not at all, need no M-steps.
        self.m_total = 0 if config.joint or config.learn == "none" else config.epochs
        self.steps_per_epoch = self.count_steps()
        self.total_steps = self.steps_per_epoch * config.epochs
        self.m_rates = m_learning_rates(self.m_total, config.m_steps, self.m_total * self.steps_per_epoch)
        self.flow_optimizer, self.scheduler = flow_optimizer(self.model.flow, config, self.total_steps)
        self.lr = float(self.scheduler.base_values[0])  # at the end of the warm-up
        self.m_optimizer = torch.optim.Adam(self.model.gaussians.parameters())  # every step sets its rate
        self.step = self.m_done = 0  # E-steps and M-steps taken
        self.bad_steps = self.rollbacks = 0  # E-steps skipped because they were not finite; rollbacks
        self.lr_scale = 1.0
        self.epoch_loss = (0.0, 0)  # sum and number of the finite losses of the current epoch
        if begun is None:
            if ready is not None:
                ready(self)
            self.initialise(init_model)
        self.ema: ModelEmaV3 | None = None
        if any(True for _ in self.model.flow.parameters()):
            self.ema = ModelEmaV3(self.model.flow, decay=EMA_DECAY, use_warmup=True)
        if begun is not None:
            self.restore(begun)

    def count_steps(self) -> int:
        """E-steps of an epoch."""
        return max(1, len(self.epoch_rows(0)) // self.config.batch_size)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch: D_nf, and D_g where no M-step needs it."""
        return self.split.nf if self.m_total else np.concatenate([self.split.nf, self.split.g])

    # ---- the E-step ----------------------------------------------------------------------------------------------

    def e_step(self, x: Tensor, y: Tensor, share: Share | None = None) -> tuple[float, float]:
        """One step of Adamax on the flow (Eq. 3); with `joint`, one of Adam on the Gaussians too.

        x and y are this rank's `share` of the batch, by default all of it: images uint8 [b,C,H,W] and labels int64 [b];
        b may be 0. Returns the loss, nats per dimension, and the likelihood, bits/dim, of the whole batch; NaN if the
        step was skipped.
        """
        config, model, share = self.config, self.model, share or Share(0, len(x), len(x))
        self._let_gaussians_learn(config.joint)
        generator = self.generator(4, self.step)
        self.flow_optimizer.zero_grad(set_to_none=True)
        self.m_optimizer.zero_grad(set_to_none=True)
        loss = nll = torch.zeros((), dtype=model.dtype, device=self.device)
        if len(x):
            shown = self.augmented(x, generator, share)
            z, logdet = encode(model, shown, config, generator, share, config.latent_noise)
            # Means over the batch are sums of the ranks' means, each times its part of the images.
            means = e_step_loss(model.gaussians, z, logdet, y, config)
            loss, nll = (len(x) / share.total * mean for mean in means)
            if loss.requires_grad:  # not so for the identity flow with fixed Gaussians
                loss.backward()
        loss, nll = loss.detach().clone(), nll.detach().clone()
        add_up_gradients(model, loss, nll)
        norm = nn.utils.clip_grad_norm_(list(model.flow.parameters()), CLIP_NORM)
        # One read per step, of all numbers at once: a bad step has to be known before the weights move.
        value, bits, norm_value = torch.stack([loss, nll / math.log(2), norm.to(loss)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            self.bad_steps += 1
            return math.nan, math.nan
        self.flow_optimizer.step()
        if config.joint:
            # The schedule's rate includes the lower rates after a rollback.
            self.gaussian_step(JOINT_LR * self.flow_optimizer.param_groups[0]["lr"] / self.lr)
        if self.ema is not None:
            self.ema.update(model.flow, step=self.step + 1)
        return value, bits

    # ---- the M-step ----------------------------------------------------------------------------------------------

    def kld_weight(self) -> float:
        """lambda_t: falls linearly from `kld_weight` to half of it at the last M-step; 0 without repulsion."""
        share = min(1.0, self.m_done / max(1, self.m_total - 1))
        return self.config.kld_weight * (1 + (KLD_WEIGHT_END - 1) * share) if self.config.repels else 0.0

    def m_step(self) -> None:
        """One pass over D_g and `m_steps` Adam steps on the Gaussians (Eq. 5, the flow fixed)."""
        statistics, steps = self.latent_pass(self.m_done, self.split.g), self.config.m_steps
        for rate in self.m_rates[self.m_done * steps : (self.m_done + 1) * steps]:
            self.descend(statistics, rate * self.lr_scale)
        if self.m_done == 0:
            # As the authors do: the moments of the first, large gradients are forgotten.
            self.m_optimizer.state.clear()
        self.m_done += 1

    def m_loss(self, statistics: LatentStatistics) -> Tensor:
        """The M-step's loss, the same on all ranks."""
        return m_step_loss(self.model.gaussians, statistics, self.config, self.kld_weight())

    def descend(self, statistics: LatentStatistics, rate: float) -> None:
        """One step of Adam down `m_loss`. DivergenceError: the loss or its gradient is not finite."""
        gaussians = self.model.gaussians
        self._let_gaussians_learn(True)
        loss = self.m_loss(statistics)
        self.m_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in gaussians.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads)):
            raise DivergenceError(f"the M-step's loss or its gradient is not finite (loss {loss.item():.4g})")
        self.gaussian_step(rate)

    def gaussian_step(self, rate: float) -> None:
        """One step of Adam on the Gaussians with the gradients that they have."""
        self.m_optimizer.param_groups[0]["lr"] = rate
        self.m_optimizer.step()
        self.model.gaussians.project()

    def _let_gaussians_learn(self, learn: bool) -> None:
        """Whether the next loss has gradients with respect to the Gaussian parameters that the run learns."""
        self.model.gaussians.mu.requires_grad_(learn and self.config.learns("means"))
        self.model.gaussians.s.requires_grad_(learn and self.config.learns("variances"))

    # ---- the refit -----------------------------------------------------------------------------------------------

    def refit_rows(self) -> np.ndarray:
        """Sorted indices of the images to refit on: all training images after M-steps without repulsion, else none."""
        if not self.m_total or self.config.repels:
            return np.empty(0, np.int64)
        return np.sort(np.concatenate([self.split.nf, self.split.g]))

    def refit(self, model: GLEM, rows: np.ndarray) -> None:
        """Fit the Gaussians to the latents of `rows` under the flow of `model`, which is averaged."""
        means, variances = (self.config.learns(which) for which in ("means", "variances"))
        self.latent_pass(self.m_total, rows, model).most_likely(self.model.gaussians, means, variances)

    def mode_rows(self) -> np.ndarray:
        """Sorted indices of the images that the modes are fitted to, one class in memory at a time."""
        return self.some_of_each_class(np.arange(len(self.data)), 1)

    def some_of_each_class(self, rows: np.ndarray, classes: int) -> np.ndarray:
        """Some of `rows`, chosen at random and sorted, so that memory holds the latents of `classes` classes."""
        rows = np.random.default_rng([self.config.seed, 0x2EF17]).permutation(rows)
        most = max(LEAST_IMAGES, MOST_NUMBERS // (self.model.dim * classes))
        return np.sort(
            np.concatenate([rows[self.data.targets[rows] == k][:most] for k in range(self.model.num_classes)])
        )

    # ---- measuring and state -------------------------------------------------------------------------------------

    def evaluated(self) -> GLEM:
        """The model as it would be saved now: averaged flow, current Gaussians."""
        flow = self.model.flow if self.ema is None else self.ema.module
        return GLEM(self.model.config, flow, self.model.latent_classes, self.model.codec)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Metrics of the held-out images, or of D_g if none are held out; and the Gaussians' state."""
        rows = self.split.val if len(self.split.val) else self.split.g
        metrics = held_out(self.evaluated(), self.images(rows, EVAL_BATCH))
        return {**metrics, **gaussian_state(self.model.gaussians)}

    def is_finite(self) -> bool:
        """Whether every weight, averaged ones too, is finite."""
        tensors = [*self.model.state_dict().values(), *self._ema_state().values()]
        return bool(torch.stack([torch.isfinite(t).all() for t in tensors if t.is_floating_point()]).all())

    def _ema_state(self) -> dict[str, Tensor]:
        return {} if self.ema is None else self.ema.state_dict()

    def set_lr_scale(self, scale: float) -> None:
        """Multiply all learning rates of both steps by `scale`, in (0, 1], from now on."""
        self.lr_scale = scale
        for group in self.flow_optimizer.param_groups:
            group["lr_scale"] = scale  # timm's schedulers multiply by it
        self.scheduler.step_update(self.step)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as JSON facts and named tensors.

        The schedules, the learning rates, the order of the images and the noise follow from the settings and the step.
        """
        guard, series = self.guard.state()
        facts = {
            "config": self.config.to_dict(),
            "flow": json.dumps(self.model.config.flow),  # as text, which keeps the order of the keys
            "autoencoder": self.saved_as.autoencoder,
            **{name: getattr(self, name) for name in _COUNTERS},
            "lr_scale": self.lr_scale,
            "epoch_loss": list(self.epoch_loss),
            "guard": guard,
        }
        groups = {
            "model": self.model.state_dict(),
            "ema": self._ema_state(),
            "flow_optimizer": optimizer_tensors(self.flow_optimizer),
            "m_optimizer": optimizer_tensors(self.m_optimizer),
            "run": {"rng": torch.get_rng_state()},
            "guard": series,
        }
        return facts, {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `state` was taken. Raises TrainingError for a checkpoint that does not fit this run."""
        facts, parts = checkpoint.facts, defaultdict[str, dict[str, Tensor]](dict)
        for name, tensor in checkpoint.tensors.items():
            group, _, rest = name.partition("/")
            parts[group][rest] = tensor
        try:
            self.model.load_state_dict(parts["model"], strict=True)
            if self.ema is not None:
                self.ema.load_state_dict(parts["ema"])
            load_optimizer_tensors(self.flow_optimizer, parts["flow_optimizer"])
            load_optimizer_tensors(self.m_optimizer, parts["m_optimizer"])
            torch.set_rng_state(parts["run"]["rng"])
            self.guard.load(facts["guard"], parts["guard"])
            for name in _COUNTERS:
                setattr(self, name, facts[name])
            self.epoch_loss = facts["epoch_loss"][0], facts["epoch_loss"][1]
            self.set_lr_scale(facts["lr_scale"])
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"{checkpoint.path} does not fit this run: {type(error).__name__}: {reason}") from error


@contextmanager
def training_mode(flow: Flow, config: TrainConfig) -> Iterator[None]:
    """Apply `precision` and `memory` to the flow that is trained; outside, it is float32 and keeps its activations."""
    flow.set_autocast(torch.bfloat16 if config.precision == "bf16" else None)
    flow.set_memory(config.memory)
    try:
        yield
    finally:
        flow.set_autocast(None)
        flow.set_memory("stored")
