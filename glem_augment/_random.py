"""A random state of two whole numbers: easy to save, resumable, and different on every rank and worker.

Call number n on a rank and worker draws from its own generator, seeded from (seed, rank, worker, n). So nothing of
the past has to be stored but n, and a checkpoint that rank 0 wrote resumes every rank where it was.

The calls that DataLoader workers make are counted in shared memory and are part of n as well: a run that is resumed
does not meet the draws of its first epoch again, even where torch's own seed, and with it the workers', is the same.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from glem_augment._counts import WorkerCounts


def rank(otherwise: int = 0) -> int:
    """This process's rank, or `otherwise` where nothing is distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return otherwise


class RandomState:
    """Generators, one per call.

    Args:
        seed: int, or None: one from torch's global generator.

    Raises:
        TypeError: for another type.
    """

    def __init__(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
        elif isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an int or None, got {seed!r}")
        self.seed = int(seed)
        self.calls = 0
        self._in_workers = WorkerCounts()
        self._sender = 0  # rank of the process that sent this copy: a worker that is started anew knows no rank

    def generator(self) -> torch.Generator:
        """The next call's generator. On the CPU whatever the batch: the same draws on every device, and no sync."""
        info = get_worker_info()
        # A worker's seed changes from epoch to epoch, its copy of this state starts from the same call again.
        worker = [] if info is None else [info.seed % 2**64]
        words = np.random.SeedSequence([self.seed % 2**64, rank(self._sender), self.calls, *worker]).generate_state(
            1, np.uint64
        )
        self.calls += 1
        if info is not None:
            self._in_workers.own().add_(1)
        # On the CPU a generator takes any 64 bits; the highest one is left out for those that do not.
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))

    def state(self) -> dict[str, int]:
        """What `restore` needs."""
        return {"seed": self.seed, "calls": self.calls + int(self._in_workers.total())}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where the state was taken; ValueError for what is no such state."""
        try:
            seed, calls = int(state["seed"]), int(state["calls"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"a random state has whole numbers 'seed' and 'calls', got {state!r}") from None
        self.seed, self.calls = seed, calls
        self._in_workers.rows.zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sender": rank(self._sender)}
