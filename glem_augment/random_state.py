"""A random state of two whole numbers: easy to save, resumable, and different on every rank and worker.

Call number n on a rank and worker draws from its own generator, seeded from (seed, rank, worker, n). So nothing of
the past has to be stored but n, a checkpoint that rank 0 wrote resumes every rank where it was, and torch's own seed
plays no part.

The calls of each DataLoader worker are counted in shared memory and are part of its n, from epoch to epoch. Their
counts are saved too: a run that is resumed after an epoch goes on with the draws that it would have met.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from glem_augment.counts import WorkerCounts


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
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        elif isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an int or None, got {seed!r}")
        self.seed = int(seed)
        self.calls = 0
        self._in_workers = WorkerCounts()
        self._sender = 0  # rank of the process that sent this copy: a worker that is started anew knows no rank

    @torch.compiler.disable  # Dynamo would trace NumPy's whole numbers as tensors, whose operations are others
    def generator(self) -> torch.Generator:
        """The next call's generator. On the CPU whatever the batch: the same draws on every device, and no sync."""
        info = get_worker_info()
        if info is None:
            number, worker = self.calls, []
            self.calls += 1
        else:
            # The worker's copy of this state is that of the main process when the epoch began.
            # Not 0, which SeedSequence can't tell from nothing: the main process's.
            number, worker = self.calls + int(self._in_workers.own()), [info.id + 1]
            self._in_workers.own().add_(1)
        words = np.random.SeedSequence([self.seed % 2**64, rank(self._sender), number, *worker]).generate_state(
            1, np.uint64
        )
        # On the CPU a generator takes any 64 bits; the highest one is left out for those that do not.
        return torch.Generator("cpu").manual_seed(int(words[0]) >> 1)

    def state(self) -> dict[str, Any]:
        """What `restore` needs: whole numbers, and `workers`, a list of them, where there have been any."""
        counts = np.trim_zeros(self._in_workers.rows.numpy(), "b").tolist()
        return {"seed": self.seed, "calls": self.calls, **({"workers": counts} if counts else {})}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken; ValueError for what is no such state."""
        try:
            seed, calls = int(state["seed"]), int(state["calls"])
            counts = torch.tensor([int(count) for count in state.get("workers", [])], dtype=torch.int64, device="cpu")
            rows = torch.zeros_like(self._in_workers.rows)
            rows[: len(counts)] = counts
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"a random state has whole numbers 'seed' and 'calls', got {state!r}") from None
        self.seed, self.calls = seed, calls
        self._in_workers.rows.copy_(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sender": rank(self._sender)}
