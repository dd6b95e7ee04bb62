"""Counts that live in several places: in DataLoader workers, and on devices that should not be waited for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

WORKERS = 1024  # rows; worker w uses row w mod this
FIRST, MOST = 100, 0.5  # rows after which `MoveCounts` judges, and the share it takes for too many


class WorkerCounts:
    """Numbers in shared memory, a row for each DataLoader worker: it adds to its own, the main process reads them all.

    Workers of the next epoch, which start from a copy of the object that holds this, go on where the last ones were. A
    copy or what comes out of a file has memory of its own, shared with its own workers.

    Args:
        shape: of a row; dtype: of the numbers; workers: rows.
    """

    def __init__(self, *shape: int, dtype: torch.dtype = torch.int64, workers: int = WORKERS) -> None:
        with torch.inference_mode(False):  # or the numbers could not be changed outside it
            self.rows = torch.zeros(workers, *shape, dtype=dtype, device="cpu").share_memory_()

    def own(self) -> Tensor:
        """This worker's row, to be changed in place; the main process has that of worker 0."""
        info = get_worker_info()
        return self.rows[0 if info is None else info.id % len(self.rows)]

    def total(self) -> Tensor:
        """Over all workers."""
        return self.rows.sum(dim=0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows.share_memory_()


class MoveCounts:
    """What GLEMAugment counts: `selected`, `replaced`, `unmapped` and `invalid` rows (see `GLEMAugment.stats`).

    Attributes:
        here: the four that are known on the CPU without waiting.
    """

    NAMES = ("selected", "replaced", "unmapped", "invalid")

    def __init__(self) -> None:
        self.here = [0, 0, 0, 0]
        self._devices: dict[torch.device, Tensor] = {}
        self._in_workers = WorkerCounts(4)
        self._judged = False
        self._told: list[int] | None = None  # in a worker: what of its counts is there already

    def on(self, device: torch.device) -> Tensor:
        """int64 [3] on a device, to be added to in place: replaced, unmapped, invalid."""
        if device not in self._devices:
            # One made under inference_mode could not be added to in a later call outside it.
            with torch.inference_mode(False):
                self._devices[device] = torch.zeros(3, dtype=torch.int64, device=device)
        return self._devices[device]

    def warn_where_most_are_lost(self) -> None:
        """On the CPU, once the first rows have been selected: warn if most of them were kept because their moved images
        were not plausible."""
        if self._judged or self.here[0] < FIRST:
            return
        self._judged = True
        selected, replaced, *_ = self._own()
        if replaced > MOST * selected:
            warnings.warn(
                "most of the first images chosen were kept as they were, because the moved ones were not plausible: "
                "the flow does not know such images (see aug.stats). Train it longer, adapt it to them, or lower the "
                "strength",
                stacklevel=3,
            )

    def stats(self) -> dict[str, int]:
        """All counts; waits for the devices."""
        own, workers = self._own(), self._in_workers.total().tolist()
        return {name: a + b for name, a, b in zip(self.NAMES, own, workers, strict=True)}

    def tell(self) -> None:
        """In a worker, before and after a call: put what was counted since where the main process reads it."""
        if get_worker_info() is None:
            return
        counts = self._own()
        if self._told is not None:
            self._in_workers.own().add_(torch.tensor(counts, device="cpu") - torch.tensor(self._told, device="cpu"))
        self._told = counts

    def _own(self) -> list[int]:
        totals = torch.tensor(self.here, device="cpu")
        for device, counts in self._devices.items():
            if device.type != "cpu" and get_worker_info() is not None:
                continue  # the main process's, which a forked worker can't read
            totals[1:] += counts.cpu()
        return totals.tolist()

    def __getstate__(self) -> dict[str, Any]:
        # What devices hold goes along as numbers: the other process may not have them.
        return {**self.__dict__, "here": self._own(), "_devices": {}, "_told": None}
