"""The checkpoint of a run: one file, written atomically. `torch.load(weights_only=True)` executes nothing in it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glem_augment.errors import TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.io import atomic_write
from glem_augment.model.files import CHECKPOINT, CONFIG, WEIGHTS

# Settings that may change when a run is resumed. "threads" changes the last bits of the weights.
FREE = {"lr", "sample_every", "workers", "threads", "modes_rank"}


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return (folder / CHECKPOINT).exists()


def require_unused(folder: Path) -> None:
    """TrainingError if the folder holds a run or a model, which a new run would overwrite."""
    for name, advice in ((CHECKPOINT, "go on with --resume, or "), (WEIGHTS, ""), (CONFIG, "")):
        if (folder / name).exists():
            raise TrainingError(f"{folder} already holds {name}: {advice}choose another folder with --out")


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state, which consists of dicts, lists, numbers, texts and tensors. OSError: see `atomic_write`."""
    with atomic_write(folder / CHECKPOINT) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of torch's writer, when it closes the file on a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state of a run, on the CPU. TrainingError: it can't be read."""
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "settings": dict(state["settings"])}
    except MemoryError:
        raise
    except Exception as error:  # pickle, zip and torch raise many kinds
        reason = str(error).partition("\n")[0][:200]
        raise TrainingError(f"{path} is damaged, or no checkpoint: start over in another folder ({reason})") from None


def data_fingerprint(data: ImageData) -> str:
    """A digest of shape, classes, labels and 16 images, so that other pictures with the same labels are noticed."""
    digest = hashlib.sha256(repr((data.image_shape, data.class_ids, len(data))).encode())
    digest.update(np.ascontiguousarray(data.targets).tobytes())
    for x, _ in data.batches(np.linspace(0, len(data) - 1, 16).astype(np.int64), 16):
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def check_same_run(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """TrainingError, naming the difference, unless the states `then` and `now` are of one run.

    Both have "settings", a "fingerprint" of the data, and "init_from".
    """
    old, new = then["settings"], now["settings"]
    names = [name for name in {**new, **old} if name not in FREE and old.get(name) != new.get(name)]
    if names:
        pairs = ", ".join(f"{name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names)
        raise TrainingError(f"{folder} holds a run with other settings ({pairs}); use the same or another folder")
    for key, what in (("fingerprint", "on other data"), ("init_from", "from another start model")):
        if then.get(key) != now[key]:
            raise TrainingError(f"{folder} holds a run {what}; use the same options or another folder")
