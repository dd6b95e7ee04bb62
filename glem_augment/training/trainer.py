"""Fitting a GLEM: the EM-like procedure of the paper (Sec. 4.3, Algorithm 1).

E-step: the flow's weights by Eq. 3 on D_nf, the Gaussians fixed. M-step: the Gaussians by Eq. 5 on D_g, the flow fixed.
Every random draw is a function of the seed and of the step's number, and a checkpoint holds all the rest, so a run that
is killed and resumed takes exactly the steps of one that was not.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glem_augment.data.dataset import ImageData
from glem_augment.devices import move
from glem_augment.errors import DataError, TrainingError
from glem_augment.flows import MultiscaleFlow
from glem_augment.io import expand
from glem_augment.model.config import GLEMConfig
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.training.checkpoint import Checkpoint, Checkpoints, check_same_run, data_fingerprint, init_of_run
from glem_augment.training.config import TrainConfig
from glem_augment.training.guard import DivergenceError, LossGuard
from glem_augment.training.logs import MetricsLog
from glem_augment.training.loop import Run
from glem_augment.training.measure import gaussian_state, held_out
from glem_augment.training.mstep import LatentStatistics, m_learning_rates, m_step_loss
from glem_augment.training.objective import augmented, e_step_loss, encode
from glem_augment.training.optim import WeightAverage, flow_optimizer, gaussian_optimizer
from glem_augment.training.split import Split, stratified_split
from glem_augment.training.state import restore, state_of

_EVAL_BATCH = 256
# ActNorm's start needs a fair estimate of each element's spread.
_INIT_IMAGES = 1024
_SHRINKAGE = 10  # images
# The refit of the Gaussians keeps this many latents in memory, at most; 60,000 of 784 numbers are 190 MB.
_REFIT_NUMBERS = 60_000 * 784
_REFIT_LR = 3e-3
_REFIT_LEAST = 8  # images of a class


class Trainer:
    """Fits a GLEM to ``data`` and writes everything to ``out``; ``fit`` does the work.

    Args:
        data: training images.
        config: all settings.
        out: folder for the checkpoint, the logs and, at the end, the model.
        resume: go on from the checkpoint in ``out``.
        init_model: start from this model's flow instead of a new one (fine-tuning); ``preset`` and ``flow_options``
            then say nothing. Give it again to resume.
        device: "cpu", "cuda", or None for CUDA where there is one.
        progress: show a bar on stderr.
        began: when this piece of the run began, on the clock of ``time.monotonic`` (default: now); ``max_minutes``
            counts from there.

    Raises:
        DataError: data that can't be trained on. TrainingError: a checkpoint of another run. OSError: ``out`` can't be
        written. All before any work is done.
    """

    def __init__(
        self,
        data: ImageData,
        config: TrainConfig,
        out: str | Path,
        resume: bool = False,
        init_model: GLEM | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        began: float | None = None,
    ) -> None:
        self.began = time.monotonic() if began is None else began
        self._clock = self.began
        self.data, self.config, self.out, self.progress = data, config, expand(out), progress
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        k = len(data.classes)
        self.split: Split = stratified_split(
            data.targets, k, config.g_fraction, config.val_fraction, config.val_max, config.seed
        )
        self.checkpoints = Checkpoints(self.out)
        begun = self.checkpoints.load() if resume else None
        self.model = self._new_model(init_model, begun).to(self.device)
        self.init_from = None  # for the record
        if init_model is not None:
            self.init_from = {"weights_sha256": weights_sha256(init_model), "origin": init_model.origin}
        self.fingerprint = data_fingerprint(data)
        checkpoint = self._open_folder(resume, begun)
        batch = min(config.batch_size, len(self.split.nf))
        self.steps_per_epoch = max(1, len(self.split.nf) // batch)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.m_total = config.m_rounds * config.epochs
        self.m_rates = m_learning_rates(config, self.m_total * config.m_steps)
        # Learned jointly, or not at all, the Gaussians need no images of their own.
        m_steps = not config.joint and (config.learn_mu or config.learn_sigma)
        self.frozen_from = math.ceil(config.freeze_gaussians_at * config.epochs) if m_steps else 0
        if checkpoint is None:
            # Before the optimizer and the average are made: both start from the initialised weights.
            self._initialise(init_model)
        self.flow_optimizer, self.scheduler = flow_optimizer(self.model.flow, config, self.total_steps)
        self.m_optimizer = gaussian_optimizer(self.model.gaussians, config)
        self.average = WeightAverage(self.model.flow, config, self.total_steps)
        self.guard = LossGuard(config.bits)
        self.step, self.m_done, self.bad_steps, self.bad_in_a_row, self.m_bad_in_a_row = 0, 0, 0, 0, 0
        self.rollbacks, self.lr_scale = 0, 1.0
        self.epoch_loss = (0.0, 0)  # sum and number of the finite losses of the epoch at hand
        if checkpoint is not None:
            restore(self, checkpoint)
            self._clock -= checkpoint.facts["seconds"]

    # ---- set-up --------------------------------------------------------------------------------------------------

    def _open_folder(self, resume: bool, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint to go on from, if any; finds out now whether ``out`` can be written."""
        if not resume and self.checkpoints.exist():
            raise TrainingError(
                f"{self.out} already holds a run; resume it (--resume), or choose another folder with --out"
            )
        if checkpoint is not None:
            check_same_run(checkpoint, self.config, self.fingerprint, self.data.name)
            self.init_from = init_of_run(checkpoint, self.init_from)
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints.clean()
        self.log = MetricsLog(self.out, 0 if checkpoint is None else checkpoint.step)
        return checkpoint

    def _new_model(self, init_model: GLEM | None, begun: Checkpoint | None) -> GLEM:
        config, data = self.config, self.data
        torch.manual_seed(config.seed)
        if init_model is None and begun is not None and begun.facts.get("init_from") and "flow" in begun.facts:
            # The model that the run started from need not be there any more: all weights are in the checkpoint.
            return GLEM(
                GLEMConfig(
                    flow=begun.facts["flow"],
                    bits=config.bits,
                    psi=config.psi,
                    class_ids=list(data.class_ids),
                    class_names=list(data.classes),
                )
            )
        if init_model is None:
            return GLEM.create(
                config.preset, data.image_shape, data.classes, data.class_ids, config.bits, config.psi,
                **config.flow_options,
            )  # fmt: skip
        if init_model.bits != config.bits:
            raise DataError(
                f"the model to start from has {init_model.bits} bits, the settings {config.bits}: use the same"
            )
        if init_model.image_shape != tuple(data.image_shape):
            raise DataError(
                f"the model to start from takes images {init_model.image_shape}, {data.name} has {data.image_shape}"
            )
        fresh = replace(
            init_model.config, psi=config.psi, class_ids=list(data.class_ids), class_names=list(data.classes),
            modes_rank=None, training={},
        )  # fmt: skip
        model = GLEM(fresh)
        model.flow.load_state_dict(init_model.flow.state_dict())
        return model

    def images(self, indices: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images uint8 [B,C,H,W] and labels int64 [B] on the device, in the order of ``indices``."""
        for x, y in self.data.batches(indices, batch_size, self.config.workers):
            yield move(x, self.device), move(y, self.device)

    def _generator(self, *key: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.config.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) & (2**63 - 1))

    def _take_gaussians(self, init_model: GLEM) -> None:
        mine, theirs = self.model.gaussians, init_model.gaussians
        if init_model.config.psi == self.model.config.psi:
            mine.load_state_dict(theirs.state_dict())
            return
        mine.mu.copy_(theirs.mu)
        wanted = theirs.variance().to(mine.s)
        mine.set_variance(wanted)
        worst = float((mine.variance() / wanted).log().abs().max().exp())
        if worst > 1.1:
            warnings.warn(
                f"psi={self.model.config.psi} of the settings can't give the variances of the model to start from: "
                f"they change by up to {worst:.1f} times. Its own is psi={init_model.config.psi}",
                stacklevel=2,
            )

    @torch.no_grad()
    def _initialise(self, init_model: GLEM | None) -> None:
        """Data-dependent ActNorms, then the Gaussians: a function of the seed and the data."""
        config, gaussians = self.config, self.model.gaussians
        rows = np.random.default_rng([config.seed, 0x1217]).permutation(self.split.nf)[:_INIT_IMAGES]
        x = torch.cat([x for x, _ in self.images(rows, _EVAL_BATCH)])
        self.model.initialise(x, self._generator(1))
        if init_model is not None:
            if init_model.class_ids == self.model.class_ids:
                self._take_gaussians(init_model)
                return
            statistics = self._latent_pass(-1, self.split.g, keep=False)
            n = statistics.count.clamp_min(1)[:, None]
            means = statistics.total / n
            gaussians.mu.copy_(means)
            # Shrunk towards the pooled variance, since D_g may hold few images of a class.
            spread = (statistics.square / n - means * means).clamp_min(0)
            pooled = (spread * n).sum(0) / n.sum()
            gaussians.set_variance((n * spread + _SHRINKAGE * pooled) / (n + _SHRINKAGE))
            return
        if config.sigma_init is not None:
            gaussians.set_variance(torch.full_like(gaussians.s, config.sigma_init))
        if config.sigma_init_std:
            noise = torch.randn(gaussians.s.shape, generator=self._generator(6)).to(gaussians.s)
            gaussians.s.add_(config.sigma_init_std * noise)
            gaussians.project()
        if config.mean_init == "random":
            gaussians.randomise(config.mean_init_std, self._generator(2))
        elif config.mean_init == "class_means":
            statistics = self._latent_pass(-1, self.split.g, keep=False)
            means = statistics.total / statistics.count.clamp_min(1)[:, None]
            # ActNorm leaves unit variance; the Gaussians start at a/2 + c, so the flow will shrink to that.
            # Rare pixels have far-out means; the cut keeps the first steps from being about them alone.
            gaussians.mu.copy_(means.clamp(-2, 2) * gaussians.variance().mean().sqrt())

    # ---- state ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, good: bool = False) -> None:
        """Write the whole state of the run to ``out``, atomically; ``good``: one to return to after a divergence."""
        self.checkpoints.save(*state_of(self), good=good)

    def set_lr_scale(self, scale: float) -> None:
        """Multiply all learning rates of both steps by ``scale``, in (0, 1], from now on."""
        self.lr_scale = scale
        if self.flow_optimizer is not None and self.scheduler is not None:
            for group in self.flow_optimizer.param_groups:
                group["lr_scale"] = scale  # timm's schedulers multiply by it
            self.scheduler.step_update(self.step)

    def seconds(self) -> float:
        """Wall-clock seconds spent on the run so far, over all its pieces, what was lost to kills apart."""
        return time.monotonic() - self._clock

    # ---- the two steps -------------------------------------------------------------------------------------------

    def kld_weight(self) -> float:
        """lambda_t: linear from ``kld_weight`` to ``kld_weight_end`` times it over the M-steps."""
        share = self.m_done / max(1, self.m_total - 1)
        return self.config.kld_weight * (1 + (self.config.kld_weight_end - 1) * min(1.0, share))

    def beta(self) -> float:
        """Weight of the cross-entropy now: ``beta``, annealed geometrically over the last part of the run."""
        config, share = self.config, self.step / self.total_steps
        late = max(0.0, share - config.beta_anneal_from) / (1 - config.beta_anneal_from)
        return config.beta * config.beta_end**late

    @torch.no_grad()
    def _latent_pass(
        self, round_index: int, rows: np.ndarray, keep: bool, model: GLEM | None = None
    ) -> LatentStatistics:
        model = model or self.model
        statistics = LatentStatistics(model.num_classes, model.dim, keep, self.device)
        generator = self._generator(3, round_index + 1)
        for x, y in self.images(rows, _EVAL_BATCH):
            z, logdet = encode(model, augmented(x, self.config, generator), self.config, generator)
            statistics.add(z, y, -(model.gaussians.log_prob_of(z, y) + logdet))
        return statistics

    def m_step(self) -> None:
        """One pass over D_g and ``m_steps`` Adam steps on the Gaussians (Eq. 5, the flow fixed)."""
        config = replace(self.config, beta=self.beta())
        weight = self.kld_weight()
        if config.learn_mu or config.learn_sigma:
            statistics = self._latent_pass(self.m_done, self.split.g, keep=bool(config.beta))
            first = self.m_done * config.m_steps
            for rate in self.m_rates[first : first + config.m_steps]:
                for group in self.m_optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"] * self.lr_scale
                self._gaussian_step(statistics, config, weight)
            if self.m_done == 0:
                # As the authors do: the moments of the first, large gradients are forgotten.
                self.m_optimizer.state.clear()
        self.m_done += 1

    def _gaussian_step(self, statistics: LatentStatistics, config: TrainConfig, kld_weight: float) -> None:
        gaussians = self.model.gaussians
        loss = m_step_loss(gaussians, statistics, config, kld_weight)
        self.m_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in (gaussians.mu, gaussians.s) if p.grad is not None]
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads)):
            # Counted apart: good E-steps in between must not hide M-steps that never succeed.
            self.m_bad_in_a_row += 1
            self._bad_step("M-step loss or gradient", self.m_bad_in_a_row)
            return
        self.m_bad_in_a_row = 0
        self.m_optimizer.step()
        gaussians.project()

    def refit(self, model: GLEM) -> None:
        """The Gaussians once more, for latents of the training images under ``model``'s flow: ``refit_steps`` of Adam,
        or in closed form where the loss is the likelihood alone. Adam keeps the latents of as many images as make
        ``_REFIT_NUMBERS`` numbers."""
        config = replace(self.config, beta=self.config.refit_beta)
        if not config.refit_steps or not (config.learn_mu or config.learn_sigma):
            return
        rows = np.random.default_rng([config.seed, 0x2EF17]).permutation(np.concatenate([self.split.nf, self.split.g]))
        exact = config.objective == "mle"
        if not exact:
            rows = _some_of_each(rows, self.data.targets[rows], max(1, _REFIT_NUMBERS // model.dim))
        statistics = self._latent_pass(self.m_total, np.sort(rows), keep=bool(config.beta), model=model)
        if exact:
            statistics.most_likely(self.model.gaussians, config.learn_mu, config.learn_sigma)
            return
        self.m_optimizer.state.clear()
        for step in tqdm(range(config.refit_steps), desc="refit", disable=not self.progress, dynamic_ncols=True):
            for group in self.m_optimizer.param_groups:
                group["lr"] = _REFIT_LR * (1 - step / config.refit_steps) * group["lr_scale"]
            self._gaussian_step(statistics, config, self.kld_weight())

    def e_step(self, x: Tensor, y: Tensor) -> float:
        """One step of Adamax on the flow (Eq. 3; the Gaussians are fixed unless ``joint``).

        Returns the loss, nats per dimension.
        """
        config, model = self.config, self.model
        generator = self._generator(4, self.step)
        z, logdet = encode(model, augmented(x, config, generator), config, generator)
        loss = e_step_loss(model.gaussians, z, logdet, y, config, self.beta())
        if self.flow_optimizer is None:
            return float(loss)
        self.flow_optimizer.zero_grad(set_to_none=True)
        if config.joint:
            self.m_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.flow.parameters(), config.clip_norm)
        # One read per step, of two numbers at once: a bad step has to be known before the weights move.
        value, norm_value = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
        if math.isfinite(value) and math.isfinite(norm_value):
            self.flow_optimizer.step()
            if config.joint:
                self._joint_step()
            self.bad_in_a_row = 0
            self.average.update(model.flow, self.step + 1)
        else:
            self.bad_in_a_row += 1
            self._bad_step(f"loss {value}, gradient norm {norm_value}", self.bad_in_a_row)
        return value

    def _joint_step(self) -> None:
        """Adam on the Gaussians, from the gradients of the E-step's loss, on the flow's schedule."""
        share = self.flow_optimizer.param_groups[0]["lr"] / self.config.lr  # the return after a divergence included
        for group in self.m_optimizer.param_groups:
            group["lr"] = self.config.joint_lr * share * group["lr_scale"]
        self.m_optimizer.step()
        self.model.gaussians.project()

    def _bad_step(self, what: str, in_a_row: int) -> None:
        self.bad_steps += 1
        if in_a_row >= self.config.max_bad_steps:
            raise DivergenceError(f"{in_a_row} steps in a row were not finite ({what})")

    # ---- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> GLEM:
        """Run to the end; returns the fitted model, which is also saved to ``out``.

        Ctrl-C or SIGTERM ends the run after the step at hand, with a checkpoint; a second Ctrl-C ends it at once.

        Raises:
            KeyboardInterrupt: the run was stopped; go on with ``resume``.
            TimeUpError: ``max_minutes`` are over; likewise.
            TrainingError: the run diverged, and ``max_rollbacks`` returns did not help.
            OSError: a file can't be written; the last checkpoint stays.
        """
        return Run(self).go()

    def evaluated(self) -> GLEM:
        """The model as it would be saved now: averaged flow in float32, current Gaussians."""
        flow = self.average.best(self.model.flow)
        if isinstance(flow, MultiscaleFlow) and flow is not self.model.flow:
            flow.set_autocast(None)
        return GLEM(self.model.config, flow, self.model.gaussians, self.model.modes)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out metrics (with none held out, of the images that fit the Gaussians), and the Gaussians' state."""
        rows = self.split.val if len(self.split.val) else self.split.g
        metrics = held_out(self.evaluated(), self.images(rows, _EVAL_BATCH), self._generator(5))
        return {**metrics, **gaussian_state(self.model.gaussians)}


def _some_of_each(rows: np.ndarray, targets: np.ndarray, most: int) -> np.ndarray:
    """The first ``most`` rows, but no fewer than ``_REFIT_LEAST`` of each class that has as many: cross-entropy pushes
    a class without images away."""
    if len(rows) <= most:
        return rows
    order = np.argsort(targets, kind="stable")
    starts = np.searchsorted(targets[order], targets[order])
    within = np.empty(len(rows), dtype=np.int64)
    within[order] = np.arange(len(rows)) - starts
    first = within < _REFIT_LEAST
    return np.concatenate([rows[first], rows[~first][: max(0, most - int(first.sum()))]])
