"""What a transform remembers between its calls, here and in DataLoader workers.

Draws resume, and they differ on every rank and in every DataLoader worker: call number n has a new generator, seeded
from (seed, rank, worker, n). So a checkpoint of rank 0 resumes every rank, and torch's global seed has no effect. Each
worker's calls, and the rows that it selected and rejected, are counted in shared memory, which outlives the workers of
an epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from glem_augment.checks import check_whole
from glem_augment.distributed import rank

WORKERS = 1024  # rows of a WorkerCounts; worker w has row w % WORKERS
MOST_REJECTED = 0.05  # more rejected moves or samples than this part of all are reported


class WorkerCounts:
    """Whole numbers in shared memory, a row of `shape` for each DataLoader worker.

    A worker adds to its row, and the main process reads all rows. A deep copy or an unpickled object has new memory.
    """

    def __init__(self, *shape: int) -> None:
        with torch.inference_mode(False):  # inference tensors could not be changed outside that mode
            self.rows = torch.zeros(WORKERS, *shape, dtype=torch.int64, device="cpu").share_memory_()

    def own(self) -> Tensor:
        """This worker's row, to be changed in place. The main process has the row of worker 0."""
        info = get_worker_info()
        return self.rows[0 if info is None else info.id % WORKERS]

    def total(self) -> Tensor:
        """The sum over all workers."""
        return self.rows.sum(dim=0)

    def trimmed(self) -> list[int]:
        """The rows, of one number each, without the zeros at the end."""
        return np.trim_zeros(self.rows.numpy(), "b").tolist()

    def restore(self, counts: Sequence[int]) -> None:
        """Set the rows to `counts`, a result of `trimmed`."""
        self.rows.zero_()
        self.rows[: len(counts)] = torch.tensor(counts, dtype=torch.int64, device="cpu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows.share_memory_()


class RandomState:
    """Gives a generator for every call. The seed None is drawn from torch's global generator."""

    def __init__(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        self.seed = check_whole("seed", seed, -(2**63))
        self.calls = 0
        self._in_workers = WorkerCounts()
        self._sender = 0  # the rank of the process that pickled this copy: a spawned worker has no rank

    @torch.compiler.disable  # Dynamo would trace NumPy's whole numbers as tensors
    def generator(self) -> torch.Generator:
        """The generator of the next call; on the CPU, so that the draws are the same on every device."""
        info = get_worker_info()
        key = [self.seed % 2**64, rank(self._sender)]
        if info is None:
            key += [self.calls]
            self.calls += 1
        else:
            # The worker's copy of this state is from the start of the epoch. SeedSequence ignores zeros at the end, so
            # worker 0 needs another number than the main process.
            own = self._in_workers.own()
            key += [self.calls + int(own), info.id + 1]
            own += 1
        word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        return torch.Generator("cpu").manual_seed(word >> 1)

    def state(self) -> dict[str, Any]:
        """The state for `restore`: whole numbers `seed`, `calls`, and, after calls in workers, a list `workers`."""
        counts = self._in_workers.trimmed()
        return {"seed": self.seed, "calls": self.calls, **({"workers": counts} if counts else {})}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.seed, self.calls = state["seed"], state["calls"]
        self._in_workers.restore(state.get("workers", []))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sender": rank(self._sender)}


class MoveCounts:
    """Counts of rows over all calls, here and in DataLoader workers.

    selected: rows chosen to be changed. rejected: chosen rows that were kept, since the decoded image was out of range
    or the model did not give the original back. unmapped: chosen rows of a class that the model lacks.
    """

    NAMES = ("selected", "rejected", "unmapped")
    FIRST, MOST = 100, 0.5  # a warning is given if more than this part of the first rows was kept as it was

    def __init__(self) -> None:
        self._counts = WorkerCounts(len(self.NAMES))
        self._unread: list[Tensor] = []
        self._judged = False

    def add(self, selected: int, unmapped: int, rejected: Tensor) -> None:
        """Add one call's counts. `rejected` is a tensor of one number on any device, which is read later."""
        own = self._counts.own()
        own[0] += selected
        own[2] += unmapped
        self._unread.append(rejected)
        if rejected.device.type == "cpu" or len(self._unread) >= self.FIRST:
            self._read()

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        self._read()
        return dict(zip(self.NAMES, self._counts.total().tolist(), strict=True))

    def _read(self) -> None:
        own = self._counts.own()
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
