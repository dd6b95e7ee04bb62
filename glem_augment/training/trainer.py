"""A training run: the loop, its checkpoints, and the model at its end. A killed run goes on from its checkpoint.

The procedure is EM-like (Sec. 4.3, Algorithm 1). E-step: the flow's weights by Eq. 3 on D_nf, the Gaussians fixed.
M-step: the Gaussians by Eq. 5 on D_g, the flow fixed. A joint objective has E-steps only, which teach the Gaussians as
well. Every random draw is a function of the seed and of the step's number. So a killed and resumed run takes exactly
the steps of an undisturbed one.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from glem_augment.distributed import Share, add_up, is_primary, progress_bar, wait
from glem_augment.errors import TrainingError
from glem_augment.evaluation.metrics import calibrate, held_out
from glem_augment.evaluation.pictures import compose
from glem_augment.evaluation.preview import class_samples
from glem_augment.images.dataset import ImageData
from glem_augment.io import expand, finite, remove_left_overs, save_png
from glem_augment.model.files import weights_sha256
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import EVAL_BATCH, Augment, Batches, seeded
from glem_augment.training.checkpoint import (
    check_same_run,
    data_fingerprint,
    has_checkpoint,
    load_checkpoint,
    require_unused,
    save_checkpoint,
)
from glem_augment.training.config import TrainConfig
from glem_augment.training.initialisation import INIT_IMAGES, initialise, new_model
from glem_augment.training.latents import LATENTS, kept_views, latent_views
from glem_augment.training.log import Callback, MetricsLog
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import Objective, Progress, objective_of
from glem_augment.training.steps import add_up_gradients, flow_optimizer, latent_pass, m_learning_rates

_STEP_ROWS_EVERY = 50
CLIP_NORM, EMA_DECAY = 1.0, 0.999
JOINT_LR = 1e-2  # the best of a few on held-out training images of a 14x14 Fashion-MNIST
FAR = 2.0  # bits per number behind independent pixels (or latents) and the first step: such a step is away
PATIENCE, NOT_FINITE = 100, 10  # steps away in a row that end a run; a step that is not finite counts as so many
_COUNTED = ("step", "m_done", "bad_steps", "away", "independent", "limit", "epoch_loss")


class Trainer:
    """Fits a GLEM to `data`, see `fit`. Every rank has a Trainer; rank 0 writes the files.

    Args:
        out: folder for the checkpoint, the log and, at the end, the model.
        resume: go on from the checkpoint in `out`, if there is one, with the same data, settings and `init_model`.
        init_model: start from this model's flow (fine-tuning); `preset` and `flow_options` then have no effect.
        device: "cpu", "cuda", or None for CUDA where there is one.
        callbacks: functions of a row of metrics.jsonl, a dict with "kind" and "step", called when it is written. To end
            the run after the current step, with a checkpoint, set the trainer's `stop_requested`.
        ready: a function of the trainer, called when a resumed run is restored, and before a new flow is initialised,
            which may take minutes.
        objective: replaces the settings' objective, see `training.objective`.
        augment: replaces the settings' augmentation of images, see `training.batches.Augment`.

    Attributes:
        batches, objective, log: the parts of the run. model: in training.
        optimizer, scheduler, lr: of the flow, and the learning rate at the end of the warm-up.
        ema: the flow with a moving average of its weights, or None for a flow without weights.
        step: E-steps taken, of `total_steps`. m_done: M-steps taken, of `m_total`, in the first `m_epochs` epochs.
        bad_steps: E-steps that were skipped because they were not finite.
        independent: bits per number of independent pixels, or latents.

    Raises:
        DataError: data that can't be trained on. TrainingError: a checkpoint of another run, or `out` has one
            and `resume` is false.
    """

    checkpoint_seconds = 120.0  # between checkpoints within an epoch

    def __init__(
        self,
        data: ImageData,
        config: TrainConfig,
        out: str | Path,
        resume: bool = False,
        init_model: GLEM | None = None,
        device: str | torch.device | None = None,
        callbacks: Sequence[Callback] = (),
        ready: Callable[[Any], object] = lambda trainer: None,
        objective: Objective | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.config, self.out = config, expand(out)
        self.objective = objective or objective_of(config)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step = self.m_done = self.bad_steps = self.away = 0
        self.independent = self.limit = math.inf
        self.epoch_loss = (0.0, 0)  # sum and number of the finite losses of the current epoch
        self.stop_requested, self.log = False, MetricsLog(self.out, callbacks)
        self._began = time.monotonic()
        self.identity: dict[str, Any] = {
            "settings": {**config.to_dict(), **self.objective.settings()},
            "fingerprint": data_fingerprint(data),
            "init_from": init_model and {"origin": init_model.origin, "weights_sha256": weights_sha256(init_model)},
        }
        begun = load_checkpoint(self.out) if resume and has_checkpoint(self.out) else None
        if begun is not None:
            check_same_run(self.out, begun, self.identity)
        else:
            require_unused(self.out)
        wait()  # all ranks read the folder before rank 0 writes
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.batches = Batches(data, config, self.device, augment)
        self.model = new_model(data, config, self.objective, init_model).to(self.device)
        self.precision = torch.bfloat16 if config.precision == "bf16" else None
        for dtype, part in ((self.precision, config.dropout), (None, 0.0)):  # ValueError: the flow does not have these
            self.model.flow.set_autocast(dtype)
            self.model.flow.set_dropout(part)
        if not self.model.codec.levels:
            if augment is not None:
                raise ValueError("augment changes pixels, and latents are encoded once: give TrainConfig(augment=...)")
            self._encode_once()
        self.steps_per_epoch = self.count_steps()
        self.total_steps = self.steps_per_epoch * config.epochs
        self.m_epochs = self.objective.m_epochs(config.epochs)
        self.m_total = self.objective.m_rounds * self.m_epochs
        self.m_rates = m_learning_rates(self.m_total, config.m_steps, self.m_epochs * self.steps_per_epoch)
        self.optimizer, self.scheduler = flow_optimizer(self.model.flow, config, self.total_steps)
        self.lr = float(self.scheduler.base_values[0])
        self.gaussian_optimizer = self.objective.gaussian_optimizer(self.model.gaussians)
        if begun is None:
            ready(self)
            self.independent = initialise(self.model, self.batches, self.objective, init_model)
        self.ema: ModelEmaV3 | None = None
        if any(True for _ in self.model.flow.parameters()):
            self.ema = ModelEmaV3(self.model.flow, decay=EMA_DECAY, use_warmup=True)
        if begun is not None:
            self.restore(begun)
            ready(self)

    def _encode_once(self) -> None:
        """Let the batches hold the images' latents, so that they are encoded only once."""
        config, codec, data = self.config, self.model.codec, self.batches.data
        codec.fit(data.some(INIT_IMAGES))
        how = config.augment, config.views, config.seed
        made_of = {"fingerprint": self.identity["fingerprint"], "codec": self.model.config.autoencoder, "how": how}
        views = kept_views(self.out / LATENTS, made_of, lambda: latent_views(codec, data, *how, device=self.device))
        self.batches.data, self.batches.views = data.with_numbers(views[:, 0]), data.with_numbers(views)

    def count_steps(self) -> int:
        """E-steps of an epoch."""
        return max(1, len(self.epoch_rows(0)) // self.config.batch_size)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch: D_nf, and D_g where no M-step needs it."""
        split = self.batches.split
        has_m_steps = epoch < self.objective.m_epochs(self.config.epochs)
        return split.nf if has_m_steps else np.concatenate([split.nf, split.g])

    # ---- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> GLEM:
        """Run to the end; returns the fitted model, which is also saved to `out`.

        Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second Ctrl-C ends it at once.

        Raises:
            KeyboardInterrupt: the run was stopped; go on with `resume`.
            TrainingError: the run diverged: `PATIENCE` steps in a row were not finite, or had a likelihood `FAR` behind
                independent pixels and behind the first step. The last good checkpoint stays.
        """
        if is_primary():
            remove_left_overs([*self.out.glob(".*.tmp"), *self.out.glob("samples/.*.tmp")])
            self.log.begin(self.step)
        self.bar = progress_bar("train", total=self.total_steps, unit="step", begun=self.step)
        with closing(self.bar), _stop_between_steps(self):
            metrics = self._train()
        return self._finish(metrics)

    def _train(self) -> dict[str, float] | None:
        """All epochs that are left. Returns the metrics of the last one; None if none was left."""
        metrics, per_epoch = None, self.steps_per_epoch
        self.save_checkpoint()
        while self.step < self.total_steps:
            # E-steps on the batches of an epoch, with the M-steps that are due between them
            (epoch, first), began = divmod(self.step, per_epoch), time.monotonic()
            batches = self.batches.epoch(self.epoch_rows(epoch), epoch, per_epoch, first)
            self.model.flow.set_autocast(self.precision)
            with closing(batches):
                for position, (x, y, share) in enumerate(batches, first):
                    for _ in range(self.m_steps_due(epoch, position)):
                        self.m_step()
                    loss, bits = self.e_step(x, y, share)
                    self.step += 1
                    self.scheduler.step_update(self.step)
                    self._stop_if_diverged(bits)
                    self._report_step(loss, bits)
                    if self.step % per_epoch:  # otherwise the checkpoint has the epoch's metrics, below
                        self._save_or_stop()
            rate = max(1, per_epoch - first) * share.total / max(1e-9, time.monotonic() - began)
            # evaluation in float32, and checkpoint
            self.model.flow.set_autocast(None)
            metrics = self.measure()
            self._report_epoch(epoch + 1, metrics, rate)
            self._draw_samples(epoch + 1)
            self.save_checkpoint()
            self._save_or_stop(saved=True)
        return metrics

    def e_step(self, x: Tensor, y: Tensor, share: Share) -> tuple[float, float]:
        """One step of Adamax on the flow (Eq. 3), and with a joint objective one of Adam on the Gaussians.

        x and y are this rank's `share` of the batch: images uint8 [b,C,H,W], or views of latents [b,V,c,h,w], and
        labels int64 [b]; b may be 0. Returns the loss, nats per dimension, and the likelihood, bits/dim, of the whole
        batch; NaN if the step was skipped because it was not finite.
        """
        config, model, objective = self.config, self.model, self.objective
        self._let_gaussians_learn(objective.joint)
        generator = seeded(config.seed, 4, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.gaussian_optimizer.zero_grad(set_to_none=True)
        loss = nll = torch.zeros((), dtype=model.dtype, device=model.device)
        if len(x):
            shown = self.batches.augmented(x, generator, share)
            if config.dropout:  # M-steps and measurements are without
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                model.flow.set_dropout(config.dropout)
            h = objective.numbers(model, shown, generator, share, config.latent_noise)
            z, logdet = model.encode_numbers(h)
            # Means over the batch are sums of the ranks' means, each times its part of the images.
            means = objective.e_loss(model.gaussians, z, logdet, y, self.so_far)
            loss, nll = (len(x) / share.total * mean for mean in means)
            if loss.requires_grad:  # not so for the identity flow with fixed Gaussians
                loss.backward()
            model.flow.set_dropout(0.0)
        loss, nll = loss.detach().clone(), nll.detach().clone()
        add_up_gradients(model, loss, nll)
        norm = nn.utils.clip_grad_norm_(list(model.flow.parameters()), CLIP_NORM)
        # One read per step, of all numbers at once: a bad step has to be known before the weights move.
        value, bits, norm_value = torch.stack([loss, nll / math.log(2), norm.to(loss)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            return math.nan, math.nan
        self.optimizer.step()
        if objective.joint:
            self._move_gaussians(JOINT_LR * self.optimizer.param_groups[0]["lr"] / self.lr)
        if self.ema is not None:
            self.ema.update(model.flow, step=self.step + 1)
        return value, bits

    def m_steps_due(self, epoch: int, position: int) -> int:
        """How many M-steps come before the batch number `position` of an epoch."""
        if epoch >= self.m_epochs:
            return 0
        rounds = self.objective.m_rounds
        here = [r for r in range(rounds) if r * self.steps_per_epoch // rounds == position]
        return sum(self.m_done <= epoch * rounds + r for r in here)

    def m_step(self) -> None:
        """One pass over D_g, and a few steps of Adam on the Gaussians (Eq. 5)."""
        statistics = latent_pass(self.model, self.batches, self.objective, self.batches.split.g, self.m_done)
        each = self.config.m_steps
        for rate in self.m_rates[self.m_done * each : (self.m_done + 1) * each]:
            self.descend(statistics, rate)
        if self.m_done == 0:
            # As the authors do: the moments of the first, large gradients are forgotten.
            self.gaussian_optimizer.state.clear()
        self.m_done += 1

    def descend(self, statistics: LatentStatistics, rate: float) -> None:
        """One step of Adam down the M-step's loss. TrainingError: the loss or its gradient is not finite."""
        gaussians = self.model.gaussians
        self._let_gaussians_learn(True)
        loss = self.objective.m_loss(gaussians, statistics, self.so_far)
        self.gaussian_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in gaussians.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads)):
            raise TrainingError(
                f"the run diverged: the M-step's loss ({loss.item():.4g}) or its gradient is not finite; train with a "
                "lower kld_weight or lr"
            )
        self._move_gaussians(rate)

    def _let_gaussians_learn(self, learn: bool) -> None:
        """Whether the next loss has gradients with respect to the Gaussians' parameters that the run learns."""
        for name in ("mu", "s"):
            getattr(self.model.gaussians, name).requires_grad_(learn and name in self.objective.learned)

    def _move_gaussians(self, rate: float) -> None:
        """One step at a learning rate, with the gradients that the Gaussians have."""
        self.gaussian_optimizer.param_groups[0]["lr"] = rate
        self.gaussian_optimizer.step()
        self.model.gaussians.project()

    @property
    def so_far(self) -> Progress:
        """The steps that were taken, and all steps."""
        return Progress(self.step, self.total_steps, self.m_done, self.m_total)

    def _stop_if_diverged(self, bits: float) -> None:
        """Count the steps in a row that are away, by their likelihood in bits per number. TrainingError: too many."""
        self.bad_steps += math.isnan(bits)
        if self.limit == math.inf and math.isfinite(bits):
            self.limit = max(self.independent, bits) + FAR
        self.away = 0 if bits <= self.limit else self.away + (NOT_FINITE if math.isnan(bits) else 1)
        if self.away >= PATIENCE:
            raise TrainingError(
                f"the run diverged: at step {self.step} its likelihood is {bits:.4g} bits per number, not below "
                f"{self.limit:.4g} (nan: not finite). The checkpoint of step {self.saved_step} stays: go on with "
                f"--resume and an lr below {self.config.lr:g}, or start anew with more warmup_steps"
            )

    def _save_or_stop(self, saved: bool = False) -> None:
        """Write a checkpoint if it is due and not `saved`, and end the run if the user asks for it.

        Clocks and signals differ between ranks, so the request of any rank counts for all.
        """
        votes = torch.tensor([self.stop_requested, time.monotonic() - self.saved_at > self.checkpoint_seconds]).float()
        add_up(votes)
        stop, due = votes.bool().tolist()
        if (stop or due) and not saved:
            self.save_checkpoint()
        if stop:
            raise KeyboardInterrupt(
                f"stopped at step {self.step} of {self.total_steps}; go on from the checkpoint with --resume"
            )

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluated(self) -> GLEM:
        """The model as it would be saved now: averaged flow, current Gaussians."""
        model, ema = self.model, self.ema
        return GLEM(model.config, model.flow if ema is None else ema.module, model.latent_classes, model.codec)

    def measure(self) -> dict[str, float]:
        """Metrics of the held-out images, or of D_g if none are held out."""
        split = self.batches.split
        rows = split.val if len(split.val) else split.g
        return held_out(self.evaluated(), self.batches.data, self.batches.read(rows, EVAL_BATCH))

    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, over all its pieces, without steps lost to kills."""
        return time.monotonic() - self._began

    def _reported(self, bits: float) -> tuple[str, str, float]:
        """A likelihood of `bits` per number as it is reported: its key, unit and value."""
        key, unit, divisor = self.model.likelihood
        return key, unit, bits * math.log(2) * self.model.dim / divisor

    def _report_step(self, loss: float, bits: float) -> None:
        """Show the step that was taken; its loss is in nats per dimension, its likelihood in bits/dim."""
        total, counted = self.epoch_loss
        if math.isfinite(loss):  # otherwise the step was skipped
            self.epoch_loss = total + loss, counted + 1
        self.bar.update(1)
        if self.step % _STEP_ROWS_EVERY == 0:
            key, unit, likelihood = self._reported(bits)
            self.bar.set_postfix_str(f"loss {loss:.3f} nats/dim, {likelihood:.3f} {unit}", refresh=False)
            row = {"kind": "step", "step": self.step, "loss": loss, key: likelihood, "bad_steps": self.bad_steps}
            self.log.add(row)

    def _report_epoch(self, epochs: int, metrics: dict[str, float], images_per_second: float) -> None:
        """Log and show the epoch that has ended."""
        total, counted = self.epoch_loss
        self.epoch_loss = 0.0, 0
        loss = total / max(1, counted)
        self.log.add({
            "kind": "epoch", "step": self.step, "epoch": epochs, "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": images_per_second,
            "seconds": self.seconds(), "bad_steps": self.bad_steps, **self.objective.weights(self.so_far), **metrics,
        })  # fmt: skip
        if is_primary():
            key, unit, _ = self.model.likelihood
            which = f"{metrics['val_images']} {'held-out' if len(self.batches.split.val) else 'training'} images"
            right = f", accuracy {100 * metrics['val_accuracy']:.1f} %" if "val_accuracy" in metrics else ""
            self.bar.write(
                f"epoch {epochs}/{self.config.epochs}: {metrics[f'val_{key}']:.3f} {unit}{right} on {which}; "
                f"loss {loss:.3f} nats/dim, {images_per_second:.0f} images/s"
            )

    def _draw_samples(self, epochs: int) -> None:
        """Draw samples of each class, always from the same noise, if they are due after this epoch."""
        every = self.config.sample_every
        if is_primary() and every and (epochs % every == 0 or epochs == self.config.epochs):
            picture = compose(f"After epoch {epochs}", [class_samples(self.evaluated(), seed=0)])
            save_png(picture, self.out / "samples" / f"epoch_{epochs:04d}.png")

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write the state of the run, unless its last step was away: then the good checkpoint before it stays."""
        self.saved_at = time.monotonic()
        if not self.away:
            if is_primary():
                save_checkpoint(self.out, self.state())
            self.saved_step = self.step
        wait()

    @property
    def learned(self) -> nn.ModuleDict:
        """The parts of the model that a run changes."""
        return nn.ModuleDict({"flow": self.model.flow, "latent_classes": self.model.latent_classes})

    def state(self) -> dict[str, Any]:
        """The state of the run, nested.

        The schedules, the learning rates, the order of the images and the noise follow from the settings and the step.
        """
        return {
            **self.identity,
            **{name: getattr(self, name) for name in _COUNTED},
            "seconds": self.seconds(),
            "model": self.learned.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
            "flow_optimizer": self.optimizer.state_dict(),
            "m_optimizer": self.gaussian_optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. TrainingError: it does not fit this run."""
        try:
            self.learned.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["flow_optimizer"])
            self.gaussian_optimizer.load_state_dict(state["m_optimizer"])
            torch.set_rng_state(state["rng"])
            for name in _COUNTED:
                setattr(self, name, state[name])
            self._began -= state["seconds"]
            self.scheduler.step_update(self.step)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"the checkpoint in {self.out} does not fit this run: {reason}") from error

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self, metrics: dict[str, float] | None) -> GLEM:
        """Fit the modes and the temperature, and save the model. `metrics`: of the last epoch, if this run had it."""
        config, model, batches = self.config, self.evaluated(), self.batches
        if self.refit(model):
            metrics = self.measure()
            self.log.add({"kind": "final", "step": self.step, **metrics})
        model.config.training = self._record(self.measure() if metrics is None else metrics)
        model.eval().requires_grad_(False)
        if len(batches.split.val):
            calibrate(model, batches.data.subset(batches.split.val))
        if config.modes_rank:
            data = batches.data.subset(batches.some_of_each_class(np.arange(len(batches.data)), model.dim))
            model.fit_modes(data, config.modes_rank)
        if is_primary():
            model.save(self.out)
            (self.out / LATENTS).unlink(missing_ok=True)
        wait()
        return model

    def refit(self, model: GLEM) -> bool:
        """Fit the Gaussians of `model`, whose flow is averaged, after the last step.

        Returns whether they changed; here they stay. A subclass may fit them.
        """
        return False

    def _record(self, metrics: dict[str, float]) -> dict[str, Any]:
        """The record of the run in `config.json`, the same for a run that was killed and resumed."""
        key, _, independent = self._reported(self.independent)
        # Without held-out images, training images were measured. Their metrics are not recorded.
        held_out = ("val_images", "val_accuracy", f"val_{key}") if len(self.batches.split.val) else ()
        init_from = self.identity["init_from"]
        unrecorded = ("preset", "flow_options") if init_from else ()
        return {
            "data": self.batches.data.name,
            "images": len(self.batches.data),
            "config": {name: value for name, value in self.identity["settings"].items() if name not in unrecorded},
            "held_out": finite({name: metrics[name] for name in held_out if name in metrics}),
            "independent_pixels": independent,  # or latents, in the unit of the likelihood
            "worse_than_independent_pixels": not metrics[f"val_{key}"] < independent,
            **({} if init_from is None else {"init_from": init_from}),
            "bad_steps": self.bad_steps,
        }


@contextmanager
def _stop_between_steps(run: Trainer) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into requests to stop, since a checkpoint holds whole steps only.

    A second Ctrl-C ends the run at once.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if run.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_requested = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
