"""The time of a flow above the networks inside its couplings: training, encoding and decoding.

    python benchmarks/speed/speed.py [--cases CASE ...] [--rounds N] [--seconds S]

The floor is the time of the subnets alone, on tensors of the same shapes as in the flow. Of the default memory format
and channels last, the faster counts. *Overhead* is the median over rounds of (flow / floor) - 1. Both sides of a case
have copies of the same subnets, and run once per round in balanced order on one thread, with the same float32 batch.
Times are CPU time. Training is forward, `|z|^2 / 2 - log|det|` and backward. Encoding and decoding run on a frozen
copy.

The stored rows of other libraries (FrEIA, normflows, nflows) and of the published code of the matrix-exponential flow
were measured by the code of commit 309e287.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, balanced_orders, parser, seconds
from glem_augment.flows import create_flow
from glem_augment.flows.coupling import Coupling

OURS = "glem-augment"
OPERATIONS = "train", "encode", "decode"
Tasks = dict[tuple[str, str], Callable[[], None]]  # (side, operation)
Times = dict[tuple[str, str], list[float]]  # seconds of every round


CASES: dict[str, dict[str, Any]] = {
    "mef_tiny": dict(preset="mef_tiny", image_shape=(1, 28, 28), batch=32, overrides={}),
    "glow_tiny": dict(preset="glow_tiny", image_shape=(1, 28, 28), batch=32, overrides={}),
}


def subnets(flow: nn.Module) -> list[nn.Module]:
    """The networks inside couplings, in the order in which an image meets them."""
    return [module.net for module in flow.modules() if isinstance(module, Coupling)]


def make_flow(case: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The case's initialised flow with non-zero networks, and a batch for it."""
    torch.manual_seed(0)
    flow = create_flow(case["preset"], case["image_shape"], **case["overrides"])
    x = torch.rand(case["batch"], *case["image_shape"]) - 0.5
    flow.initialise(x)
    for p in (p for net in subnets(flow) for p in net.parameters() if p.ndim == 4 and not p.any()):
        nn.init.normal_(p, std=0.02)  # the last convolution starts at zero, and an exponential of zeros is faster
    return flow, x


def tasks_of(name: str, module: nn.Module, x: Tensor) -> Tasks:
    """The operations of a flow, on a copy that trains and a frozen one."""
    trained, frozen = copy.deepcopy(module).train(), copy.deepcopy(module).eval().requires_grad_(False)
    with torch.no_grad():
        z = frozen(x)[0]

    def train() -> None:
        z, logdet = trained(x)
        (0.5 * z.square().sum() - logdet.sum()).backward()
        trained.zero_grad()

    encode, decode = torch.no_grad()(lambda: frozen(x)), torch.no_grad()(lambda: frozen.inverse(z))
    return {(name, "train"): train, (name, "encode"): encode, (name, "decode"): decode}


def floor_tasks(flow: nn.Module, x: Tensor) -> Tasks:
    """The subnets alone: all forwards, then all backwards, as in a flow."""
    shapes: list[tuple[torch.Size, torch.Size]] = []
    counted = copy.deepcopy(flow)
    for net in subnets(counted):
        net.register_forward_hook(lambda module, inputs, out: shapes.append((inputs[0].shape, out.shape)))
    with torch.no_grad():
        counted(x)
    tasks: Tasks = {}
    for form in ("as built", "channels_last"):
        layout, nets = torch.contiguous_format, [copy.deepcopy(net) for net in subnets(flow)]
        if form == "channels_last":  # without the subnet's conversions of memory format
            layout = torch.channels_last
            nets = [nn.Sequential(n.head, *n.blocks, n.act, n.tail).to(memory_format=layout) for n in nets]
        frozen = [copy.deepcopy(net).eval().requires_grad_(False) for net in nets]
        ins = [torch.randn(shape).contiguous(memory_format=layout).requires_grad_() for shape, _ in shapes]
        outs = [torch.randn(shape).contiguous(memory_format=layout) for _, shape in shapes]

        def train(nets=nets, ins=ins, outs=outs) -> None:
            torch.autograd.backward([net(x) for net, x in zip(nets, ins, strict=True)], outs)
            for part in (*ins, *(p for net in nets for p in net.parameters())):
                part.grad = None

        @torch.no_grad()
        def forward(nets=frozen, ins=ins) -> None:
            for net, x in zip(nets, ins, strict=True):
                net(x)

        tasks |= {(f"floor: {form}", "train"): train, (f"floor: {form}", "forward"): forward}
    return tasks


def measure(tasks: Tasks, rounds: int, budget: float) -> Times:
    """Every task twice to warm up, then once per round, until the times add up to `budget`; at least three rounds."""
    times: Times = {key: [] for key in tasks}
    keys = list(tasks)
    for task in (*tasks.values(), *tasks.values()):
        task()
    for done, order in zip(range(rounds), balanced_orders(len(keys)), strict=False):
        if done >= 3 and sum(map(sum, times.values())) > budget:
            break
        for index in order:
            times[keys[index]].append(seconds(tasks[keys[index]]))
    return times


def ratio(times: Times, side: tuple[str, str], other: tuple[str, str]) -> tuple[float, float]:
    """Median over rounds of the ratio of two times, and half its 95 % interval (1.82 IQR / sqrt(n))."""
    values = np.array(times[side]) / np.array(times[other])
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(middle), float(1.82 * (high - low) / math.sqrt(len(values)))


def floor_of(times: Times, operation: str) -> tuple[str, str]:
    kind = "train" if operation == "train" else "forward"
    return min(
        (key for key in times if key[1] == kind and key[0] != OURS), key=lambda key: statistics.median(times[key])
    )


def measured(times: Times) -> dict[str, dict[str, float]]:
    """Of the flow: ms, and overhead above the fastest floor as a share. By operation: ratio of times, and its noise.

    `mef_tiny` should train at most 40 % and decode at most 25 % above its networks. A difference within the noise is a
    tie, and counts as met.
    """
    own: dict[str, float] = {"rounds": len(times[OURS, "train"])}
    found = {OURS: own}
    for op in OPERATIONS:
        value, noise = ratio(times, (OURS, op), floor_of(times, op))
        own |= {f"{op} ms": 1e3 * statistics.median(times[OURS, op]), f"{op} overhead": value - 1}
        found[f"{op} / its networks"] = {"ratio": value, "noise": noise}
    return found


def limit_of(what: str) -> float:
    """The limit of a ratio, such as "train / its networks": of another library 1, of the published flow 1 / 1.1."""
    operation, other = what.split(" / ")
    own = {"train": 1.4, "decode": 1.25}
    return own.get(operation, math.inf) if other == "its networks" else 1 / 1.1 if "published" in other else 1.0


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    arguments.add_argument("--rounds", type=int, default=200, help="of a case, at most (%(default)s)")
    arguments.add_argument("--seconds", type=float, default=60, help="of timed rounds in a case; 3 rounds at least")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("speed", args.out)
    for name in args.cases:
        flow, x = make_flow(CASES[name])
        tasks = floor_tasks(flow, x) | tasks_of(OURS, flow, x)
        for arm, found in measured(measure(tasks, args.rounds, args.seconds)).items():
            rows.add(name, arm, "", "flow", found)


if __name__ == "__main__":
    main()
