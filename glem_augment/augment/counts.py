"""Counts of the rows that a transform selected and rejected, here and in DataLoader workers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

MOST_REJECTED = 0.05  # more rejected moves or samples than this part of all are reported
WORKERS = 64


class MoveCounts:
    """Counts of rows over all calls, in shared memory: each DataLoader worker adds to a row that no other one changes.

    selected: rows chosen to be changed. rejected: chosen rows that were kept, since the decoded image was out of range
    or the model did not give the original back. unmapped: chosen rows of a class that the model lacks.
    """

    NAMES = ("selected", "rejected", "unmapped")
    FIRST, MOST = 100, 0.5  # a warning is given if more than this part of the first rows was kept as it was

    def __init__(self) -> None:
        with torch.inference_mode(False):  # inference tensors could not be changed outside that mode
            self._counts = torch.zeros(1 + WORKERS, len(self.NAMES), dtype=torch.int64, device="cpu").share_memory_()
        self._unread: list[Tensor] = []
        self._judged = False

    def add(self, selected: int, unmapped: int, rejected: Tensor) -> None:
        """Add one call's counts. `rejected` is a tensor of one number on any device, which is read later."""
        own = self._own()
        own[0] += selected
        own[2] += unmapped
        self._unread.append(rejected)
        if rejected.device.type == "cpu" or len(self._unread) >= self.FIRST:
            self._read()

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        self._read()
        return dict(zip(self.NAMES, self._counts.sum(0).tolist(), strict=True))

    def _own(self) -> Any:
        """The row of this process, as an array: torch takes longer for single numbers."""
        info = get_worker_info()
        return self._counts.numpy()[0 if info is None else 1 + info.id % WORKERS]

    def _read(self) -> None:
        own = self._own()
        own[1] += sum(int(count) for count in self._unread)
        self._unread.clear()
        selected, rejected, unmapped = own.tolist()
        if self._judged or selected < self.FIRST:
            return
        self._judged = True
        if rejected + unmapped > self.MOST * selected:
            warnings.warn(
                f"of the first {selected} images chosen {rejected} were kept as they were because the moved ones were "
                f"out of range or the model does not give the originals back, and {unmapped} because the model does "
                "not have their class (see aug.stats). Fit the model to images like these (model.adapt), lower the "
                "strength, or put the transform before strong crops, RandAugment and RandomErasing",
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        self._read()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # for the workers of this copy
