"""Random draws that resume, and that differ on every rank and in every DataLoader worker.

The state is two whole numbers: call number n draws from a generator of its own, seeded from (seed, rank, worker, n).
Nothing else of the past has to be stored, so a checkpoint of rank 0 resumes every rank where it was, and torch's own
seed plays no part. Each worker's calls are counted in shared memory and go into its n. The counts live on when the
workers of an epoch end, and they are saved too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from glem_augment.checks import check_whole
from glem_augment.distributed import rank

WORKERS = 1024  # rows of a WorkerCounts; worker w uses row w modulo this


class WorkerCounts:
    """Whole numbers in shared memory, a row of them for each DataLoader worker.

    A worker adds to its own row, and the main process reads all of them. The workers of the next epoch share the same
    memory and continue the counts. A deep copy, or an object that is loaded from a file, has memory of its own.

    Args:
        shape: of a row.
    """

    def __init__(self, *shape: int) -> None:
        with torch.inference_mode(False):  # otherwise nobody could change the numbers outside it
            self.rows = torch.zeros(WORKERS, *shape, dtype=torch.int64, device="cpu").share_memory_()

    def own(self) -> Tensor:
        """This worker's row, to be changed in place. The main process has that of worker 0."""
        info = get_worker_info()
        return self.rows[0 if info is None else info.id % WORKERS]

    def total(self) -> Tensor:
        """The sum over all workers."""
        return self.rows.sum(dim=0)

    def trimmed(self) -> list[int]:
        """The rows, of one number each, without the zeros at the end."""
        return np.trim_zeros(self.rows.numpy(), "b").tolist()

    def restore(self, counts: Sequence[int]) -> None:
        """Take over what `trimmed` gave."""
        self.rows.zero_()
        self.rows[: len(counts)] = torch.tensor(counts, dtype=torch.int64, device="cpu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows.share_memory_()


class RandomState:
    """Gives a generator for every call.

    Args:
        seed: an int, or None to draw one from torch's global generator.
    """

    def __init__(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        self.seed = check_whole("seed", seed, -(2**63))
        self.calls = 0
        self._in_workers = WorkerCounts()
        self._sender = 0  # the rank of the process that sent this copy: a spawned worker does not know its rank

    @torch.compiler.disable  # Dynamo would trace NumPy's whole numbers as tensors
    def generator(self) -> torch.Generator:
        """The generator of the next call; on the CPU, so that the draws are the same on every device."""
        info = get_worker_info()
        key = [self.seed % 2**64, rank(self._sender)]
        if info is None:
            key += [self.calls]
            self.calls += 1
        else:
            # The worker has a copy of this state from when the epoch began. SeedSequence ignores zeros at the end, so
            # worker 0 needs another number than the main process.
            own = self._in_workers.own()
            key += [self.calls + int(own), info.id + 1]
            own += 1
        word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        return torch.Generator("cpu").manual_seed(word >> 1)

    def state(self) -> dict[str, Any]:
        """What `restore` needs: whole numbers `seed` and `calls`, and a list of them, `workers`, if there were any."""
        counts = self._in_workers.trimmed()
        return {"seed": self.seed, "calls": self.calls, **({"workers": counts} if counts else {})}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.seed, self.calls = state["seed"], state["calls"]
        self._in_workers.restore(state.get("workers", []))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sender": rank(self._sender)}
