"""Counts of the rows that a transform selected and rejected."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

MOST_REJECTED = 0.05  # more rejected moves or samples than this part of all are reported


class MoveCounts:
    """Counts of rows over all calls in this process; each DataLoader worker has counts of its rows.

    selected: rows chosen to be changed. rejected: chosen rows that were kept, since the decoded image was out of range
    or the model did not give the original back. unmapped: chosen rows of a class that the model lacks.
    """

    FIRST, MOST = 100, 0.5  # a warning is given if more than this part of the first rows was kept as it was

    def __init__(self) -> None:
        self._selected = self._unmapped = 0
        self._rejected = torch.zeros((), dtype=torch.int64, device="cpu")
        self._judged = False

    def add(self, selected: int, unmapped: int, rejected: Tensor) -> None:
        """Add one call's counts. `rejected` is a tensor of one number on any device, which is not waited for."""
        self._selected += selected
        self._unmapped += unmapped
        self._rejected = self._rejected.to(rejected.device) + rejected
        if self._judged or self._selected < self.FIRST:
            return
        self._judged, found = True, self.stats()
        if found["rejected"] + found["unmapped"] > self.MOST * found["selected"]:
            warnings.warn(
                f"of the first {found['selected']} images chosen {found['rejected']} were kept as they were because "
                "the moved ones were out of range or the model does not give the originals back, and "
                f"{found['unmapped']} because the model does not have their class (see aug.stats). Fit the model to "
                "images like these (model.adapt), lower the strength, or put the transform before strong crops, "
                "RandAugment and RandomErasing",
                stacklevel=4,
            )

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        return {"selected": self._selected, "rejected": int(self._rejected), "unmapped": self._unmapped}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rejected": self._rejected.cpu()}
