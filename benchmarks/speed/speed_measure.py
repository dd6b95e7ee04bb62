"""Timing of ``speed.py``: sides, rounds in balanced order, and the memory a step holds for its backward."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

_FEW = 4

# What is timed: (side, operation) -> seconds of every round.
Times = dict[tuple[str, str], list[float]]


class Side:
    """A flow to be timed: a trainable copy, and a frozen one that encodes and decodes.

    Args:
        name: in the table.
        module: ``module(x) -> (z, logdet)``, ``module.inverse(z) -> (x, logdet)``.
        x: a batch.
        prepare: applied to both copies, for what copying undoes.
        training_only: leave encoding and decoding out.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        x: Tensor,
        prepare: Callable[[nn.Module], Any] | None = None,
        training_only: bool = False,
    ) -> None:
        self.name, self.x = name, x
        self.trained = copy.deepcopy(module).train()
        self.frozen = None if training_only else copy.deepcopy(module).eval().requires_grad_(False)
        for made in (self.trained, self.frozen):
            if prepare is not None and made is not None:
                prepare(made)
        if self.frozen is not None:
            with torch.no_grad():
                self.z = self.frozen(x)[0]

    def loss(self) -> Tensor:
        z, logdet = self.trained(self.x)
        return 0.5 * z.square().sum() - logdet.sum()

    def train(self) -> None:
        """Forward, likelihood and backward."""
        self.loss().backward()
        for p in self.trained.parameters():
            p.grad = None

    @torch.no_grad()
    def encode(self) -> None:
        self.frozen(self.x)

    @torch.no_grad()
    def decode(self) -> None:
        self.frozen.inverse(self.z)

    def tasks(self) -> dict[tuple[str, str], Callable[[], None]]:
        """What to time."""
        result = {(self.name, "train"): self.train}
        if self.frozen is not None:
            result |= {(self.name, "encode"): self.encode, (self.name, "decode"): self.decode}
        return result


