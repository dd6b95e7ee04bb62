"""Timing for `speed.py`: what is timed, rounds in balanced order, and the memory a step holds for its backward."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

# (side, operation) -> what to time, and the seconds that it took in every round.
Tasks = dict[tuple[str, str], Callable[[], None]]
Times = dict[tuple[str, str], list[float]]
FORMS = ("as built", "contiguous", "channels_last")


class Side:
    """A flow to be timed: a trainable copy, and a frozen one that encodes and decodes.

    Args:
        module: `module(x) -> (z, logdet)` and `module.inverse(z) -> (x, logdet)`.
        prepare: is applied to both copies, for settings that copying undoes.
        training_only: leaves encoding and decoding out.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        x: Tensor,
        prepare: Callable[[nn.Module], Any] = lambda module: None,
        training_only: bool = False,
    ) -> None:
        self.name, self.x, self.training_only = name, x, training_only
        self.trained = copy.deepcopy(module).train()
        self.frozen = copy.deepcopy(module).eval().requires_grad_(False)
        prepare(self.trained)
        prepare(self.frozen)
        with torch.no_grad():
            self.z = self.frozen(x)[0]

    def train(self) -> None:
        """Forward, likelihood and backward."""
        z, logdet = self.trained(self.x)
        (0.5 * z.square().sum() - logdet.sum()).backward()
        for p in self.trained.parameters():
            p.grad = None

    @torch.no_grad()
    def encode(self) -> None:
        self.frozen(self.x)

    @torch.no_grad()
    def decode(self) -> None:
        self.frozen.inverse(self.z)

    def tasks(self) -> Tasks:
        operations = ("train",) if self.training_only else ("train", "encode", "decode")
        return {(self.name, operation): getattr(self, operation) for operation in operations}


def bare(net: nn.Module) -> nn.Module:
    """A convolutional subnet without its conversions of memory format."""
    return nn.Sequential(net.head, *net.blocks, net.act, net.tail)


class Floor:
    """The subnets of a flow alone, forward (and backward) on tensors of the shapes that they meet in the flow.

    Args:
        form: one of `FORMS`, the memory format of networks and tensors.
        nets, inputs, gradients: of every coupling, see `met`.
    """

    def __init__(self, form: str, nets: list[nn.Module], inputs: list[Tensor], gradients: list[Tensor]) -> None:
        self.name = f"floor: {form}"
        layout = torch.channels_last if form == "channels_last" else torch.contiguous_format
        nets = [copy.deepcopy(net) if form == "as built" else bare(copy.deepcopy(net)).to(memory_format=layout)
                for net in nets]  # fmt: skip
        self.nets = [net.train() for net in nets]
        self.frozen = [copy.deepcopy(net).eval().requires_grad_(False) for net in nets]
        self.inputs = [x.contiguous(memory_format=layout).detach().clone().requires_grad_() for x in inputs]
        self.gradients = [g.contiguous(memory_format=layout) for g in gradients]

    def train(self) -> None:
        """All forwards, then all backwards, as in a flow."""
        outputs = [net(x) for net, x in zip(self.nets, self.inputs, strict=True)]
        torch.autograd.backward(outputs, self.gradients)
        for net, x in zip(self.nets, self.inputs, strict=True):
            x.grad = None
            for p in net.parameters():
                p.grad = None

    @torch.no_grad()
    def forward(self) -> None:
        for net, x in zip(self.frozen, self.inputs, strict=True):
            net(x)

    def tasks(self) -> Tasks:
        """What to time; encoding and decoding have the same floor."""
        return {(self.name, "train"): self.train, (self.name, "forward"): self.forward}


def met(flow: nn.Module, nets: list[nn.Module], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Random tensors of the shapes that go into and come out of `nets` when the flow encodes `x`."""
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}
    hooks = [
        net.register_forward_hook(lambda module, args, out: shapes.update({module: (args[0].shape, out.shape)}))
        for net in nets
    ]
    with torch.no_grad():
        flow(x)
    for hook in hooks:
        hook.remove()
    inputs = [torch.randn(shapes[net][0], device=x.device) for net in nets]
    return inputs, [torch.randn(shapes[net][1], device=x.device) for net in nets]


def balanced_orders(n: int) -> Iterator[list[int]]:
    """Endless orders of `range(n)` in which, over n rounds (2n for odd n), everybody follows everybody else equally
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


def fastest(sides: list[Side], device: torch.device) -> tuple[Side, Tasks]:
    """One opponent in several memory formats: the side that trains fastest, and the fastest task of each operation."""
    tasks: Tasks = {}
    trains_fastest = sides[0]
    for key in sides[0].tasks():
        costs = []
        for side in sides:
            task = side.tasks()[key]
            task()
            costs.append(min(seconds(task, device) for _ in range(3)))
        best = sides[costs.index(min(costs))]
        tasks[key] = best.tasks()[key]
        if key[1] == "train":
            trains_fastest = best
    return trains_fastest, tasks


def measure(tasks: Tasks, rounds: int, device: torch.device, label: str, budget: float = math.inf) -> Times:
    """Every task twice to warm up, then once per round, in balanced order.

    Args:
        rounds: the most rounds. budget: no new round begins after so many seconds, if there have been three.
    """
    times: Times = {key: [] for key in tasks}
    keys = list(tasks)
    for task in tasks.values():
        task()
        task()
    began = time.perf_counter()
    orders = zip(range(rounds), balanced_orders(len(keys)), strict=False)
    for done, order in tqdm(orders, desc=label, unit="round", total=rounds, leave=False):
        if done >= 3 and time.perf_counter() - began > budget:
            break
        for index in order:
            times[keys[index]].append(seconds(tasks[keys[index]], device))
    return times


def ratios(times: Times, side: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
    """Median over rounds of one side's time over the other's, and its noise.

    The noise is 1.82 IQR / sqrt(rounds), half the 95 % interval of a median of normal noise.
    """
    values = np.array(times[side]) / np.array(times[other])
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(middle), float(1.82 * (high - low) / math.sqrt(len(values)))


def floor_of(times: Times, operation: str) -> tuple[str, str]:
    """The form of the floor with the smallest median, for training or (both directions) for the forward pass."""
    kind = "train" if operation == "train" else "forward"
    keys = [key for key in times if key[0].startswith("floor") and key[1] == kind]
    return min(keys, key=lambda key: statistics.median(times[key]))


class _Held:
    """A tensor saved for the backward. The bytes of its storage count once, for as long as anything holds it."""

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
    """Bytes that a training step holds for its backward at their highest, parameters apart.

    On CUDA it is the peak of allocated memory above what was there before the step.
    """
    if side.x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.train()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    weights = {p.untyped_storage().data_ptr() for p in side.trained.parameters()}
    counts: dict[int, list[int]] = {}
    record = {"now": 0, "peak": 0}

    def pack(tensor: Tensor) -> Tensor | _Held:
        return tensor if tensor.untyped_storage().data_ptr() in weights else _Held(tensor, counts, record)

    def unpack(kept: Tensor | _Held) -> Tensor:
        return kept.tensor if isinstance(kept, _Held) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        side.train()  # the backward too: what it rebuilds, it holds
    return record["peak"]
