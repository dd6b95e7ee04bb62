"""The run around the steps: epochs, checkpoints, stops, rollbacks after a divergence, and the end.

A run may be killed anywhere and resumed from its checkpoint. Rollback points depend on steps, not on time, so a run
that diverged is as repeatable as any other.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glem_augment.distributed import Share, add_up, is_primary, wait
from glem_augment.errors import GLEMError, TrainingError
from glem_augment.evaluation.metrics import calibrate
from glem_augment.evaluation.pictures import compose
from glem_augment.evaluation.preview import class_samples
from glem_augment.images.dataset import ImageData
from glem_augment.io import expand, lock_folder, save_png
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.precision import lacks_bf16
from glem_augment.training.config import TrainConfig
from glem_augment.training.em import EM, training_mode
from glem_augment.training.folder import (
    Callback,
    MetricsLog,
    check_same_run,
    data_fingerprint,
    load_checkpoint,
    plot_curves,
    remove_left_overs,
    require_unused,
    save_checkpoint,
)
from glem_augment.training.optim import DivergenceError
from glem_augment.training.start import epoch_order

# The exit status for TimeUpError; in sysexits.h EX_TEMPFAIL, "the user is invited to retry".
EXIT_TIME_UP = 75
_STEP_ROWS_EVERY = 50
ROLLBACK_FACTOR, MAX_ROLLBACKS = 0.5, 3


class TimeUpError(GLEMError):
    """The run stopped, with a checkpoint, because `max_minutes` were over. Nothing went wrong: resume it."""


class Trainer(EM):
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
    ) -> None:
        began = time.monotonic() if began is None else began
        self.deadline = math.inf if config.max_minutes is None else began + 60 * config.max_minutes
        self.out, self.fingerprint, self._clock = expand(out), data_fingerprint(data), began
        self.stop_requested, self._resumed = False, False
        with self._locked():  # an error now, before anything is read or written
            pass
        begun = load_checkpoint(self.out) if resume else None
        if begun is not None:
            check_same_run(begun, config, self.fingerprint, data.name)
            self.init_from, self._resumed = begun.facts["init_from"], True
            self._clock -= begun.facts["seconds"]
        else:
            require_unused(self.out)
            self.init_from = None
            if init_model is not None:
                self.init_from = {"origin": init_model.origin, "weights_sha256": weights_sha256(init_model)}
                _warn_of_another_split(init_model.config.training, data, config)
        wait()  # all ranks read the folder before rank 0 writes
        super().__init__(data, config, init_model, begun, device, progress, ready)
        if is_primary():
            self.out.mkdir(parents=True, exist_ok=True)
            remove_left_overs(self.out)
        self.log = MetricsLog(self.out, self.step, callbacks)

    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, over all its pieces, without steps lost to kills."""
        return time.monotonic() - self._clock

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        facts, tensors = super().state()
        run = {"fingerprint": self.fingerprint, "init_from": self.init_from, "seconds": self.seconds()}
        return {**facts, **run}, tensors

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
            return self._fit()

    def _locked(self) -> AbstractContextManager[None]:
        return lock_folder(self.out) if is_primary() else nullcontext()

    def _fit(self) -> GLEM:
        if self.config.compile:
            self.model.flow.compile_steps()
        if self.config.precision == "bf16" and lacks_bf16(self.device):
            warnings.warn(
                "this CPU has neither AVX512-BF16 nor AMX, so steps in bf16 take several times as long as in float32: "
                "leave out precision='bf16' (--precision bf16)", stacklevel=3,
            )  # fmt: skip
        self.saved_at = time.monotonic()
        self.bar = self.bar_of("train", self.total_steps, "step", begun=self.step)
        with closing(self.bar), self._stop_between_steps():
            if self.step == 0:
                # A run may be killed before its first periodic checkpoint, or diverge in its first epoch.
                self.save_checkpoint(good=True)
                if not self._resumed:
                    self._save_or_stop(saved=True)  # the initialisation may have taken all of `max_minutes`
            elif self.step % self.steps_per_epoch == 0:
                # The kill may have come between the checkpoint of an epoch and its pictures.
                self._draw_pictures(self.step // self.steps_per_epoch)
            while self.step < self.total_steps:
                try:
                    self._epoch(self.step // self.steps_per_epoch)
                except DivergenceError as error:
                    self._roll_back(error)
        return self._finish()

    def _epoch(self, epoch: int) -> None:
        """The rest of an epoch, then its metrics and a checkpoint."""
        config, per_epoch = self.config, self.steps_per_epoch
        order = epoch_order(self.epoch_rows(epoch), config.batch_size, config.seed, epoch)[:per_epoch]
        offset = self.step - epoch * per_epoch
        began, first = time.monotonic(), self.step
        batches = self.images(order[offset:].reshape(-1), order.shape[1], self.views)
        x = torch.empty(0, *self.data.image_shape, dtype=torch.uint8)
        nothing = x, torch.empty(0, dtype=torch.int64), Share(0, 0, order.shape[1])  # for a rank without images
        with closing(batches), training_mode(self.model.flow, config):
            for position in range(offset, per_epoch):
                for _ in range(self.m_steps_due(epoch, position)):
                    self.m_step()
                self._count(*self.e_step(*next(batches, nothing)))
                # The last step of an epoch is saved with the epoch's metrics, below.
                if position < per_epoch - 1:
                    self._save_or_stop(saved=False)
        seconds = max(1e-9, time.monotonic() - began)
        self._end_of_epoch(epoch + 1, max(1, self.step - first) * order.shape[1] / seconds)

    def m_steps_due(self, epoch: int, position: int) -> int:
        """How many M-steps come before the batch at `position`: one at the start of an epoch."""
        return int(position == 0 and epoch == self.m_done < self.m_total)

    def _count(self, loss: float, bits: float) -> None:
        """Count one more step; its loss is in nats per dimension, its likelihood in bits/dim."""
        self.guard.see(loss, bits)
        self.step += 1
        self.scheduler.step_update(self.step)
        total, counted = self.epoch_loss
        if math.isfinite(loss):  # otherwise the step was skipped, and counted
            self.epoch_loss = total + loss, counted + 1
        self.bar.update(1)
        if self.step % _STEP_ROWS_EVERY == 0:
            key, unit, likelihood = self._reported(bits)
            self.bar.set_postfix_str(f"loss {loss:.3f} nats/dim, {likelihood:.3f} {unit}", refresh=False)
            row = {"kind": "step", "step": self.step, "loss": loss, key: likelihood, "bad_steps": self.bad_steps}
            self.log.add(row)

    def _reported(self, bits: float) -> tuple[str, str, float]:
        """A likelihood of `bits` per number as it is reported: its key, unit and value."""
        key, unit, divisor = self.model.likelihood
        return key, unit, bits * math.log(2) * self.model.dim / divisor

    def _end_of_epoch(self, epochs: int, images_per_second: float) -> None:
        total, counted = self.epoch_loss
        self.epoch_loss = 0.0, 0
        row = {
            "kind": "epoch", "step": self.step, "epoch": epochs, "loss": total / max(1, counted),
            "lr": self.flow_optimizer.param_groups[0]["lr"], "images_per_second": images_per_second,
            "seconds": self.seconds(), "bad_steps": self.bad_steps, "kld_weight": self.kld_weight(), **self.measure(),
        }  # fmt: skip
        self.log.add(row)
        if self.progress:
            key, unit, pixels = self._reported(self.guard.pixels)
            likelihood, numbers = row[f"val_{key}"], "pixels" if self.codec is None else "latents"
            which = "held-out images" if len(self.split.val) else "training images"
            worse = "" if likelihood < pixels else f" (independent {numbers}: {pixels:.3f})"
            right = f", accuracy {100 * row['val_accuracy']:.1f} %" if "val_accuracy" in row else ""
            self.bar.write(
                f"epoch {epochs}/{self.config.epochs}: {likelihood:.3f} {unit}{worse}{right} "
                f"on {which}; loss {row['loss']:.3f} nats/dim, "
                f"{images_per_second:.0f} images/s"
            )
        self.save_checkpoint(good=self.guard.calm)
        self._draw_pictures(epochs)
        self._save_or_stop(saved=True)

    def save_checkpoint(self, good: bool = False) -> None:
        """Write the state of the run, unless its weights diverged; a diverged run may return to a `good` one."""
        if not self.is_finite():
            raise DivergenceError("weights are no longer finite")
        if is_primary():
            save_checkpoint(self.out, *self.state(), good=good)
        wait()
        self.saved_at = time.monotonic()

    def _draw_pictures(self, epochs: int) -> None:
        """Draw curves, and samples of each class, always from the same noise, if they are due after this epoch."""
        every = self.config.sample_every
        if is_primary() and every and (epochs % every == 0 or epochs == self.config.epochs):
            picture = compose(f"After epoch {epochs}", "", [class_samples(self.whole(self.evaluated()), seed=0)])
            save_png(picture, self.out / "samples" / f"epoch_{epochs:04d}.png")
            plot_curves(self.log.rows, self.out / "curves.png")

    # ---- stops and returns ---------------------------------------------------------------------------------------

    @contextmanager
    def _stop_between_steps(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into a request, so that a checkpoint never holds half an optimizer step."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
            yield
            return

        def on_signal(number: int, frame: object) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
        step, scale = self.step, self.lr_scale * ROLLBACK_FACTOR
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

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> GLEM:
        """Refit the Gaussians, fit the modes, and save the model."""
        config, model = self.config, self.evaluated()
        key, _, independent = self._reported(self.guard.pixels)
        if len(rows := self.refit_rows()):
            self.refit(model, rows)
            if not any(row["kind"] == "final" for row in self.log.rows):
                self.log.add({"kind": "final", "step": self.step, **self.measure()})
        measured = [row for row in self.log.rows if row["kind"] in ("epoch", "final")]
        final = measured[-1] if measured else {}
        # Without held-out images, training images were measured. Their metrics are not recorded.
        recorded = ("val_images", "val_accuracy", f"val_{key}") if len(self.split.val) else ()
        likelihood = final.get(f"val_{key}")  # None if it was not finite
        # A run that was killed and resumed gives the file of an undisturbed run.
        unrecorded = {"max_minutes", *(("preset", "flow_options") if self.init_from else ())}
        model.config.training = {
            "data": self.data.name,
            "images": len(self.data),
            "config": {key: value for key, value in config.to_dict().items() if key not in unrecorded},
            "held_out": {key: final[key] for key in recorded if key in final},
            "independent_pixels": independent,  # or latents, in the unit of the likelihood
            "worse_than_independent_pixels": likelihood is None or likelihood >= independent,
            **({} if self.init_from is None else {"init_from": self.init_from}),
            "bad_steps": self.bad_steps,
            "rollbacks": self.rollbacks,
        }
        model.eval().requires_grad_(False)
        if len(self.split.val):
            calibrate(model, self.data.subset(self.split.val), self.progress)
        if config.modes_rank:
            # A class of n images has n - 1 modes.
            data = self.data.subset(self.mode_rows())
            largest = int(np.bincount(data.targets).max())
            rank = max(1, min(config.modes_rank, largest - 1, model.dim))
            with self.bar_of("modes", len(data), "image") as bar:
                model.fit_modes(data, rank, count=bar.update)
        model = self.whole(model).eval().requires_grad_(False)
        if is_primary():
            model.save(self.out)  # last, because `glem train` takes a model for a finished run
        wait()
        return model


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
            stacklevel=3,
        )