def balanced_orders(n: int) -> Iterator[list[int]]:
    """Endless orders of ``range(n)`` in which, over n rounds (2n for odd n), everybody follows everybody else equally
    often (Williams 1949)."""
    zigzag = [(k + 1) // 2 if k % 2 else (n - k // 2) % n for k in range(n)]
    while True:
        for shift in range(n):
            order = [(k + shift) % n for k in zigzag]
            yield order
            if n % 2:
                yield order[::-1]


def seconds(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(tasks: dict[str, Callable[[], Any]], device: torch.device, warm: int = 1) -> dict[str, float]:
    """Seconds of every task: the least of a few calls, more where they are short, each in turn.

    Args:
        tasks: by name.
        device: where the work is done.
        warm: calls before that.
    """
    first = {name: min(seconds(task, device) for _ in range(warm)) for name, task in tasks.items()}
    best = min(first.values())
    best_of = dict.fromkeys(tasks, math.inf)
    for _ in range(1 if best > 1 else 2 if best > 0.2 else 5):
        for name, task in tasks.items():
            best_of[name] = min(best_of[name], seconds(task, device))
    return best_of


class Choice:
    """One opponent in several memory formats: every operation in the format in which it is fastest.

    Args:
        sides: of the same name.
        device: where they are.
    """

    def __init__(self, sides: Sequence[Side], device: torch.device) -> None:
        self.name = sides[0].name
        self._tasks: dict[tuple[str, str], Callable[[], None]] = {}
        for key in sides[0].tasks():
            took = race({str(index): side.tasks()[key] for index, side in enumerate(sides)}, device)
            fastest_side = sides[int(min(took, key=took.__getitem__))]
            self._tasks[key] = fastest_side.tasks()[key]
            if key[1] == "train":
                self.trained = fastest_side

    def tasks(self) -> dict[tuple[str, str], Callable[[], None]]:
        """What to time."""
        return self._tasks


def measure(
    tasks: dict[tuple[str, str], Callable[[], None]],
    rounds: int,
    device: torch.device,
    label: str,
    budget: float = math.inf,
    least: int = 3,
) -> Times:
    """Every task to warm up, twice where that is quick, then once per round, in balanced order.

    Args:
        tasks: (side, operation) -> what to time.
        rounds: at most so many.
        device: where the work is done.
        label: of the progress bar.
        budget: seconds that the rounds may take, as far as ``least`` rounds allow.
    """
    times: Times = {key: [] for key in tasks}
    keys = list(tasks)
    bar = tqdm(total=len(keys) * (rounds + 1), desc=label, unit="run", leave=False)
    for task in tasks.values():
        if seconds(task, device) < 1:
            seconds(task, device)
        bar.update()
    # Not from these: what is compiled when it is first called says nothing of the calls to come.
    began = time.perf_counter()
    for done, order in zip(range(rounds), balanced_orders(len(keys)), strict=False):
        if done:
            each = (time.perf_counter() - began) / done
            # As many as there is time for, as things stand.
            rest = max(least, int(budget / each)) if math.isfinite(budget) else rounds
            bar.total = len(keys) * (min(rounds, rest) + 1)
            if done >= rest:
                break
        for index in order:
            times[keys[index]].append(seconds(tasks[keys[index]], device))
            bar.update()
    bar.close()
    return times


def fastest(times: Times, operation: str) -> list[float]:
    """The rounds of the floor with the smallest median."""
    candidates = [v for (name, what), v in times.items() if name.startswith("floor") and what == operation]
    return min(candidates, key=statistics.median)


def _ratios(times: Times, name: str, operation: str) -> list[float] | None:
    """Of every round, time / fastest floor; None where it was not timed."""
    mine = times.get((name, operation))
    if mine is None:
        return None
    floor = fastest(times, operation if operation == "train" else "forward")
    return [a / b for a, b in zip(mine, floor, strict=True)]


def overhead(times: Times, name: str, operation: str) -> float | None:
    """Median over rounds of time / fastest floor - 1; None where it was not timed."""
    ratios = _ratios(times, name, operation)
    return None if ratios is None else statistics.median(ratios) - 1


class Draws(NamedTuple):
    """Medians over rounds drawn with replacement, the same ones for all that was timed together (Efron 1979)."""

    seconds: np.ndarray
    overhead: np.ndarray


def draws(times: Times, name: str, operation: str, count: int = 1000) -> Draws | None:
    """What other runs might have found of it; None where ``_FEW`` rounds or fewer say too little of that, or none."""
    ratios = _ratios(times, name, operation)
    if ratios is None or len(ratios) <= _FEW:
        return None
    chosen = np.random.default_rng(0).integers(len(ratios), size=(count, len(ratios)))
    taken, shares = (np.median(np.array(values)[chosen], axis=1) for values in (times[name, operation], ratios))
    return Draws(taken, shares - 1)


def half_width(values: np.ndarray) -> float:
    """Of their 95 % interval."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(high - low) / 2


class _Held:
    """A tensor saved for the backward; its bytes count once per storage, for as long as somebody holds one."""

    def __init__(self, tensor: Tensor, counts: dict[int, list[int]], record: dict[str, int]) -> None:
        self.tensor, self.counts, self.record = tensor, counts, record
        storage = tensor.untyped_storage()
        self.key = storage.data_ptr()
        entry = counts.setdefault(self.key, [0, storage.nbytes()])
        entry[0] += 1
        if entry[0] == 1:
            record["now"] += entry[1]
            record["peak"] = max(record["peak"], record["now"])

    def __del__(self) -> None:
        entry = self.counts[self.key]
        entry[0] -= 1
        if not entry[0]:
            self.record["now"] -= entry[1]
            del self.counts[self.key]


def held_for_backward(side: Side) -> int:
    """Bytes that one training step holds for its backward at their highest, see the module of ``speed.py``."""
    if side.x.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.train()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    weights = {p.untyped_storage().data_ptr() for p in side.trained.parameters()}
    counts: dict[int, list[int]] = {}
    record = {"now": 0, "peak": 0}

    def pack(tensor: Tensor) -> Tensor | _Held:
        ours = tensor.untyped_storage().data_ptr() in weights
        return tensor if ours else _Held(tensor, counts, record)

    def unpack(kept: Tensor | _Held) -> Tensor:
        return kept.tensor if isinstance(kept, _Held) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        # Backward included: what is rebuilt there is held there.
        side.train()
    return record["peak"]
