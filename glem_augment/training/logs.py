"""The metrics of a training run, and the JSONL file that holds them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glem_augment.distributed import Share, add_up, is_primary
from glem_augment.io import atomic_write
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.model.glem import GLEM
from glem_augment.training.checkpoint import require_folder

METRICS = "metrics.jsonl"
# Called with every row of metrics.jsonl: "kind" is "step", "epoch", "rollback" or "final", and "step" counts E-steps.
Callback = Callable[[dict[str, Any]], None]


class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl`.

    A resumed run drops the lines beyond its checkpoint (and a half-written last one), so no step appears twice.
    Every row also goes to the `callbacks`. Of several ranks, only the first writes and tells.
    """

    def __init__(self, folder: Path, keep_through_step: int, callbacks: Iterable[Callback] = ()) -> None:
        self.path, self.callbacks = folder / METRICS, list(callbacks)
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and row.get("step", math.inf) <= keep_through_step:
                    self.rows.append(row)
        self._rewrite()

    def _rewrite(self) -> None:
        if not is_primary():
            return
        with atomic_write(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def rewind(self, keep_through_step: int, row: dict[str, Any]) -> None:
        """Atomically drop the rows beyond a step and older ones of the same `kind` and `number`, and add `row`."""
        same = (row["kind"], row["number"])
        kept = [old for old in self.rows if (old["kind"], old.get("number")) != same]
        self.rows = [*(old for old in kept if old["step"] <= keep_through_step), row]
        self._rewrite()
        self._tell(row)

    def _tell(self, row: dict[str, Any]) -> None:
        for callback in self.callbacks if is_primary() else ():
            callback(dict(row))

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, which JSON can carry."""
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows.append(row)
        if not is_primary():
            return
        require_folder(self.path.parent)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}; the checkpoint stays") from error
        self._tell(row)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {f"{row['kind']}/{key}": v for key, v in row.items() if isinstance(v, int | float) and key != "step"}


def tensorboard(folder: Path, step: int) -> Callback:
    """A callback that writes the rows to `folder`/tensorboard; rows of an earlier run beyond `step` are dropped."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def wandb(folder: Path, step: int) -> Callback:
    """A callback that sends the rows to Weights & Biases, in the project of WANDB_PROJECT; a resumed run goes on."""
    import wandb as client

    run = client.init(dir=str(folder), name=folder.name, resume="auto" if step else None)
    run.define_metric("*", step_metric="step")  # steps of wandb may not go back, steps of a rollback do
    return lambda row: run.log({**_numbers(row), "step": row["step"]})


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


@torch.no_grad()
def held_out(model: GLEM, batches: Iterable[tuple[Tensor, Tensor, Share]]) -> dict[str, float]:
    """Number of images, NF accuracy unless there is one class, and the likelihood given the class.

    The dequantisation noise of an image does not depend on its batch. `batches` come from `ImageData.shared_batches`,
    and the numbers are over all ranks' images.
    """
    sums, (key, _, unit) = torch.zeros(3, dtype=torch.float64), model.likelihood
    for x, y, _ in batches:
        scores = model.log_prob_per_class(x)
        nll = float(-scores.gather(1, y[:, None]).double().sum()) / unit
        sums += torch.tensor([len(y), int((scores.argmax(1) == y).sum()), nll], dtype=torch.float64)
    add_up(sums)
    images, right, nll = sums.tolist()
    accuracy = {"val_accuracy": right / images} if model.num_classes > 1 else {}
    return {"val_images": int(images), **accuracy, f"val_{key}": nll / images}


@torch.no_grad()
def gaussian_state(gaussians: ClassGaussians) -> dict[str, float]:
    """max |mu|, smallest and mean pairwise KLD in nats, and the share of saturated variances."""
    k = gaussians.num_classes
    kld = gaussians.kld_matrix()
    pairs = kld[~torch.eye(k, dtype=torch.bool, device=kld.device)] if k > 1 else kld.flatten()
    return {
        "mu_max": float(gaussians.mu.abs().max()),
        "kld_min": float(pairs.min()),
        "kld_mean": float(pairs.mean()),
        "saturated_variances": float(gaussians.saturated_share()),
    }


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Curves of the epoch rows as one PNG. Without matplotlib there is none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    panels = {
        "bits/dim, held-out images": "val_bits_per_dim",
        "nats per number, held-out images": "val_nats_per_number",
        "NF accuracy, held-out images": "val_accuracy",
        "E-step loss, nats/dim": "loss",
    }
    panels = {title: key for title, key in panels.items() if any(key in row for row in epochs)}
    if not panels:
        return
    figure = Figure(figsize=(3.7 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.plot([row["epoch"] for row in epochs], [row.get(key) for row in epochs], marker=".")
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
