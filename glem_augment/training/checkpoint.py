"""Checkpoints that survive a kill at any instant."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import torch

from glem_augment.errors import TrainingError
from glem_augment.io import atomic_write

NAME = "checkpoint.pt"
VERSION = 1


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
