"""Counts of the rows that a transform selected and rejected."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

MOST_REJECTED = 0.05  # more rejected moves or samples than this part of all are reported


class MoveCounts:
    """Counts of rows over all calls in this process; each DataLoader worker has counts of its rows.

    selected: rows chosen to be changed. rejected: chosen rows that were kept, since the decoded image was out of range
    or the model did not give the original back. unmapped: chosen rows of a class that the model lacks.
    """

    FIRST, MOST = 100, 0.5  # a warning is given if more than this part of the first rows was kept as it was

    def __init__(self) -> None:
        self._selected = self._rejected = self._unmapped = 0
        self._unread: list[Tensor] = []
        self._judged = False

    def add(self, selected: int, unmapped: int, rejected: Tensor) -> None:
        """Add one call's counts. `rejected` is a tensor of one number on any device, which is read later."""
        self._selected += selected
        self._unmapped += unmapped
        self._unread.append(rejected)
        if rejected.device.type == "cpu" or len(self._unread) >= self.FIRST:
            self._read()

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        self._read()
        return {"selected": self._selected, "rejected": self._rejected, "unmapped": self._unmapped}

    def _read(self) -> None:
        self._rejected += sum(int(count) for count in self._unread)
        self._unread.clear()
        selected, rejected, unmapped = self._selected, self._rejected, self._unmapped
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
