"""The log of a run: `metrics.jsonl`, and callbacks that get its rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from glem_augment.distributed import is_primary
from glem_augment.io import atomic_write, finite

METRICS = "metrics.jsonl"
# Called with every row of metrics.jsonl: "kind" is "step", "epoch" or "final", and "step" counts E-steps.
Callback = Callable[[dict[str, Any]], None]


class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl`, and gives it to the `callbacks`, on rank 0."""

    def __init__(self, folder: Path, callbacks: Iterable[Callback] = ()) -> None:
        self.path, self.callbacks = folder / METRICS, list(callbacks)

    def begin(self, step: int) -> None:
        """Drop rows beyond the step of the checkpoint, so that no step appears twice."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        with atomic_write(self.path, "w") as file:
            file.writelines(line + "\n" for line in lines if _keep(line, step))

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, with null in place of numbers that are not finite."""
        if not is_primary():
            return
        row = finite(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for callback in self.callbacks:
            callback(dict(row))


def _keep(line: str, step: int) -> bool:
    """Whether a line is a whole row up to a step. The final row is written again."""
    try:
        row = json.loads(line)
        return row["kind"] != "final" and row.get("step", math.inf) <= step
    except (ValueError, TypeError, KeyError):
        return False
