"""One count of epochs for all workers of a DataLoader, and for whoever else iterates."""

from __future__ import annotations

import contextlib
import os
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from glem_augment.locks import locked, shared_lock

RANKS, STARTS = 1024, 1024  # rows of the two tables


class Epochs:
    """Which epoch begins next, in memory that this process shares with its workers, forked or spawned.

    The workers of a DataLoader have to find one number, though nothing tells them that an epoch begins, and though they
    begin it at any time and in any order. What they have in common is the loader's seed, and how often they have begun
    one. So the first of them takes the next number and writes down for whom; the others find it there. A worker that
    finds only epochs which it has begun itself is the first: torch was seeded again, and the loader's seed is the same.
    """

    def __init__(self) -> None:
        # Next epoch of each rank: `torch.multiprocessing.spawn` has them share this memory.
        self._next = torch.zeros(RANKS, dtype=torch.int64).share_memory_()
        # The last starts of workers: who (a row of `_who`, then the worker), a serial number from 1 and the epoch, both
        # the same for all workers that began together.
        self._starts = torch.zeros(STARTS, 8, dtype=torch.int64).share_memory_()
        self._lock, _ = shared_lock("spawn")
        self._begun = 0  # in a worker: epochs that it has begun

    def next(self, rank: int, ranks: int) -> int:
        """The number of the next epoch."""
        # One process alone has no share: nobody may repeat what it gave before the ranks were there.
        return int(self._next.max() if ranks == 1 else self._next[rank % RANKS])

    def set(self, epoch: int) -> None:
        """Make it the next."""
        with self._locked():
            self._next.fill_(epoch)

    def begin(self, rank: int, ranks: int) -> int:
        """The number of the epoch that this process, or this worker, begins now."""
        info = get_worker_info()
        if info is None:
            with self._locked():
                return self._take(rank, ranks)
        who = np.array([rank, os.getppid(), info.seed - info.id, info.num_workers, self._begun])
        self._begun += 1
        starts = self._starts.numpy()
        with self._locked():
            ours = starts[(starts[:, :5] == who).all(axis=1) & (starts[:, 6] > 0)]
            mine = ours[ours[:, 5] == info.id, 6].max(initial=0)
            others = ours[ours[:, 6] > mine]
            if len(others):
                serial, epoch = others[others[:, 6].argmin(), 6:].tolist()
            else:
                serial, epoch = int(starts[:, 6].max()) + 1, self._take(rank, ranks)
            oldest = starts[:, 6].argmin()
            # All of them that began together: of half of them a worker could not tell whether it was one.
            starts[starts[:, 6] == starts[oldest, 6]] = 0
            starts[oldest] = [*who, info.id, serial, epoch]
        return epoch

    def _take(self, rank: int, ranks: int) -> int:
        epoch = self.next(rank, ranks)
        if ranks == 1:
            self._next.fill_(epoch + 1)
        else:
            self._next[rank % RANKS] = epoch + 1
        return epoch

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(
            self._lock, "the epochs of a SyntheticStream are", "make the stream again, and go on with set_epoch"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A process that is being started shares them. What goes anywhere else (a copy, a file, a queue) is on its own.
        if get_spawning_popen() is not None:
            return self.__dict__
        with self._locked():
            return {"_next": self._next.clone(), "_starts": torch.zeros_like(self._starts), "_begun": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._next.share_memory_()
        self._starts.share_memory_()
        if "_lock" not in state:
            self._lock, _ = shared_lock("spawn")
