"""What a training run measures, and the JSONL of metrics that it writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glem_augment.io import atomic_write
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.model.glem import GLEM
from glem_augment.training.checkpoint import require_folder

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl`.

    A resumed run drops the lines beyond its checkpoint (and a half-written last one), so no step appears twice.
    """

    def __init__(self, folder: Path, keep_through_step: int) -> None:
        self.path = folder / METRICS
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
        with atomic_write(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    def rewind(self, keep_through_step: int, row: dict[str, Any]) -> None:
        """Atomically drop the rows beyond a step and older ones of the same `kind` and `number`, and add `row`."""
        same = (row["kind"], row["number"])
        kept = [old for old in self.rows if (old["kind"], old.get("number")) != same]
        self.rows = [*(old for old in kept if old["step"] <= keep_through_step), row]
        self._rewrite()

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, which JSON can carry."""
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows.append(row)
        require_folder(self.path.parent)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}; the checkpoint stays") from error


@torch.no_grad()
def held_out(model: GLEM, batches: Iterable[tuple[Tensor, Tensor]], generator: torch.Generator) -> dict[str, float]:
    """Number of images, NF accuracy, and bits/dim given the class, with dequantisation noise from `generator`."""
    images, right, bits = 0, 0, 0.0
    for x, y in batches:
        scores = model.log_prob_per_class(x, generator)
        right += int((scores.argmax(1) == y).sum())
        bits += float(-scores.gather(1, y[:, None]).double().sum()) / (model.dim * math.log(2))
        images += len(y)
    return {"val_images": images, "val_accuracy": right / images, "val_bits_per_dim": bits / images}


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
        "NF accuracy, held-out images": "val_accuracy",
        "E-step loss, nats/dim": "loss",
    }
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, key) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axis.plot([row["epoch"] for row in epochs], [row.get(key) for row in epochs], marker=".")
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
