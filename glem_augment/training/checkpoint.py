"""Checkpoints of a run.

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
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from glem_augment.errors import TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.io import atomic_write
from glem_augment.model.weights import CONFIG, WEIGHTS

NEWEST, GOOD = "checkpoint.safetensors", "checkpoint.good.safetensors"
_KEY, _FORMAT, _DIGEST_BYTES = "glem-augment-state", b"glem-augment checkpoint 5", 32
# Settings that may change when a run is resumed. "threads" and "memory" change the last bits of the weights.
FREE = {"max_minutes", "sample_every", "workers", "threads", "memory", "modes_rank"}


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
            warnings.warn(f"{'; '.join(problems)}. {going_on}", stacklevel=4)
        return Checkpoint(path, facts, tensors)
    if problems:
        raise TrainingError(f"{'; '.join(problems)}. Restore one, or start over in another folder")
    raise FileNotFoundError(errno.ENOENT, f"no checkpoint at {folder / NEWEST}; start without --resume")


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


def check_same_run(checkpoint: Checkpoint, settings: dict[str, Any], fingerprint: str, data_name: str) -> None:
    """TrainingError, naming the difference, unless `checkpoint` belongs to a run with these settings and data."""
    folder, then = checkpoint.path.parent, checkpoint.facts["config"]
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    names = [name for name in {**now, **then} if name not in FREE and then.get(name) != now.get(name)]
    if names:
        pairs = ", ".join(f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in names)
        raise TrainingError(f"{folder} holds a run with other settings ({pairs}); use the same or another folder")
    if checkpoint.facts.get("fingerprint") != fingerprint:
        raise TrainingError(f"{folder} holds a run on other data than {data_name}; use another folder")
