"""The folder of a run: its checkpoints, and its metrics with their curves.

A checkpoint is a safetensors file of tensors and JSON, followed by a digest, which finds damage and other formats.
Nothing in it is ever executed. There are two, written atomically:

- `checkpoint.safetensors`: the newest state;
- `checkpoint.good.safetensors`: the rollback point of a diverged run, and the spare for a damaged newest state. It is
  written at step 0 and at ends of epochs. So rollbacks depend on neither speed nor kills.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.distributed import Share, add_up, is_primary
from glem_augment.errors import TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.io import atomic_write
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import CONFIG, WEIGHTS
from glem_augment.training.config import TrainConfig

NEWEST, GOOD = "checkpoint.safetensors", "checkpoint.good.safetensors"
_KEY, _FORMAT, _DIGEST_BYTES = "glem-augment-state", b"glem-augment checkpoint 4", 32
# Settings that may change when a run is resumed. "threads" and "memory" change the last bits of the weights.
FREE = {"max_minutes", "sample_every", "workers", "threads", "memory", "modes_rank"}
# Temporary files of glem_augment.io.atomic_write, which a killed process leaves behind.
_LEFT_OVER = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: `facts` (JSON: settings, counters) and `tensors`, on the CPU."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


# ---- the file ----------------------------------------------------------------------------------------------------


def to_bytes(facts: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Serialise a state; equal states give equal bytes. ValueError for facts that are NaN or infinite."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # There is one entry of metadata because safetensors writes several in random order.
    data = safetensors_save(plain, metadata={_KEY: json.dumps(facts, sort_keys=True, allow_nan=False)})
    return data + _digest(data)


def from_bytes(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors that `to_bytes` was given. TrainingError: truncated, changed or foreign bytes."""
    state, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if digest != _digest(state):
        raise TrainingError("it is damaged, or was written by another version, which can finish that run")
    try:
        header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
        return json.loads(header["__metadata__"][_KEY]), safetensors_load(state)
    except MemoryError:
        raise
    except Exception as error:  # safetensors, json and torch raise many kinds
        raise TrainingError(f"it is no checkpoint ({str(error)[:200]})") from None


def _digest(state: bytes) -> bytes:
    return hashlib.sha256(_FORMAT + state).digest()


# ---- the folder --------------------------------------------------------------------------------------------------


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from, damaged or not."""
    return any((folder / name).exists() for name in (NEWEST, GOOD))


def require_unused(folder: Path) -> None:
    """Raise TrainingError if the folder already holds a run or a model, which a new run would overwrite."""
    if has_checkpoint(folder):
        raise TrainingError(f"{folder} already holds a run; go on with --resume, or choose another folder with --out")
    for name in (WEIGHTS, CONFIG):
        if (folder / name).exists():
            raise TrainingError(f"{folder} already holds a model ({name}); choose another folder with --out")


def save_checkpoint(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], good: bool = False) -> None:
    """Write the newest checkpoint; with `good`, write that one too."""
    require_folder(folder)
    data = to_bytes(facts, tensors)
    # The good one comes first. After a kill between the two, the resumed run writes the same good one again.
    for name in (GOOD, NEWEST) if good else (NEWEST,):
        with atomic_write(folder / name) as file:
            file.write(data)


def load_checkpoint(folder: Path, good: bool = False) -> Checkpoint:
    """The newest checkpoint; if it is damaged, the good one, with a warning. With `good`, the good one comes first.

    FileNotFoundError: there is none. TrainingError: all are damaged, foreign, or of another version.
    """
    problems: list[str] = []
    for path in (folder / name for name in ((GOOD, NEWEST) if good else (NEWEST, GOOD))):
        if not path.is_file():
            continue
        try:
            facts, tensors = from_bytes(path.read_bytes())
        except TrainingError as error:
            problems.append(f"{path} can't be used: {error}")
            continue
        if problems:
            going_on = f"Going on from {path} (step {facts['step']})"
            warnings.warn(f"{'; '.join(problems)}. {going_on}", stacklevel=3)
        return Checkpoint(path, facts, tensors)
    if problems:
        raise TrainingError(f"{'; '.join(problems)}. Restore one, or start over in another folder")
    raise FileNotFoundError(errno.ENOENT, f"no checkpoint at {folder / NEWEST}; start without --resume")


def remove_left_overs(folder: Path) -> None:
    """Remove the unfinished files that killed processes left behind; each may be as large as a checkpoint."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")]:
        if _LEFT_OVER.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def require_folder(folder: Path) -> None:
    """FileNotFoundError: the output folder has vanished."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the output folder {folder} has vanished: start the run again")


# ---- the same run? -----------------------------------------------------------------------------------------------


def data_fingerprint(data: ImageData) -> str:
    """A digest of shape, classes, labels and 16 images, so that other pictures with the same labels are noticed."""
    digest = hashlib.sha256(repr((data.image_shape, data.class_ids, len(data))).encode())
    digest.update(np.ascontiguousarray(data.targets).tobytes())
    for x, _ in data.batches(np.linspace(0, len(data) - 1, 16).astype(np.int64), 16):
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def check_same_run(checkpoint: Checkpoint, config: TrainConfig, fingerprint: str, data_name: str) -> None:
    """TrainingError, naming the difference, unless `checkpoint` belongs to a run with these settings and data."""
    folder = checkpoint.path.parent
    now = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
    try:
        then = TrainConfig(**checkpoint.facts["config"]).to_dict()
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{checkpoint.path} holds settings that this version can't use: {error}") from None
    changed = [key for key in now if key not in FREE and then[key] != now[key]]
    if changed:
        pairs = ", ".join(f"{key}: {then[key]!r} then, {now[key]!r} now" for key in changed)
        raise TrainingError(f"{folder} holds a run with other settings ({pairs}); use the same or another folder")
    if checkpoint.facts.get("fingerprint") != fingerprint:
        raise TrainingError(f"{folder} holds a run on other data than {data_name}; use another folder")


# ---- metrics ---------------------------------------------------------------------------------------------------------

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
    run.define_metric("*", step_metric="step")  # after a rollback steps go back, which wandb's own steps may not
    return lambda row: run.log({**_numbers(row), "step": row["step"]})


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


@torch.no_grad()
def held_out(model: GLEM, batches: Iterable[tuple[Tensor, Tensor, Share]]) -> dict[str, float]:
    """Number of images, NF accuracy unless there is one class, and the likelihood given the class.

    The numbers are over the images of all ranks. `batches` come from `ImageData.shared_batches`.
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
