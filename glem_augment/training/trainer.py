"""Fitting a GLEM: the EM-like procedure of the paper (Sec. 4.3, Algorithm 1).

E-step: the flow's weights by Eq. 3 on D_nf, the Gaussians fixed. M-step: the Gaussians by Eq. 5 on D_g, the flow fixed.
Every random draw is a function of the seed and of the step's number, and a checkpoint holds all the rest, so a run that
is killed and resumed takes exactly the steps of one that was not.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from glem_augment.data import ImageData
from glem_augment.errors import DataError, TrainingError
from glem_augment.flows import MultiscaleFlow
from glem_augment.model import GLEM
from glem_augment.training.checkpoint import NAME as CHECKPOINT
from glem_augment.training.checkpoint import check_same_run, data_fingerprint, load_checkpoint, save_checkpoint
from glem_augment.training.config import TrainConfig
from glem_augment.training.image_ops import augment_batch
from glem_augment.training.interrupt import StopRequest, stop_between_steps
from glem_augment.training.logs import MetricsLog, plot_curves, sample_grid
from glem_augment.training.measure import gaussian_state, held_out
from glem_augment.training.mstep import LatentStatistics, m_learning_rates, m_step_loss
from glem_augment.training.optim import WeightAverage, flow_optimizer, gaussian_optimizer
from glem_augment.training.split import Split, epoch_order, stratified_split

_EVAL_BATCH = 256
# ActNorm's start needs a fair estimate of each element's spread.
_INIT_IMAGES = 1024
_STEP_ROWS_EVERY = 50
_SHRINKAGE = 10  # images
# The refit of the Gaussians keeps this many latents in memory, at most; 60,000 of 784 numbers are 190 MB.
_REFIT_NUMBERS = 60_000 * 784
_REFIT_LR = 3e-3


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
    ) -> None:
        self.data, self.config, self.out, self.progress = data, config, Path(out), progress
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        k = len(data.classes)
        self.split: Split = stratified_split(
            data.targets, k, config.g_fraction, config.val_fraction, config.val_max, config.seed
        )
        self.model = self._new_model(init_model).to(self.device)
        self.fingerprint = data_fingerprint(data)
        self.out.mkdir(parents=True, exist_ok=True)
        state = load_checkpoint(self.out) if resume else None
        if state is None and (self.out / CHECKPOINT).exists():
            raise TrainingError(
                f"{self.out} already holds a run; resume it (--resume), or choose another folder with --out"
            )
        if state is not None:
            check_same_run(self.out, state, config, self.fingerprint, data.name)

        batch = min(config.batch_size, len(self.split.nf))
        self.steps_per_epoch = max(1, len(self.split.nf) // batch)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.m_total = config.m_rounds * config.epochs
        self.m_rates = m_learning_rates(config, self.m_total * config.m_steps)
        self.frozen_from = math.ceil(config.freeze_gaussians_at * config.epochs)
        if state is None:
            # Before the optimizer and the average are made: both start from the initialised weights.
            self._initialise(init_model)
        self.flow_optimizer, self.scheduler = flow_optimizer(self.model.flow, config, self.total_steps)
        self.m_optimizer = gaussian_optimizer(self.model.gaussians, config)
        self.average = WeightAverage(self.model.flow, config, self.total_steps)
        self.step, self.m_done, self.bad_steps, self.bad_in_a_row, self.m_bad_in_a_row = 0, 0, 0, 0, 0
        if state is not None:
            self._load(state)
        self.log = MetricsLog(self.out, self.step)
        self._stop = StopRequest()
        self._last_checkpoint = time.monotonic()

    # ---- set-up --------------------------------------------------------------------------------------------------

    def _new_model(self, init_model: GLEM | None) -> GLEM:
        config, data = self.config, self.data
        torch.manual_seed(config.seed)
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
        model = GLEM._build(fresh)
        model.flow.load_state_dict(init_model.flow.state_dict())
        return model

    def _images(self, indices: np.ndarray, batch_size: int):
        for x, y in self.data.batches(indices, batch_size, self.config.workers):
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _generator(self, *key: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.config.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) & (2**63 - 1))

    @torch.no_grad()
    def _initialise(self, init_model: GLEM | None) -> None:
        """Data-dependent ActNorms, then the Gaussians: a function of the seed and the data."""
        config, gaussians = self.config, self.model.gaussians
        rows = np.random.default_rng([config.seed, 0x1217]).permutation(self.split.nf)[:_INIT_IMAGES]
        x = torch.cat([x for x, _ in self._images(rows, _EVAL_BATCH)])
        self.model.initialise(x, self._generator(1))
        if init_model is not None:
            if init_model.class_ids == self.model.class_ids and init_model.config.psi == self.model.config.psi:
                gaussians.load_state_dict(init_model.gaussians.state_dict())
                return
            statistics = self._latent_pass(-1, self.split.g, keep=False)
            n = statistics.count.clamp_min(1)[:, None]
            means = statistics.total / n
            gaussians.mu.copy_(means)
            # Shrunk towards the pooled variance, since D_g may hold few images of a class.
            spread = (statistics.square / n - means * means).clamp_min(0)
            pooled = (spread * n).sum(0) / n.sum()
            gaussians.set_variance((n * spread + _SHRINKAGE * pooled) / (n + _SHRINKAGE))
        elif config.mean_init == "random":
            gaussians.randomise(config.mean_init_std, self._generator(2))
        elif config.mean_init == "class_means":
            statistics = self._latent_pass(-1, self.split.g, keep=False)
            means = statistics.total / statistics.count.clamp_min(1)[:, None]
            # ActNorm leaves unit variance; the Gaussians start at a/2 + c, so the flow will shrink to that.
            # Rare pixels have far-out means; the cut keeps the first steps from being about them alone.
            gaussians.mu.copy_(means.clamp(-2, 2) * gaussians.variance().mean().sqrt())

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "step": self.step,
            "m_done": self.m_done,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "m_bad_in_a_row": self.m_bad_in_a_row,
            "model": self.model.state_dict(),
            "flow_optimizer": self.flow_optimizer.state_dict() if self.flow_optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "m_optimizer": self.m_optimizer.state_dict(),
            "average": self.average.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.flow_optimizer is not None:
            self.flow_optimizer.load_state_dict(state["flow_optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        self.m_optimizer.load_state_dict(state["m_optimizer"])
        self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        for name in ("step", "m_done", "bad_steps", "bad_in_a_row", "m_bad_in_a_row"):
            setattr(self, name, state[name])

    def save_checkpoint(self) -> None:
        """Write the whole state of the run to ``out/checkpoint.pt``, atomically."""
        save_checkpoint(self.out, self._state())
        self._last_checkpoint = time.monotonic()

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
        for x, y in self._images(rows, _EVAL_BATCH):
            z, logdet = model.encode(augment_batch(x, self.config.augment, generator), generator)
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
                    group["lr"] = rate * group["lr_scale"]
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
        """``refit_steps`` of Adam on the Gaussians, on latents of all training images under ``model``'s flow."""
        config = replace(self.config, beta=self.config.refit_beta)
        if not config.refit_steps or not (config.learn_mu or config.learn_sigma):
            return
        rows = np.random.default_rng([config.seed, 0x2EF17]).permutation(np.concatenate([self.split.nf, self.split.g]))
        rows = np.sort(rows[: max(1, _REFIT_NUMBERS // model.dim)])
        statistics = self._latent_pass(self.m_total, rows, keep=bool(config.beta), model=model)
        self.m_optimizer.state.clear()
        for step in tqdm(range(config.refit_steps), desc="refit", disable=not self.progress, dynamic_ncols=True):
            for group in self.m_optimizer.param_groups:
                group["lr"] = _REFIT_LR * (1 - step / config.refit_steps) * group["lr_scale"]
            self._gaussian_step(statistics, config, self.kld_weight())

    def e_step(self, x: Tensor, y: Tensor) -> float:
        """One step of Adamax on the flow (Eq. 3, the Gaussians fixed). Returns the loss, nats per dimension."""
        config, model, gaussians = self.config, self.model, self.model.gaussians
        generator = self._generator(4, self.step)
        x = augment_batch(x, config.augment, generator)
        with torch.no_grad():
            terms = gaussians._density_terms()  # constants of the step; no gradient reaches the Gaussians
        z, logdet = model.encode(x, generator)
        if config.beta:
            inverse, scaled, constant = terms
            scores = torch.addmm(constant + z @ scaled.T, z * z, inverse.T, alpha=-0.5)
            own = scores.gather(1, y[:, None])[:, 0]
        else:
            mu, var = gaussians.mu.detach()[y], gaussians.variance().detach()[y]
            own = -0.5 * ((z - mu).square() / var + var.log() + math.log(2 * math.pi)).sum(1)
        loss = -(own + logdet).mean() / model.dim
        if config.beta:
            loss = loss + self.beta() * F.cross_entropy(config.ce_scale * scores, y)
        if self.flow_optimizer is None:
            return float(loss)
        self.flow_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.flow.parameters(), config.clip_norm)
        # One read per step, of two numbers at once: a bad step has to be known before the weights move.
        value, norm_value = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
        if math.isfinite(value) and math.isfinite(norm_value):
            self.flow_optimizer.step()
            self.bad_in_a_row = 0
            self.average.update(model.flow, self.step + 1)
        else:
            self.bad_in_a_row += 1
            self._bad_step(f"loss {value}, gradient norm {norm_value}", self.bad_in_a_row)
        return value

    def _bad_step(self, what: str, in_a_row: int) -> None:
        self.bad_steps += 1
        if in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{in_a_row} steps in a row were not finite (at step {self.step}: {what}). The last good "
                f"checkpoint stays in {self.out / CHECKPOINT}. Lower lr ({self.config.lr:g}) or "
                f"clip_norm ({self.config.clip_norm:g}), or raise warmup_steps ({self.config.warmup_steps})"
            )

    # ---- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> GLEM:
        """Run to the end; returns the fitted model, which is also saved to ``out``.

        Ctrl-C or SIGTERM ends the run after the step at hand, with a checkpoint; a second Ctrl-C ends it at once.

        Raises:
            KeyboardInterrupt: the run was stopped; go on with ``resume``.
            TrainingError: too many non-finite steps in a row.
            OSError: a file can't be written; the last checkpoint stays.
        """
        config = self.config
        if isinstance(self.model.flow, MultiscaleFlow) and config.precision == "bf16":
            self.model.flow.set_autocast(torch.bfloat16)
        bar = tqdm(
            total=self.total_steps, initial=self.step, unit="step", desc="train", disable=not self.progress,
            dynamic_ncols=True,
        )  # fmt: skip
        if self.step == 0:
            # So that a run killed before its first periodic checkpoint can be resumed like any other.
            self.save_checkpoint()
        with stop_between_steps() as self._stop:
            try:
                for epoch in range(self.step // self.steps_per_epoch, config.epochs):
                    self._epoch(epoch, bar)
            finally:
                bar.close()
        return self._finish()

    def _epoch(self, epoch: int, bar: tqdm) -> None:
        config, per_epoch = self.config, self.steps_per_epoch
        frozen = epoch >= self.frozen_from
        indices = np.concatenate([self.split.nf, self.split.g]) if frozen else self.split.nf
        order = epoch_order(indices, config.batch_size, config.seed, epoch)[:per_epoch]
        offset = self.step - epoch * per_epoch
        # Before which batch each round of the epoch comes; several at one where rounds outnumber batches.
        due = [r * per_epoch // config.m_rounds for r in range(config.m_rounds)]
        began, first, total, counted = time.monotonic(), self.step, 0.0, 0
        batches = self._images(order[offset:].reshape(-1), order.shape[1])
        for position in range(offset, per_epoch):
            for r, before in enumerate(due):
                if before == position and not frozen and epoch * config.m_rounds + r == self.m_done:
                    self.m_step()
            x, y = next(batches)
            loss = self.e_step(x, y)
            self.step += 1
            if self.scheduler is not None:
                self.scheduler.step_update(self.step)
            if math.isfinite(loss):  # else the step was skipped, and counted
                total, counted = total + loss, counted + 1
            bar.update(1)
            if self.step % _STEP_ROWS_EVERY == 0:
                bar.set_postfix(loss=f"{loss:.3f}", bad=self.bad_steps, refresh=False)
                self.log.add({"kind": "step", "step": self.step, "loss": loss, "bad_steps": self.bad_steps})
            if self._stop.requested and position < per_epoch - 1:
                self.save_checkpoint()
                raise KeyboardInterrupt(self._stopped())
            # The last step of an epoch is saved with the epoch's metrics, below.
            late = time.monotonic() - self._last_checkpoint > 60 * config.checkpoint_minutes
            if late and position < per_epoch - 1:
                self.save_checkpoint()
        seconds = max(1e-9, time.monotonic() - began)
        steps = max(1, self.step - first)
        row = {
            "kind": "epoch", "step": self.step, "epoch": epoch + 1, "loss": total / max(1, counted),
            "lr": self.flow_optimizer.param_groups[0]["lr"] if self.flow_optimizer else 0.0,
            "images_per_second": steps * order.shape[1] / seconds, "bad_steps": self.bad_steps,
            "kld_weight": self.kld_weight() if config.repulsion != "none" else 0.0, **self.measure(),
        }  # fmt: skip
        self.log.add(row)
        if self.progress:
            bar.write(
                f"epoch {epoch + 1:3d}  loss {row['loss']:.3f}  bits/dim {row['val_bits_per_dim']:.3f}  "
                f"NF accuracy {100 * row['val_accuracy']:.2f} %  {row['images_per_second']:.0f} images/s"
            )
        self.save_checkpoint()
        if config.sample_every and ((epoch + 1) % config.sample_every == 0 or epoch + 1 == config.epochs):
            sample_grid(self._evaluated(), self.out / "samples" / f"epoch_{epoch + 1:04d}.png")
            plot_curves(self.log.rows, self.out / "curves.png")
        if self._stop.requested:
            raise KeyboardInterrupt(self._stopped())

    def _stopped(self) -> str:
        return f"stopped at step {self.step}; go on from the checkpoint with --resume"

    def _evaluated(self) -> GLEM:
        """The model as it would be saved now: averaged flow in float32, current Gaussians."""
        flow = self.average.best(self.model.flow)
        if isinstance(flow, MultiscaleFlow) and flow is not self.model.flow:
            flow.set_autocast(None)
        return GLEM(self.model.config, flow, self.model.gaussians, self.model.modes)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out metrics, and the state of the Gaussians."""
        rows = self.split.val if len(self.split.val) else self.split.g
        metrics = held_out(self._evaluated(), self._images(rows, _EVAL_BATCH), self._generator(5))
        return {**metrics, **gaussian_state(self.model.gaussians)}

    def _finish(self) -> GLEM:
        model = self._evaluated()
        if isinstance(model.flow, MultiscaleFlow):
            model.flow.set_autocast(None)
        if self.config.refit_steps:
            self.refit(model)
            if not any(row.get("kind") == "final" for row in self.log.rows):
                self.log.add({"kind": "final", "step": self.step, **self.measure()})
        final = next((row for row in reversed(self.log.rows) if row.get("kind") in ("epoch", "final")), {})
        model.config.training = {
            "data": self.data.name,
            "images": len(self.data),
            "config": self.config.to_dict(),
            # JSON has no infinity, and a model that ended badly is still worth saving.
            "held_out": {
                key: final[key] if final[key] is not None and math.isfinite(final[key]) else None
                for key in ("val_images", "val_accuracy", "val_bits_per_dim")
                if key in final
            },
            "bad_steps": self.bad_steps,
        }
        model.eval().requires_grad_(False)
        if self.config.modes_rank:
            smallest = int(np.bincount(self.data.targets, minlength=model.num_classes).min())
            model.fit_modes(self.data, rank=max(1, min(self.config.modes_rank, smallest - 1, model.dim)))
        model.save(self.out)
        plot_curves(self.log.rows, self.out / "curves.png")
        return model
