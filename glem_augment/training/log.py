"""The log of a run: its bars, `metrics.jsonl`, and the trackers and curves that show the rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from glem_augment.distributed import is_primary
from glem_augment.io import atomic_write, finite
from glem_augment.training.checkpoint import require_folder

METRICS = "metrics.jsonl"
# Called with every row of metrics.jsonl: "kind" is "step", "epoch", "rollback" or "final", and "step" counts E-steps.
Callback = Callable[[dict[str, Any]], None]


class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl`.

    A resumed run drops lines beyond its checkpoint and an incomplete last line, so no step appears twice.
    Every row also goes to the `callbacks`. Only rank 0 writes and calls.
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
        """Atomically drop rows beyond a step and earlier rows of the same `kind` and `number`, then add `row`."""
        same = (row["kind"], row["number"])
        kept = [old for old in self.rows if (old["kind"], old.get("number")) != same]
        self.rows = [*(old for old in kept if old["step"] <= keep_through_step), row]
        self._rewrite()
        self._tell(row)

    def _tell(self, row: dict[str, Any]) -> None:
        for callback in self.callbacks if is_primary() else ():
            callback(dict(row))

    def has(self, kind: str) -> bool:
        """Whether there is a row of that kind."""
        return any(row["kind"] == kind for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, without numbers that are not finite."""
        row = finite(row)
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
    run.define_metric("*", step_metric="step")  # after a rollback steps go back, which wandb's own steps may not
    return lambda row: run.log({**_numbers(row), "step": row["step"]})


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


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


def progress_bar(title: str, total: int, unit: str, shown: bool, begun: int = 0) -> tqdm:
    """A bar on stderr, if it is `shown`."""
    return tqdm(total=total, initial=begun, desc=title, unit=unit, disable=not shown, dynamic_ncols=True)
