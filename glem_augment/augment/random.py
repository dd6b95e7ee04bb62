"""The random choices of a call of GLEMAugment, where they come from, and counts of the rows that they chose.

Draws resume, and they differ on every rank and in every DataLoader worker: call number n has a new generator, seeded
from (seed, rank, worker, n). So a checkpoint of rank 0 resumes every rank, and torch's global seed has no effect. Each
worker's calls are counted in shared memory, which outlives the workers of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from glem_augment.checks import check_whole
from glem_augment.distributed import rank
from glem_augment.tensors import send


@dataclass
class AugmentParams:
    """The random choices of one call, for n selected rows of a batch of B; `draw` gives them on the CPU.

    Attributes:
        rows: int64 [n], the rows to change, rising.
        cls: int64 [n], the flow class of each row, whose modes are used; -1: the flow does not have the class, and the
            row is passed through.
        eps: float32 [n, k], standard normal: the coefficients of k modes.
        partner: int64 [n], the partner's row in the batch; -1: the partner is drawn from the RFCM of its class.
        partner_cls: int64 [n], the flow class of the partner; -1: a row of a class that the flow does not have.
        l: float32 [n] in [1/2, 1], the share of the row's image along the modes.
        seeds: int64 [n], seeds of the rows for partners that are drawn.

    Policies "noise" and "adversarial" have only rows, cls and eps; "mixup" has all but eps. Other fields are empty.
    """

    rows: Tensor
    cls: Tensor
    eps: Tensor
    partner: Tensor
    partner_cls: Tensor
    l: Tensor  # noqa: E741  (the paper's letter)
    seeds: Tensor

    def to(self, device: torch.device | str) -> AugmentParams:
        """The same parameters on another device."""
        return AugmentParams(**{f.name: send(getattr(self, f.name), torch.device(device)) for f in fields(self)})

    def where(self, mask: Tensor) -> AugmentParams:
        """The parameters of the selected rows for which `mask`, bool [n], holds."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        n = len(self.rows)
        return AugmentParams(**{name: value[mask] if len(value) == n else value for name, value in values.items()})


# ---- generators -----------------------------------------------------------------------------------------------------

WORKERS = 1024  # rows of a WorkerCounts; worker w has row w % WORKERS


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
        """Set the rows that `trimmed` gave."""
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


# ---- draws ----------------------------------------------------------------------------------------------------------


def choose_rows(batch: int, p: float, generator: torch.Generator) -> Tensor:
    """Rows to change, int64 [n], rising. Each is chosen with probability p; n is p * batch, rounded up or down.

    A coin for each row would give another n in each batch. oneDNN, cuDNN and torch.compile prepare for each new shape.
    """
    n = math.floor(p * batch + float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu")))
    return torch.randperm(batch, generator=generator, device="cpu")[:n].sort().values


def draw_shares(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """max(l, 1 - l) for l ~ Beta(alpha, alpha): float32 [n] in [1/2, 1]."""
    # NumPy draws it, because torch.distributions takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    share = np.random.default_rng(seed).beta(alpha, alpha, n)
    return torch.tensor(np.maximum(share, 1.0 - share), dtype=torch.float32, device="cpu")


def normal(n: int, m: int, generator: torch.Generator) -> Tensor:
    """Standard normal float32 [n, m] on the CPU, for any defaults of torch."""
    return torch.randn(n, m, generator=generator, dtype=torch.float32, device="cpu")
