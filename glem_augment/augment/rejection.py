"""Rejected moves: which calls test the inverse, and counts of the rows that were selected and rejected."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from glem_augment.augment.random import WorkerCounts
from glem_augment.tensors import weights_key


class InverseTest:
    """Chooses the calls that test whether the flow gives the images back.

    These are all calls until FIRST tests in a row lose no image, then one call in EVERY. New weights start this again.
    """

    FIRST, EVERY = 8, 32

    def __init__(self) -> None:
        self._key: object = None
        self._calls = self._good = 0

    def due(self, flow: nn.Module) -> bool:
        """Whether the call that begins now tests the inverse."""
        key = weights_key(flow)
        if key != self._key:
            self._key, self._good = key, 0
        self._calls += 1
        return self._good < self.FIRST or self._calls % self.EVERY == 0

    def saw(self, back: Tensor) -> None:
        """Note the result of a test, bool [n]; this waits for the device."""
        self._good = self._good + 1 if bool(back.all()) else 0


class MoveCounts:
    """Counts of rows over all calls, here and in DataLoader workers.

    selected: rows chosen to be changed. replaced: chosen rows that were kept, since the decoded image was not plausible
    or the flow did not give the original back. unmapped: chosen rows of a class that the flow lacks.
    """

    NAMES = ("selected", "replaced", "unmapped")
    FIRST, MOST = 100, 0.5  # a warning is given if more than this share of the first rows was kept as it was

    def __init__(self) -> None:
        self._counts = WorkerCounts(len(self.NAMES))
        self._unread: list[Tensor] = []
        self._judged = False

    def add(self, selected: int, unmapped: int, replaced: Tensor) -> None:
        """Add one call's counts. `replaced` is a tensor of one number on any device, which is read later."""
        own = self._counts.own()
        own[0] += selected
        own[2] += unmapped
        self._unread.append(replaced)
        if replaced.device.type == "cpu" or len(self._unread) >= self.FIRST:
            self._read()

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        self._read()
        return dict(zip(self.NAMES, self._counts.total().tolist(), strict=True))

    def _read(self) -> None:
        own = self._counts.own()
        own[1] += sum(int(count) for count in self._unread)
        self._unread.clear()
        selected, replaced, unmapped = own.tolist()
        if self._judged or selected < self.FIRST:
            return
        self._judged = True
        if replaced + unmapped > self.MOST * selected:
            warnings.warn(
                f"of the first {selected} images chosen {replaced} were kept as they were because the moved ones were "
                f"not plausible or the flow does not give the originals back, and {unmapped} because the flow does not "
                "have their class (see aug.stats). Fit the flow to images like these (model.adapt), lower the "
                "strength, or put the transform before strong crops, RandAugment and RandomErasing",
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        self._read()
        return self.__dict__
