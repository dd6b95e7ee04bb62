"""The rows of ``augmentation.py``: one file of tuning rows, one of final ones, each a JSON list."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.proof.augmentation_settings import PROTOCOL
from glem_augment.io import write_json

if TYPE_CHECKING:
    from benchmarks.proof.augmentation_plan import Cell

FINAL, TUNING = "augmentation.json", "augmentation_tuning.json"
# What makes two rows the same cell. The order in the files, too.
IDENTITY = ("stage", "setting", "classifier", "flow", "method", "params", "base", "seed", "protocol")


def identity(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in IDENTITY], sort_keys=True)


class Store:
    """Both files in ``folder``, read when they have changed, so that two processes may share the work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[int, list[dict[str, Any]], set[str]]] = {}

    def rows(self, final: bool) -> list[dict[str, Any]]:
        """All rows of this protocol."""
        return self._file(FINAL if final else TUNING)[0]

    def has(self, cell: Cell) -> bool:
        return identity({**cell.row(), "protocol": PROTOCOL}) in self._file(_file_of(cell.stage))[1]

    def find(self, cell: Cell) -> dict[str, Any] | None:
        wanted = identity({**cell.row(), "protocol": PROTOCOL})
        rows = self._file(_file_of(cell.stage))[0]
        return next((row for row in rows if identity(row) == wanted), None)

    def add(self, row: dict[str, Any]) -> None:
        path = self.folder / _file_of(row["stage"])
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
            rows = [old for old in rows if identity(old) != identity(row)] + [row]
            write_json(path, rows)

    def _file(self, name: str) -> tuple[list[dict[str, Any]], set[str]]:
        path = self.folder / name
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if name not in self._read or self._read[name][0] != stamp:
            rows = json.loads(path.read_text(encoding="utf-8")) if stamp else []
            rows = [row for row in rows if row["protocol"] == PROTOCOL]
            self._read[name] = (stamp, rows, {identity(row) for row in rows})
        return self._read[name][1:]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.folder / ".augmentation.tmp", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _file_of(stage: str) -> str:
    return FINAL if stage == "final" else TUNING
