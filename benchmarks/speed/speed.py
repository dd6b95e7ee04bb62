"""What a flow costs above the networks inside its couplings: training, encoding and decoding, beside other libraries.

    python benchmarks/speed/speed.py [--cases CASE ...] [--rounds N] [--threads N] [--compile] [--no-peers]

The floor is the subnets alone, forward (and backward, for training) on tensors of the shapes that they meet in the
flow, in the fastest of three memory formats. *Overhead* is the time above that floor, as a share of it: the median over
rounds of (side / floor) - 1. All sides of a case run in one process, once each per round, in orders that change from
round to round, with the same float32 batch and threads; TF32 is off.

Training is forward, `|z|^2 / 2 - log|det|` and backward in train mode, without class Gaussians and without optimizer.
Encoding and decoding run on a frozen copy in eval mode without gradients.

`mef_*` cases stand beside a flow in the manner of the published code (`speed_published.py`), `glow_*` cases beside
FrEIA, normflows and nflows (`speed_peers.py`), all with copies of the same subnets. Opponents run each operation in
the memory format in which it is fastest. The published code adds fewer terms of exp(S) the smaller S is, and S is small
here, as at the start of training.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from benchmarks.speed import speed_peers
from benchmarks.speed.speed_measure import FORMS, Floor, Side, Tasks, bare, fastest, held_for_backward, measure, met
from benchmarks.speed.speed_published import PublishedFlow
from benchmarks.speed.speed_report import COMPILED, OURS, PUBLISHED, REVERSIBLE, plot, rows_of, verdicts
from glem_augment.flows import create_flow, resolve_preset
from glem_augment.flows.coupling import Coupling


def _level(preset: str, shape: tuple[int, int, int], batch: int, depth: int, blocks: int, width: int) -> dict[str, Any]:
    overrides = dict(depth=[depth], blocks=[blocks], width=[width])
    return dict(preset=preset, image_shape=shape, batch=batch, overrides=overrides)


# Levels alone take the image whose squeeze they would see in the whole flow.
CASES: dict[str, dict[str, Any]] = {
    "mef_tiny": dict(preset="mef_tiny", image_shape=(1, 28, 28), batch=32, overrides={}),
    "mef_cifar_0": _level("mef_cifar", (3, 32, 32), 16, 8, 8, 128),
    "mef_cifar_1": _level("mef_cifar", (6, 16, 16), 16, 4, 8, 128),
    "mef_cifar_2": _level("mef_cifar", (12, 8, 8), 16, 2, 8, 128),
    "mef_cifar": dict(preset="mef_cifar", image_shape=(3, 32, 32), batch=16, overrides={}),
    "glow_tiny_0": _level("glow_tiny", (1, 28, 28), 32, 8, 1, 48),
    "glow_tiny_1": _level("glow_tiny", (2, 14, 14), 32, 8, 1, 64),
    "glow_cifar_0": _level("glow_tiny", (3, 32, 32), 16, 8, 8, 128),
    "glow_cifar_1": _level("glow_tiny", (6, 16, 16), 16, 4, 8, 128),
    "glow_cifar_2": _level("glow_tiny", (12, 8, 8), 16, 2, 8, 128),
}
DEFAULT = ("mef_tiny", "mef_cifar_1", "mef_cifar_2", "glow_tiny_0", "glow_tiny_1", "glow_cifar_1", "glow_cifar_2")


def couplings(flow: nn.Module) -> list[Coupling]:
    """The couplings in the order in which an image meets them."""
    return [module for module in flow.modules() if isinstance(module, Coupling)]


def make_flow(case: dict[str, Any], device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """The case's flow, initialised, with networks that do something, and a batch for it."""
    torch.manual_seed(0)
    flow = create_flow(case["preset"], case["image_shape"], **case["overrides"])
    x = torch.rand(case["batch"], *case["image_shape"]) - 0.5
    flow.initialise(x)
    for coupling in couplings(flow):
        for p in coupling.net.parameters():
            # The last convolution starts at zero, and zeros are no work for an exponential.
            if p.ndim == 4 and not p.any():
                nn.init.normal_(p, std=0.02)
    return flow.to(device), x.to(device)


