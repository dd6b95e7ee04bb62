"""The run around the steps: epochs, checkpoints, stops, returns after a divergence, and the end.

A run may be cut anywhere and go on later; all it needs is in the checkpoint. Where it returns to after a divergence is
a checkpoint that does not depend on the clock either, so a run that diverged is as repeatable as any other.
"""

from __future__ import annotations

import math
import time
import warnings
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from glem_augment.errors import TrainingError
from glem_augment.model.glem import GLEM
from glem_augment.training.guard import DivergenceError
from glem_augment.training.interrupt import StopRequest, TimeUpError, stop_between_steps
from glem_augment.training.logs import plot_curves, sample_grid
from glem_augment.training.speed import set_for_training, set_for_use
from glem_augment.training.split import epoch_order
from glem_augment.training.state import all_finite, restore

if TYPE_CHECKING:
    from glem_augment.training.trainer import Trainer

_STEP_ROWS_EVERY = 50
ROLLBACK_FACTOR = 0.5
# How a run was cut into pieces says nothing about the model, and must not show in its file.
_ABOUT_THE_PIECE = ("checkpoint_minutes", "max_minutes")


class Run:
    """Drives ``trainer`` from where it stands to the end; ``go`` does it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.stop = StopRequest()
        self.bar = tqdm(
            total=trainer.total_steps, initial=trainer.step, unit="step", desc="train", disable=not trainer.progress,
            dynamic_ncols=True,
        )  # fmt: skip
        self.saved_at = time.monotonic()

    def go(self) -> GLEM:
        """Train to the end and save the model; see ``Trainer.fit`` for what it raises."""
        trainer = self.trainer
        set_for_training(trainer.model.flow, self.config)
        limit = math.inf if self.config.max_minutes is None else trainer.began + 60 * self.config.max_minutes
        with closing(self.bar), stop_between_steps(limit) as self.stop:
            if trainer.step == 0:
                # So that a run killed before its first periodic checkpoint can be resumed, and one that diverges in
                # its first epoch has somewhere to return to.
                self.save(good=True)
            elif trainer.step % trainer.steps_per_epoch == 0:
                # The kill may have come after the checkpoint of an epoch and before its pictures.
                self.pictures(trainer.step // trainer.steps_per_epoch, again=False)
            while trainer.step < trainer.total_steps:
                try:
                    self.epoch(trainer.step // trainer.steps_per_epoch)
                except DivergenceError as error:
                    self.roll_back(error)
        return self.finish()

    def save(self, good: bool = False) -> None:
        """Write a checkpoint. Raises DivergenceError in place of writing weights that nobody could go on from."""
        if not all_finite(self.trainer):
            raise DivergenceError("weights are no longer finite")
        self.trainer.save_checkpoint(good)
        self.saved_at = time.monotonic()

    def epoch(self, epoch: int) -> None:
        """The rest of an epoch, then its metrics and a checkpoint."""
        trainer, config, per_epoch = self.trainer, self.config, self.trainer.steps_per_epoch
        frozen = epoch >= trainer.frozen_from
        indices = np.concatenate([trainer.split.nf, trainer.split.g]) if frozen else trainer.split.nf
        order = epoch_order(indices, config.batch_size, config.seed, epoch)[:per_epoch]
        offset = trainer.step - epoch * per_epoch
        # Before which batch each round of the epoch comes; several at one where rounds outnumber batches.
        due = [r * per_epoch // config.m_rounds for r in range(config.m_rounds)]
        began, first = time.monotonic(), trainer.step
        with closing(trainer.images(order[offset:].reshape(-1), order.shape[1])) as batches:
            for position in range(offset, per_epoch):
                for r, before in enumerate(due):
                    if before == position and not frozen and epoch * config.m_rounds + r == trainer.m_done:
                        trainer.m_step()
                x, y = next(batches)
                self.count(trainer.e_step(x, y))
                # The last step of an epoch is saved with the epoch's metrics, below.
                if position == per_epoch - 1:
                    break
                if self.stop.due():
                    self.save()
                    raise self.stopped()
                if time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes:
                    self.save()
        seconds = max(1e-9, time.monotonic() - began)
        self.end_of_epoch(epoch + 1, max(1, trainer.step - first) * order.shape[1] / seconds)

    def count(self, loss: float) -> None:
        """One more step, with its loss in nats per dimension."""
        trainer = self.trainer
        trainer.guard.see(loss)
        trainer.step += 1
        if trainer.scheduler is not None:
            trainer.scheduler.step_update(trainer.step)
        total, counted = trainer.epoch_loss
        if math.isfinite(loss):  # else the step was skipped, and counted
            trainer.epoch_loss = total + loss, counted + 1
        self.bar.update(1)
        if trainer.step % _STEP_ROWS_EVERY == 0:
            self.bar.set_postfix(loss=f"{loss:.3f}", bad=trainer.bad_steps, refresh=False)
            trainer.log.add({"kind": "step", "step": trainer.step, "loss": loss, "bad_steps": trainer.bad_steps})

    def end_of_epoch(self, epochs: int, images_per_second: float) -> None:
        trainer, config = self.trainer, self.config
        total, counted = trainer.epoch_loss
        trainer.epoch_loss = 0.0, 0
        row = {
            "kind": "epoch", "step": trainer.step, "epoch": epochs, "loss": total / max(1, counted),
            "lr": trainer.flow_optimizer.param_groups[0]["lr"] if trainer.flow_optimizer else 0.0,
            "images_per_second": images_per_second, "seconds": trainer.seconds(), "bad_steps": trainer.bad_steps,
            "kld_weight": trainer.kld_weight() if config.repulsion != "none" else 0.0, **trainer.measure(),
        }  # fmt: skip
        trainer.log.add(row)
        if trainer.progress:
            self.bar.write(
                f"epoch {epochs:3d}  loss {row['loss']:.3f}  bits/dim {row['val_bits_per_dim']:.3f}  "
                f"NF accuracy {100 * row['val_accuracy']:.2f} %  {images_per_second:.0f} images/s"
            )
        self.save(good=trainer.guard.calm and not trainer.bad_in_a_row)
        self.pictures(epochs)
        if self.stop.due():
            raise self.stopped()

    def pictures(self, epochs: int, again: bool = True) -> None:
        """Samples and curves after an epoch for which they are due; ``again``: though they are there already."""
        every, path = self.config.sample_every, self.trainer.out / "samples" / f"epoch_{epochs:04d}.png"
        if every and (epochs % every == 0 or epochs == self.config.epochs) and (again or not path.exists()):
            sample_grid(self.trainer.evaluated(), path)
            plot_curves(self.trainer.log.rows, self.trainer.out / "curves.png")

    def stopped(self) -> BaseException:
        where = f"stopped at step {self.trainer.step} of {self.trainer.total_steps}"
        if self.stop.requested:
            return KeyboardInterrupt(f"{where}; go on from the checkpoint with --resume")
        return TimeUpError(
            f"{where}: the {self.config.max_minutes:g} minutes are over; run the same command with --resume to go on"
        )

    def roll_back(self, error: DivergenceError) -> None:
        """Return to the last good checkpoint with lower learning rates. Raises TrainingError after too many times."""
        trainer, config = self.trainer, self.config
        if trainer.rollbacks >= config.max_rollbacks:
            times = f" again after {trainer.rollbacks} returns to the last good checkpoint" if trainer.rollbacks else ""
            raise TrainingError(
                f"the run diverged{times}: at step {trainer.step}, {error}. Lower lr ({config.lr:g}) or clip_norm "
                f"({config.clip_norm:g}), or raise warmup_steps ({config.warmup_steps}), in another folder; or resume "
                f"with a higher max_rollbacks ({config.max_rollbacks}). {trainer.out} keeps the checkpoints"
            ) from error
        step, number, bad = trainer.step, trainer.rollbacks + 1, trainer.bad_steps
        scale = trainer.lr_scale * ROLLBACK_FACTOR
        restore(trainer, trainer.checkpoints.load_good())
        trainer.rollbacks, trainer.bad_steps = number, bad
        trainer.set_lr_scale(scale)
        row = {"kind": "rollback", "number": number, "step": trainer.step, "from_step": step, "lr_scale": scale}
        trainer.log.rewind(trainer.step, {**row, "why": str(error)})
        warnings.warn(
            f"step {step}: {error}. Returned to step {trainer.step}, at {scale:g} times the learning rates of the "
            f"settings ({number} of at most {config.max_rollbacks} times)",
            stacklevel=2,
        )
        self.save()
        self.bar.update(trainer.step - self.bar.n)  # setting n would leave the bar still until it is passed again
        self.bar.refresh()

    def finish(self) -> GLEM:
        """What comes after the last step: the refit, the modes, and the model's files."""
        trainer, config = self.trainer, self.config
        model = trainer.evaluated()
        set_for_use(model.flow)
        if config.refit_steps:
            try:
                trainer.refit(model)
            except DivergenceError as error:
                raise TrainingError(
                    f"the refit of the Gaussians failed: {error}; leave it out (refit_steps=0)"
                ) from error
            if not any(row.get("kind") == "final" for row in trainer.log.rows):
                trainer.log.add({"kind": "final", "step": trainer.step, **trainer.measure()})
        rows = trainer.log.rows
        final = next((row for row in reversed(rows) if row.get("kind") in ("epoch", "final")), {})
        model.config.training = {
            "data": trainer.data.name,
            "images": len(trainer.data),
            # Tables in the order of their keys: a run that was resumed has lost the order in which they were given.
            "config": {
                key: dict(sorted(value.items())) if isinstance(value, dict) else value
                for key, value in config.to_dict().items()
                if key not in _ABOUT_THE_PIECE
            },
            # JSON has no infinity, and a model that ended badly is still worth saving.
            "held_out": {
                key: final[key] if final[key] is not None and math.isfinite(final[key]) else None
                for key in ("val_images", "val_accuracy", "val_bits_per_dim")
                # Without images held out, those that trained the Gaussians are measured on the way. Images that carry
                # the code of their class tell it to whoever reads them.
                if key in final and len(trainer.split.val) and not (key == "val_accuracy" and config.code_rows)
            },
            **({} if trainer.init_from is None else {"init_from": trainer.init_from}),
            "bad_steps": trainer.bad_steps,
            "rollbacks": trainer.rollbacks,
        }
        model.eval().requires_grad_(False)
        if config.modes_rank:
            # A class of n images has n - 1; the others of small classes have no length.
            largest = int(np.bincount(trainer.data.targets).max())
            model.fit_modes(trainer.data, rank=max(1, min(config.modes_rank, largest - 1, model.dim)))
        plot_curves(rows, trainer.out / "curves.png")
        model.save(trainer.out)  # last: where it is, nothing is left to be done
        return model
