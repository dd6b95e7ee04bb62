"""A training run: the loop, its checkpoints and rollbacks, and the model at its end.

A run may be killed anywhere and resumed from its checkpoint. Rollback points depend on steps, not on time, so a run
that diverged is as repeatable as any other.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glem_augment.distributed import add_up, is_primary, wait
from glem_augment.errors import TimeUpError, TrainingError
from glem_augment.evaluation.metrics import calibrate, held_out
from glem_augment.evaluation.pictures import compose
from glem_augment.evaluation.preview import class_samples
from glem_augment.images.dataset import ImageData
from glem_augment.io import expand, finite, lock_folder, remove_left_overs, save_png
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.training.batches import EVAL_BATCH, Augment, Batches
from glem_augment.training.checkpoint import (
    Checkpoint,
    check_same_run,
    data_fingerprint,
    load_checkpoint,
    require_unused,
    save_checkpoint,
)
from glem_augment.training.config import TrainConfig
from glem_augment.training.guard import DivergenceError, LossGuard
from glem_augment.training.latents import latent_views, model_of_images, model_of_latents
from glem_augment.training.log import Callback, MetricsLog, plot_curves, progress_bar
from glem_augment.training.objective import Objective, Progress, objective_of
from glem_augment.training.start import INIT_IMAGES, initialise, new_model
from glem_augment.training.steps import (
    EStep,
    GaussianSteps,
    MStep,
    lacks_bf16,
    load_optimizer_tensors,
    optimizer_tensors,
    training_mode,
)

_STEP_ROWS_EVERY = 50
ROLLBACK_FACTOR, MAX_ROLLBACKS = 0.5, 3
_COUNTERS = ("step", "bad_steps", "rollbacks")


class Trainer:
    """Fits a GLEM to `data`, see `fit`. Every rank has a Trainer; rank 0 writes the files.

    Args:
        out: folder for the checkpoints, the logs and, at the end, the model.
        resume: go on from the checkpoint in `out`.
        init_model: start from this model's flow (fine-tuning); `preset` and `flow_options` then have no effect. A
            resumed run does not need it.
        device: "cpu", "cuda", or None for CUDA where there is one.
        began: the start of `max_minutes` on the clock of `time.monotonic`; by default now.
        callbacks: functions of a row of metrics.jsonl, a dict with "kind" and "step", called when it is written. To end
            the run after the current step, with a checkpoint, set the trainer's `stop_requested`.
        ready: a function of the trainer, called before the flow of a new run is initialised, which may take minutes.
        objective: replaces the settings' objective, see `training.objective`.
        augment: replaces the settings' augmentation of images, see `training.batches.Augment`.

    Attributes:
        batches, objective, gaussians, e_step, m_step, guard, log: the parts of the run.
        model: in training; for latents, if there is an autoencoder. step: E-steps taken, of `total_steps`.
        bad_steps: E-steps that were skipped because they were not finite. rollbacks: so far.

    Raises:
        DataError: data that can't be trained on. TrainingError: a checkpoint of another run, or `out` has one
            and `resume` is false. BlockingIOError: another process is at work in `out`.
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
        progress: bool = True,
        began: float | None = None,
        callbacks: Sequence[Callback] = (),
        ready: Callable[[Any], object] | None = None,
        objective: Objective | None = None,
        augment: Augment | None = None,
    ) -> None:
        self._clock = time.monotonic() if began is None else began
        self.deadline = math.inf if config.max_minutes is None else self._clock + 60 * config.max_minutes
        self.config, self.out, self.shown = config, expand(out), progress and is_primary()
        self.objective = objective or objective_of(config)
        self.settings = {**config.to_dict(), **self.objective.settings()}
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step = self.bad_steps = self.rollbacks = 0
        self.epoch_loss = (0.0, 0)  # sum and number of the finite losses of the current epoch
        self.stop_requested, self._resumed = False, resume

        self.fingerprint = data_fingerprint(data)
        begun = self._open_folder(data, resume, init_model)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.batches = Batches(data, config, self.device, self.shown, augment)
        self.guard = LossGuard(config.bits)
        # With an autoencoder, the run is one on latents, and `whole` makes a model of images.
        self._original = new_model(data, config, self.objective, init_model, begun).to(self.device)
        self.model = self._original if self._original.codec.levels else self._take_latents(data)
        self.steps_per_epoch = self.count_steps()
        self.total_steps = self.steps_per_epoch * config.epochs
        self.gaussians = GaussianSteps(self.model.gaussians, self.objective)
        parts = self.model, self.objective, self.gaussians, self.batches, config
        self.m_step = MStep(*parts, self.steps_per_epoch)
        self.e_step = EStep(*parts, self.total_steps)
        if begun is None:
            if ready is not None:
                ready(self)
            self.guard.pixels = initialise(self.model, self.batches, self.objective, init_model)
            if not self.model.codec.levels:
                self.guard.uniform = self.guard.pixels + 2
        self.e_step.start_average()
        if begun is not None:
            self.restore(begun)
        if is_primary():
            self.out.mkdir(parents=True, exist_ok=True)
            remove_left_overs([*self.out.glob(".*.tmp"), *self.out.glob("samples/.*.tmp")])
        self.log = MetricsLog(self.out, self.step, callbacks)

    def _open_folder(self, data: ImageData, resume: bool, init_model: GLEM | None) -> Checkpoint | None:
        """The checkpoint to go on from, or None in an unused folder."""
        with self._locked():  # an error now, before anything is read or written
            pass
        begun = load_checkpoint(self.out) if resume else None
        self.init_from = None
        if begun is not None:
            check_same_run(begun, self.settings, self.fingerprint, data.name)
            self.init_from = begun.facts["init_from"]
            self._clock -= begun.facts["seconds"]
        else:
            require_unused(self.out)
            if init_model is not None:
                self.init_from = {"origin": init_model.origin, "weights_sha256": weights_sha256(init_model)}
                _warn_of_another_split(init_model.config.training, data, self.config)
        wait()  # all ranks read the folder before rank 0 writes
        return begun

    def _locked(self) -> AbstractContextManager[None]:
        return lock_folder(self.out) if is_primary() else nullcontext()

    def _take_latents(self, data: ImageData) -> GLEM:
        """Replace the run's images by their latents, so that they are encoded only once; the model of latents."""
        config, model = self.config, self._original
        model.codec.fit(data.some(INIT_IMAGES))
        views = latent_views(model.codec, data, config.augment, config.seed, self.device, self.shown)
        self.batches.data, self.batches.views = data.with_numbers(views[:, 0]), data.with_numbers(views)
        return model_of_latents(model)

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
            KeyboardInterrupt, TimeUpError: the run was stopped, or `max_minutes` are over; go on with `resume`.
            TrainingError: the run diverged, and returns to the last good checkpoint did not help.
            BlockingIOError: another process is at work in `out`.
        """
        with self._locked():
            metrics = self._train()
            return self._finish(metrics)

    def _train(self) -> dict[str, float] | None:
        """All epochs that are left. Returns the metrics of the last one; None if none was left."""
        config, flow, per_epoch = self.config, self.model.flow, self.steps_per_epoch
        metrics = None
        self.saved_at = time.monotonic()
        self.bar = progress_bar("train", self.total_steps, "step", self.shown, self.step)
        with closing(self.bar), _stop_between_steps(self):
            self._begin()
            while self.step < self.total_steps:
                epoch, first = divmod(self.step, per_epoch)
                try:
                    # E-steps on the batches of an epoch, with the M-steps that are due between them
                    began = time.monotonic()
                    batches = self.batches.epoch(self.epoch_rows(epoch), epoch, per_epoch, first)
                    with closing(batches), training_mode(flow, config):
                        for position, (x, y, share) in enumerate(batches, first):
                            for _ in range(self.m_step.due(epoch, position)):
                                self.m_step.take(self.so_far)
                            loss, bits = self.e_step.take(x, y, share, self.so_far)
                            self.bad_steps += math.isnan(loss)
                            self.guard.see(loss, bits)
                            self.step += 1
                            self.e_step.scheduler.step_update(self.step)
                            self._report_step(loss, bits)
                            # The last step of an epoch is saved with the epoch's metrics, below.
                            if self.step % per_epoch:
                                self._save_or_stop(saved=False)
                    rate = max(1, per_epoch - first) * share.total / max(1e-9, time.monotonic() - began)
                    # evaluation and checkpoint
                    metrics = self.measure()
                    self._report_epoch(epoch + 1, metrics, rate)
                    self.save_checkpoint(good=self.guard.calm)
                    self._draw_pictures(epoch + 1)
                    self._save_or_stop(saved=True)
                except DivergenceError as error:
                    self._roll_back(error)
        return metrics

    def _begin(self) -> None:
        """The checkpoint before the first step, or the pictures that a resumed run may lack."""
        if self.config.precision == "bf16" and lacks_bf16(self.device):
            warnings.warn(
                "this CPU has neither AVX512-BF16 nor AMX, so steps in bf16 take several times as long as in float32: "
                "leave out precision='bf16' (--precision bf16)", stacklevel=4,
            )  # fmt: skip
        if self.step == 0:
            # A run may be killed before its first periodic checkpoint, or diverge in its first epoch.
            self.save_checkpoint(good=True)
            if not self._resumed:
                self._save_or_stop(saved=True)  # the initialisation may have taken all of `max_minutes`
        elif self.step % self.steps_per_epoch == 0:
            # The kill may have come between the checkpoint of an epoch and its pictures.
            self._draw_pictures(self.step // self.steps_per_epoch)

    @property
    def so_far(self) -> Progress:
        """The steps that were taken, and all steps."""
        return Progress(self.step, self.total_steps, self.m_step.done, self.m_step.total)

    def _save_or_stop(self, saved: bool) -> None:
        """Write a checkpoint if it is due, and end the run if the user or the clock asks for it.

        `saved`: there is a checkpoint of this step already. Clocks and signals differ between ranks, so the request of
        any rank counts for all.
        """
        now = time.monotonic()
        votes = torch.tensor([self.stop_requested, now >= self.deadline, now - self.saved_at > self.checkpoint_seconds])
        votes = votes.float()
        add_up(votes)
        stop, late, due = votes.bool().tolist()
        if (stop or late or due) and not saved:
            self.save_checkpoint()
        if not (stop or late):
            return
        where = f"stopped at step {self.step} of {self.total_steps}"
        if stop:
            raise KeyboardInterrupt(f"{where}; go on from the checkpoint with --resume")
        raise TimeUpError(
            f"{where}: the {self.config.max_minutes:g} minutes are over; run the same command with --resume to go on"
        )

    def _roll_back(self, error: DivergenceError) -> None:
        """Return to the last good checkpoint with lower learning rates, a few times."""
        config, number, bad = self.config, self.rollbacks + 1, self.bad_steps
        if number > MAX_ROLLBACKS:
            raise TrainingError(
                f"the run diverged again after {self.rollbacks} returns to the last good checkpoint: at step "
                f"{self.step}, {error}. Lower lr ({config.lr:g}) or raise warmup_steps ({config.warmup_steps}), in "
                f"another folder. {self.out} keeps the checkpoints"
            ) from error
        step, scale = self.step, self.m_step.lr_scale * ROLLBACK_FACTOR
        self.restore(load_checkpoint(self.out, good=True))
        self.rollbacks, self.bad_steps = number, bad
        self.set_lr_scale(scale)
        row = {"kind": "rollback", "number": number, "step": self.step, "from_step": step, "lr_scale": scale}
        self.log.rewind(self.step, {**row, "why": str(error)})
        warnings.warn(
            f"step {step}: {error}. Returned to step {self.step}, at {scale:g} times the learning rates of the "
            f"settings ({number} of at most {MAX_ROLLBACKS} times)",
            stacklevel=2,
        )
        self.save_checkpoint()
        if not self.bar.disable:  # a disabled bar lacks the methods below
            self.bar.initial = min(self.bar.initial, self.step)
        self.bar.update(self.step - self.bar.n)  # setting n would leave the bar still until it is passed again
        self.bar.refresh()

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluated(self) -> GLEM:
        """The model as it would be saved now: averaged flow, current Gaussians."""
        model, ema = self.model, self.e_step.ema
        return GLEM(model.config, model.flow if ema is None else ema.module, model.latent_classes, model.codec)

    def whole(self, model: GLEM) -> GLEM:
        """`model` for images, where it is one for latents."""
        return model if self._original.codec.levels else model_of_images(model, self._original)

    def measure(self) -> dict[str, float]:
        """Metrics of the held-out images, or of D_g if none are held out; and the Gaussians' state."""
        split = self.batches.split
        metrics = held_out(self.evaluated(), self.batches.read(split.val if len(split.val) else split.g, EVAL_BATCH))
        return {**metrics, **self.model.gaussians.summary()}

    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, over all its pieces, without steps lost to kills."""
        return time.monotonic() - self._clock

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
            "lr": self.e_step.optimizer.param_groups[0]["lr"], "images_per_second": images_per_second,
            "seconds": self.seconds(), "bad_steps": self.bad_steps, **self.objective.weights(self.so_far), **metrics,
        })  # fmt: skip
        if self.shown:
            key, unit, pixels = self._reported(self.guard.pixels)
            likelihood, numbers = metrics[f"val_{key}"], "pixels" if self.model.codec.levels else "latents"
            which = "held-out images" if len(self.batches.split.val) else "training images"
            worse = "" if likelihood < pixels else f" (independent {numbers}: {pixels:.3f})"
            right = f", accuracy {100 * metrics['val_accuracy']:.1f} %" if "val_accuracy" in metrics else ""
            self.bar.write(
                f"epoch {epochs}/{self.config.epochs}: {likelihood:.3f} {unit}{worse}{right} "
                f"on {which}; loss {loss:.3f} nats/dim, {images_per_second:.0f} images/s"
            )

    def _draw_pictures(self, epochs: int) -> None:
        """Draw curves, and samples of each class, always from the same noise, if they are due after this epoch."""
        every = self.config.sample_every
        if is_primary() and every and (epochs % every == 0 or epochs == self.config.epochs):
            picture = compose(f"After epoch {epochs}", "", [class_samples(self.whole(self.evaluated()), seed=0)])
            save_png(picture, self.out / "samples" / f"epoch_{epochs:04d}.png")
            plot_curves(self.log.rows, self.out / "curves.png")

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, good: bool = False) -> None:
        """Write the state of the run, unless its weights diverged; a diverged run may return to a `good` one."""
        if not self.is_finite():
            raise DivergenceError("weights are no longer finite")
        if is_primary():
            save_checkpoint(self.out, *self.state(), good=good)
        wait()
        self.saved_at = time.monotonic()

    def is_finite(self) -> bool:
        """Whether every weight, averaged ones too, is finite."""
        tensors = [*self.model.state_dict().values(), *self._ema_state().values()]
        return bool(torch.stack([torch.isfinite(t).all() for t in tensors if t.is_floating_point()]).all())

    def _ema_state(self) -> dict[str, Tensor]:
        return {} if self.e_step.ema is None else self.e_step.ema.state_dict()

    def set_lr_scale(self, scale: float) -> None:
        """Multiply all learning rates of both steps by `scale`, in (0, 1], from now on."""
        self.m_step.lr_scale = scale
        for group in self.e_step.optimizer.param_groups:
            group["lr_scale"] = scale  # timm's schedulers multiply by it
        self.e_step.scheduler.step_update(self.step)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as JSON facts and named tensors.

        The schedules, the learning rates, the order of the images and the noise follow from the settings and the step.
        """
        guard, series = self.guard.state()
        facts = {
            "config": self.settings,
            "flow": json.dumps(self.model.config.flow),  # as text, which keeps the order of the keys
            "psi": self.model.config.psi,
            "autoencoder": self._original.config.autoencoder,
            **{name: getattr(self, name) for name in _COUNTERS},
            "m_done": self.m_step.done,
            "lr_scale": self.m_step.lr_scale,
            "epoch_loss": list(self.epoch_loss),
            "guard": guard,
            "fingerprint": self.fingerprint,
            "init_from": self.init_from,
            "seconds": self.seconds(),
        }
        groups = {
            "model": self.model.state_dict(),
            "ema": self._ema_state(),
            "flow_optimizer": optimizer_tensors(self.e_step.optimizer),
            "m_optimizer": optimizer_tensors(self.gaussians.optimizer),
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
            if self.e_step.ema is not None:
                self.e_step.ema.load_state_dict(parts["ema"])
            load_optimizer_tensors(self.e_step.optimizer, parts["flow_optimizer"])
            load_optimizer_tensors(self.gaussians.optimizer, parts["m_optimizer"])
            torch.set_rng_state(parts["run"]["rng"])
            self.guard.load(facts["guard"], parts["guard"])
            for name in _COUNTERS:
                setattr(self, name, facts[name])
            self.m_step.done = facts["m_done"]
            self.epoch_loss = facts["epoch_loss"][0], facts["epoch_loss"][1]
            self.set_lr_scale(facts["lr_scale"])
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"{checkpoint.path} does not fit this run: {type(error).__name__}: {reason}") from error

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self, metrics: dict[str, float] | None) -> GLEM:
        """Fit the modes and the temperature, and save the model. `metrics`: of the last epoch, if this run had it."""
        config, model, batches = self.config, self.evaluated(), self.batches
        if self.refit(model):
            metrics = self.measure()
            if not self.log.has("final"):
                self.log.add({"kind": "final", "step": self.step, **metrics})
        model.config.training = self._record(self.measure() if metrics is None else metrics)
        model.eval().requires_grad_(False)
        if len(batches.split.val):
            calibrate(model, batches.data.subset(batches.split.val), self.shown)
        if config.modes_rank:
            data = batches.data.subset(batches.some_of_each_class(np.arange(len(batches.data)), model.dim))
            with progress_bar("modes", len(data), "image", self.shown) as bar:
                model.fit_modes(data, config.modes_rank, count=bar.update)
        model = self.whole(model).eval().requires_grad_(False)
        if is_primary():
            model.save(self.out)  # last, because `glem train` takes a model for a finished run
        wait()
        return model

    def refit(self, model: GLEM) -> bool:
        """Fit the Gaussians of `model`, whose flow is averaged, after the last step.

        Returns whether they changed; here they stay. A subclass may fit them.
        """
        return False

    def _record(self, metrics: dict[str, float]) -> dict[str, Any]:
        """The record of the run in `config.json`, the same for a run that was killed and resumed."""
        key, _, independent = self._reported(self.guard.pixels)
        # Without held-out images, training images were measured. Their metrics are not recorded.
        held_out = ("val_images", "val_accuracy", f"val_{key}") if len(self.batches.split.val) else ()
        unrecorded = {"max_minutes", *(("preset", "flow_options") if self.init_from else ())}
        return {
            "data": self.batches.data.name,
            "images": len(self.batches.data),
            "config": {name: value for name, value in self.settings.items() if name not in unrecorded},
            "held_out": finite({name: metrics[name] for name in held_out if name in metrics}),
            "independent_pixels": independent,  # or latents, in the unit of the likelihood
            "worse_than_independent_pixels": not metrics[f"val_{key}"] < independent,
            **({} if self.init_from is None else {"init_from": self.init_from}),
            "bad_steps": self.bad_steps,
            "rollbacks": self.rollbacks,
        }


def _warn_of_another_split(before: dict[str, Any], data: ImageData, config: TrainConfig) -> None:
    """Warn if a model that was trained on the same data, as `before` records, had other images held out."""
    then = before.get("config")
    if not isinstance(then, dict) or (before.get("data"), before.get("images")) != (data.name, len(data)):
        return
    changed = [f"{key}={then.get(key)!r}" for key in ("seed", "val_fraction") if then.get(key) != getattr(config, key)]
    if changed:
        warnings.warn(
            "some images that this run holds out trained the model that it starts from, so its accuracy on them is too "
            f"high, and its temperature too low: train with {' and '.join(changed)}, as that model was",
            stacklevel=4,
        )


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