def our_sides(flow: nn.Module, x: torch.Tensor, compiled: bool) -> list[Side]:
    """The flow in its ordinary form, reversible, and compiled."""
    sides = [Side(OURS, flow, x)]
    sides.append(Side(REVERSIBLE, flow, x, lambda module: module.set_memory("reversible"), training_only=True))
    if compiled:
        sides.append(Side(COMPILED, flow, x, lambda module: module.compile_steps()))
    return sides


class _ContiguousOutput(nn.Module):
    """For opponents in the default memory format, which mixed formats would slow down."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).contiguous()


def opponent(
    name: str, flow: nn.Module, x: torch.Tensor, make: Callable[[list[nn.Module]], nn.Module]
) -> tuple[Side, Tasks]:
    """Another flow with copies of the subnets of `flow`, in the memory format in which it is fastest.

    It may choose between channels last throughout, contiguous tensors around subnets that work in channels last, and
    contiguous tensors throughout.

    Args:
        x: the opponent's batch. make: from the subnets to the opponent's flow.
    """
    inside: dict[str, Callable[[nn.Module], nn.Module]] = {
        "channels_last": lambda net: net,
        "mixed": _ContiguousOutput,
        "contiguous": lambda net: bare(net).to(memory_format=torch.contiguous_format),
    }
    sides = []
    for form, wrap in inside.items():
        torch.manual_seed(0)
        np.random.seed(0)
        module = make([wrap(copy.deepcopy(coupling.net)) for coupling in couplings(flow)]).to(x.device)
        layout = torch.channels_last if form == "channels_last" else torch.contiguous_format
        batch = x.contiguous(memory_format=layout)
        module.initialise(batch)
        sides.append(Side(name, module, batch))
    return fastest(sides, x.device)


def opponents(case: dict[str, Any], flow: nn.Module, x: torch.Tensor) -> list[tuple[Side, Tasks]]:
    """Other libraries for affine couplings, the published flow for the others."""
    spec = resolve_preset(case["preset"], case["image_shape"], **case["overrides"])
    if spec["coupling"] != "affine":
        return [opponent(PUBLISHED, flow, x, partial(PublishedFlow, case["image_shape"], spec["depth"]))]
    squeezed = F.pixel_unshuffle(x, 2)
    size = squeezed.shape[1:]
    return [
        opponent(peer.module, flow, squeezed, lambda nets, peer=peer: peer(*size, nets, x.device))
        for peer in speed_peers.available()
    ]


def run_case(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure one of `CASES`; returns its rows and verdicts."""
    case, device = CASES[name], torch.device(args.device)
    flow, x = make_flow(case, device)
    nets = [coupling.net for coupling in couplings(flow)]
    tensors = met(flow, nets, x)
    ours = our_sides(flow, x, args.compile)
    others = opponents(case, flow, x) if args.peers else []
    tasks = {key: task for form in FORMS for key, task in Floor(form, nets, *tensors).tasks().items()}
    for part in (*(side.tasks() for side in ours), *(tasks for _, tasks in others)):
        tasks |= part
    times = measure(tasks, args.rounds, device, name, args.seconds)
    # Compiled code keeps its buffers to itself.
    sides = [side for side in [*ours, *(side for side, _ in others)] if side.name != COMPILED]
    held = {side.name: held_for_backward(side) for side in sides}
    return rows_of(name, case["batch"], times, held), verdicts(name, times)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT), metavar="CASE")
    arguments.add_argument("--rounds", type=int, default=200, help="of a case, at most (%(default)s)")
    arguments.add_argument("--seconds", type=float, default=60, help="of timed rounds in a case; 3 rounds at least")
    arguments.add_argument("--compile", action="store_true", help="measure the compiled form too")
    arguments.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure opponents too")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    name = "speed" if args.device == "cpu" else "speed_gpu"
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for case in args.cases:
        more = run_case(case, args)
        rows, found = rows + more[0], found + more[1]
        gc.collect()
        # After every case, so that a run that is cut off leaves what it has.
        write_results(
            args.out, name, "Time above the subnets alone", rows, {"verdicts": found}, show=case == args.cases[-1],
            device=torch.cuda.get_device_name() if args.device != "cpu" else "CPU", seed=0,
            peers=speed_peers.versions() if args.peers else {},
        )  # fmt: skip
    plot(rows, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
