"""The time of a flow above the networks inside its couplings: training, encoding and decoding, beside other libraries.

    python benchmarks/speed/speed.py [--cases CASE ...] [--rounds N] [--seconds S] [--mef FOLDER]

The floor is the time of the subnets alone, on tensors of the same shapes as in the flow. Of the default memory format
and channels last, the faster counts. *Overhead* is the median over rounds of (side / floor) - 1. All sides of a case
have copies of the same subnets, and run once per round in balanced order on one thread, with the same float32 batch.
Times are CPU time. Training is forward, `|z|^2 / 2 - log|det|` and backward. Encoding and decoding run on a frozen
copy. Opponents (`opponents.py`) run each operation in its fastest memory format.

`--mef` also times the published code of the matrix-exponential flow, from a copy of github.com/changyi7231/MEF. That
code adds fewer terms of exp(S) for a smaller S, and S is small here, as at the start of training.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, balanced_orders, parser, seconds
from benchmarks.speed.opponents import LIBRARIES, published
from glem_augment.flows import create_flow, resolve_preset
from glem_augment.flows.coupling import Coupling

OURS, PUBLISHED = "glem-augment", "published (MEF)"
OPERATIONS = "train", "encode", "decode"
Tasks = dict[tuple[str, str], Callable[[], None]]  # (side, operation)
Times = dict[tuple[str, str], list[float]]  # seconds of every round


def _level(preset: str, shape: tuple[int, int, int], batch: int, depth: int, blocks: int, width: int) -> dict[str, Any]:
    overrides = dict(depth=[depth], blocks=[blocks], width=[width])
    return dict(preset=preset, image_shape=shape, batch=batch, overrides=overrides)


# A level alone gets the image whose squeeze has the shape that the level has in the whole flow.
CASES: dict[str, dict[str, Any]] = {
    "mef_tiny": dict(preset="mef_tiny", image_shape=(1, 28, 28), batch=32, overrides={}),
    "mef_cifar_1": _level("mef_cifar", (6, 16, 16), 16, 4, 8, 128),
    "mef_cifar_2": _level("mef_cifar", (12, 8, 8), 16, 2, 8, 128),
    "glow_tiny_0": _level("glow_tiny", (1, 28, 28), 32, 8, 1, 48),
    "glow_tiny_1": _level("glow_tiny", (2, 14, 14), 32, 8, 1, 64),
    "glow_cifar_1": _level("glow_tiny", (6, 16, 16), 16, 4, 8, 128),
    "glow_cifar_2": _level("glow_tiny", (12, 8, 8), 16, 2, 8, 128),
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


class _ContiguousOutput(nn.Module):
    """Makes outputs contiguous, because mixed memory formats slow down opponents in the default format."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).contiguous()


def opponent_tasks(name: str, flow: nn.Module, x: Tensor, make: Callable[[list[nn.Module]], nn.Module]) -> Tasks:
    """Another flow with copies of the subnets of `flow`, each operation in the memory format in which it is fastest."""
    forms = []
    for layout, wrap in ((torch.channels_last, nn.Sequential), (torch.contiguous_format, _ContiguousOutput)):
        torch.manual_seed(0)
        np.random.seed(0)
        module = make([wrap(copy.deepcopy(net)) for net in subnets(flow)])
        batch = x.contiguous(memory_format=layout)
        with torch.no_grad():
            module.train()(batch)
        forms.append(tasks_of(name, module, batch))

    def cost(task: Callable[[], None]) -> float:
        task()
        return min(seconds(task) for _ in range(3))

    return {key: min((form[key] for form in forms), key=cost) for key in forms[0]}


def opponents(case: dict[str, Any], flow: nn.Module, x: Tensor, mef: Path | None) -> Tasks:
    """Other libraries for affine couplings, and the published code for matrix-exponential couplings."""
    spec = resolve_preset(case["preset"], case["image_shape"], **case["overrides"])
    if spec["coupling"] != "affine":
        if mef is None:
            print("speed: the published code of MEF is skipped: give a copy of it with --mef FOLDER", file=sys.stderr)
            return {}
        return opponent_tasks(PUBLISHED, flow, x, functools.partial(published, mef, case["image_shape"], spec["depth"]))
    squeezed, found = F.pixel_unshuffle(x, 2), {}
    for name, make in LIBRARIES.items():
        if importlib.util.find_spec(name):
            found |= opponent_tasks(name, flow, squeezed, functools.partial(make, *squeezed.shape[1:]))
        else:
            print(f"speed: {name} is skipped: pip install {name}", file=sys.stderr)
    return found


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


def fastest(times: Times, operation: str, chosen: Callable[[str], bool]) -> tuple[str, str] | None:
    keys = [key for key in times if key[1] == operation and chosen(key[0])]
    return min(keys, key=lambda key: statistics.median(times[key]), default=None)


def floor_of(times: Times, operation: str) -> tuple[str, str]:
    kind = "train" if operation == "train" else "forward"
    found = fastest(times, kind, lambda side: side.startswith("floor"))
    assert found is not None
    return found


def measured(times: Times) -> dict[str, dict[str, float]]:
    """By flow: ms, and overhead above the fastest floor as a share. By comparison: ratio of times, and its noise.

    The limits: `mef_tiny` trains at most 40 % and decodes at most 25 % above its networks; no operation takes longer
    than the fastest other library's, nor more than 1 / 1.1 of the published flow's time. A difference within the noise
    is a tie, and counts as met.
    """
    found: dict[str, dict[str, float]] = {}
    for side in dict.fromkeys(side for side, _ in times if not side.startswith("floor")):
        own = found.setdefault(side, {"rounds": len(times[side, "train"])})
        for op in OPERATIONS:
            own[f"{op} ms"] = 1e3 * statistics.median(times[side, op])
            own[f"{op} overhead"] = ratio(times, (side, op), floor_of(times, op))[0] - 1
    for op in OPERATIONS:
        other = fastest(times, op, lambda side: not side.startswith((OURS, "floor")))
        for what, key in (("its networks", floor_of(times, op)), (other[0] if other else "", other)):
            if key:
                value, noise = ratio(times, (OURS, op), key)
                found[f"{op} / {what}"] = {"ratio": value, "noise": noise}
    return found


def limit_of(what: str) -> float:
    """The limit of a ratio, such as "train / its networks"."""
    operation, other = what.split(" / ")
    own = {"train": 1.4, "decode": 1.25}
    return own[operation] if other == "its networks" else 1 / 1.1 if other == PUBLISHED else 1.0


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    arguments.add_argument("--rounds", type=int, default=200, help="of a case, at most (%(default)s)")
    arguments.add_argument("--seconds", type=float, default=60, help="of timed rounds in a case; 3 rounds at least")
    arguments.add_argument("--mef", type=Path, help="folder with a copy of github.com/changyi7231/MEF")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("speed", args.out)
    for name in args.cases:
        flow, x = make_flow(CASES[name])
        tasks = floor_tasks(flow, x) | tasks_of(OURS, flow, x) | opponents(CASES[name], flow, x, args.mef)
        for arm, found in measured(measure(tasks, args.rounds, args.seconds)).items():
            rows.add(name, arm, "", "flow", found)


if __name__ == "__main__":
    main()
