"""Checkpoints that survive a kill at any instant, and whether one belongs to the run at hand."""

from __future__ import annotations

import errno
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glem_augment.data import ImageData
from glem_augment.errors import TrainingError
from glem_augment.io import atomic_write
from glem_augment.training.config import TrainConfig

NAME = "checkpoint.pt"
VERSION = 1
_FINGERPRINT_IMAGES = 16
# Settings that do not change what is learned may differ between the two halves of a run.
_FREE = {"checkpoint_minutes", "sample_every", "workers", "threads", "max_bad_steps"}


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``folder/checkpoint.pt``: serialised in memory, written to a temporary name, renamed.

    Raises:
        OSError: full disk and the like, naming the path; the previous checkpoint stays as it was.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    with atomic_write(folder / NAME) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read ``folder/checkpoint.pt`` without running code from it.

    Raises:
        FileNotFoundError: there is none.
        TrainingError: truncated, foreign, or of another version.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes, EINVAL among them
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingError(f"{path} can't be read ({first}); delete it to start over") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise TrainingError(f"{path} is no checkpoint of this version; delete it to start over")
    return state


def data_fingerprint(data: ImageData) -> str:
    """A digest of shape, classes, labels and a few images, so that other pictures with the same labels are noticed."""
    digest = hashlib.sha256()
    digest.update(repr((data.image_shape, data.class_ids, len(data))).encode())
    digest.update(np.ascontiguousarray(data.targets).tobytes())
    rows = np.linspace(0, len(data) - 1, _FINGERPRINT_IMAGES).astype(np.int64)
    for x, _ in data.batches(rows, _FINGERPRINT_IMAGES):
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def check_same_run(folder: Path, state: dict[str, Any], config: TrainConfig, fingerprint: str, data_name: str) -> None:
    """Raise TrainingError, naming what differs, unless ``state`` is of a run with these settings on these data.

    Another number of threads is only warned about: it changes the last bits of sums, not what is learned.
    """
    then, now = state["config"], config.to_dict()
    changed = [key for key in now if key not in _FREE and then.get(key) != now[key]]
    if changed:
        pairs = ", ".join(f"{key}: {then.get(key)!r} then, {now[key]!r} now" for key in changed)
        raise TrainingError(f"{folder} holds a run with other settings ({pairs}); use the same or another folder")
    if then.get("threads") != config.threads:
        warnings.warn(
            f"{folder} was trained with threads={then.get('threads')}, now {config.threads}: sums are taken in another "
            "order, so the weights will not be those of an uninterrupted run to the last bit",
            stacklevel=3,
        )
    if state["fingerprint"] != fingerprint:
        raise TrainingError(f"{folder} holds a run on other data than {data_name}; use another folder")
