"""What a flow costs above the networks inside its couplings: training, encoding and decoding, beside other libraries.

    python benchmarks/speed/speed.py [--cases CASE ...] [--rounds N] [--threads N] [--no-compile] [--no-peers]

The floor is the subnets alone, forward (and backward, for training) on tensors of the shapes they meet in the flow, in
the fastest of several forms: as built, contiguous, channels last, and compiled. *Overhead* is the time above that
floor, as a share of it: the median over rounds of (side / fastest floor) - 1. All sides of a case run in one process,
once each per round, in orders that change from round to round, with the same float32 batch and threads.

Training is forward, ``|z|^2 / 2 - log|det|`` and backward in train mode, without class Gaussians and without optimizer.
Encoding and decoding run in eval mode without gradients on a frozen copy, as in use: what a library keeps between
calls then (the inverse of a matrix, weights packed for the processor) it may keep, and so may the floor: its networks
are frozen there too. TF32 is off for all. Memory is what a step keeps for its backward: on
the CPU the bytes of the storages held by autograd at their highest, parameters apart; on CUDA the peak of allocated
memory above what was there before the step.

``mef_*`` cases stand beside a flow in the manner of the published code (``speed_published.py``), ``glow_*`` cases
beside FrEIA, normflows and nflows (``speed_peers.py``), all with copies of the same subnets. Opponents run each
operation in the fastest memory format; they are not compiled, so it is this library's ordinary form that is judged
against them, and its compiled form stands in rows of its own. A verdict's noise is half the width of its 95 % interval,
where there are five rounds at least: of networks that take nearly all of the time, a run of a minute can't tell half a
percent from one. S is small here, as at the start of training, and the published code adds fewer terms the smaller S
is; so does this library on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from benchmarks.speed import speed_peers
from benchmarks.speed.speed_floor import bare, floors
from benchmarks.speed.speed_measure import Choice, Side, held_for_backward, measure
from benchmarks.speed.speed_published import PublishedFlow
from benchmarks.speed.speed_report import (
    COMPILED,
    OURS,
    PUBLISHED,
    REVERSIBLE,
    Drawn,
    drawn_from,
    plot,
    rows_of,
    verdicts,
)
from glem_augment.flows import create_flow
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


# What the command runs unless told otherwise; the others repeat these at other sizes.
DEFAULT = ("mef_tiny", "mef_cifar_0", "mef_cifar_1", "mef_cifar_2", "glow_tiny_0", "glow_cifar_1")


def say(text: str) -> None:
    """A line beside the progress bars."""
    tqdm.write(text, file=sys.stderr)


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


def name_of(device: torch.device) -> str:
    """Of the results: those of an accelerator do not replace the CPU's."""
    return "speed" if device.type == "cpu" else f"speed_{device.type}"


def our_sides(flow: nn.Module, x: torch.Tensor, compiled: bool) -> list[Side]:
    """The flow as it comes, reversible, and compiled, as far as it offers these."""
    sides = [Side(OURS, flow, x)]
    if hasattr(flow, "set_memory"):
        sides.append(Side(REVERSIBLE, flow, x, lambda module: module.set_memory("reversible"), training_only=True))
    if compiled and hasattr(flow, "compile_steps"):
        sides.append(Side(COMPILED, flow, x, lambda module: module.compile_steps(True)))
    return sides


class _ContiguousOutput(nn.Module):
    """For opponents in the default memory format: mixed formats would slow them down."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).contiguous()


def opponent(name: str, flow: nn.Module, x: torch.Tensor, make: Callable[[list[nn.Module]], nn.Module]) -> Choice:
    """Another flow with copies of ``flow``'s subnets.

    It may choose between channels last throughout, contiguous tensors around subnets that work in channels last, and
    contiguous tensors throughout.

    Args:
        name: in the table.
        flow: ours.
        x: the opponent's batch.
        make: from the subnets to the flow.
    """

    def inside(form: str, net: nn.Module) -> nn.Module:
        net = copy.deepcopy(net)
        if form == "channels_last":
            return net
        if form == "mixed":
            return _ContiguousOutput(net)
        return bare(net, x.new_zeros(2, net.head.in_channels, 4, 4)).to(memory_format=torch.contiguous_format)

    sides = []
    for form in ("channels_last", "mixed", "contiguous"):
        layout = torch.channels_last if form == "channels_last" else torch.contiguous_format
        torch.manual_seed(0)
        np.random.seed(0)
        module = make([inside(form, coupling.net) for coupling in couplings(flow)]).to(x.device)
        batch = x.contiguous(memory_format=layout)
        module.initialise(batch)
        sides.append(Side(name, module, batch))
    return Choice(sides, x.device)


def opponents(case: dict[str, Any], flow: nn.Module, x: torch.Tensor) -> list[Choice]:
    """Who stands beside the case: other libraries for affine couplings, the published flow for the others."""
    if flow.spec["coupling"] != "affine":
        return [opponent(PUBLISHED, flow, x, partial(PublishedFlow, case["image_shape"], flow.spec["depth"]))]
    peers, advice = speed_peers.available()
    if advice:
        say(f"  {advice}")
    squeezed = F.pixel_unshuffle(x, 2)
    size = squeezed.shape[1:]
    return [
        opponent(peer.module, flow, squeezed, lambda nets, peer=peer: peer(*size, nets, x.device)) for peer in peers
    ]


def run_case(
    name: str, case: dict[str, Any], rounds: int, device: torch.device, compiled: bool, peers: bool, budget: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Drawn]:
    """Measure one case.

    Args:
        name, case: see ``CASES``.
        rounds: at most; fewer, but 3, where they would take longer than ``budget`` seconds.
        device: where.
        compiled: compile floors and our flow too.
        peers: measure opponents too.

    Returns:
        Its rows, see ``speed_report.rows_of``, what each form of the floor took when it was tried beforehand, and
        what the noise of verdicts is taken from.
    """
    say(f"{name}: {case['preset']} {case['overrides'] or ''} on {case['image_shape']}, batch {case['batch']}")
    flow, x = make_flow(case, device)
    say("  the floor" + (", compiling" if compiled else ""))
    bounds, costs = floors(flow, [coupling.net for coupling in couplings(flow)], x, compiled)
    say("  flows" + (", compiling" if compiled else ""))
    sides = our_sides(flow, x, compiled) + (opponents(case, flow, x) if peers else [])
    tasks = {key: task for part in (*bounds, *sides) for key, task in part.tasks().items()}
    times = measure(tasks, rounds, device, f"  {name}", budget)
    # Compiled code keeps its buffers to itself.
    counted = [side for side in sides if device.type == "cuda" or side.name != COMPILED]
    held = {side.name: held_for_backward(side.trained if isinstance(side, Choice) else side) for side in counted}
    rows = rows_of(name, case["batch"], times, held)
    for row in rows:
        shares = {key: row[f"{key} overhead"] for key in ("train", "encode", "decode")}
        if any(share is not None for share in shares.values()):
            told = ", ".join(f"{key} {share:+.0%}" for key, share in shares.items() if share is not None)
            say(f"  {row['side']}, above the floor: {told}")
    tried = [
        {"case": name, "operation": operation, "form": form, "ms": 1e3 * took}
        for operation, by_form in costs.items()
        for form, took in by_form.items()
    ]
    return rows, tried, drawn_from(name, times)


def memory_growth(case: dict[str, Any], device: torch.device, factor: int = 4) -> list[dict[str, Any]]:
    """MiB held for the backward at the case's own depth and at ``factor`` times that, by way of training."""
    held: dict[str, list[int]] = {}
    for times in (1, factor):
        spec = make_flow(case, device)[0].spec
        overrides = {**case["overrides"], "depth": [times * steps for steps in spec["depth"]]}
        for side in our_sides(*make_flow({**case, "overrides": overrides}, device), compiled=False):
            held.setdefault(side.name, []).append(held_for_backward(side))
    return [
        {"side": name, "MiB": shallow / 2**20, f"MiB at {factor}x depth": deep / 2**20, "ratio": deep / shallow}
        for name, (shallow, deep) in held.items()
    ]


def can_compile() -> bool:
    """Whether ``torch.compile`` works here (it needs a C++ compiler)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:  # torch raises many kinds
        say(f"nothing compiled: {str(error).splitlines()[0][:200]}")
        return False
    return True


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=min(2, os.cpu_count() or 1))
    args.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT), metavar="CASE", help=", ".join(CASES))
    args.add_argument("--rounds", type=int, default=30, help="timed rounds of a case, at most (%(default)s)")
    args.add_argument("--seconds", type=float, default=75, help="of timed rounds in a case; 3 rounds at least")
    args.add_argument("--no-compile", action="store_true", help="leave everything compiled out")
    args.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure opponents too")
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = args.parse_args()
    if args.rounds < 1:
        raise SystemExit(f"--rounds must be at least 1, got {args.rounds}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    compiled = not args.no_compile and can_compile()
    growth = memory_growth(CASES["mef_tiny"], device)
    rows: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    drawn: Drawn = {}
    for name in args.cases:
        if compiled:
            # One code object is compiled for every shape, format and mode that it meets.
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
        found, forms, others = run_case(name, CASES[name], args.rounds, device, compiled, args.peers, args.seconds)
        rows, tried, drawn = rows + found, tried + forms, drawn | others
        gc.collect()
        # After every case, so that a run that is cut off leaves what it has; its JSON lacks the cases that did not run.
        write_results(
            args.out,
            name_of(device),
            "Time above the subnets alone",
            rows,
            {
                "verdicts": verdicts(rows, growth, drawn),
                "memory at depth": growth,
                "floors tried, one network of every shape times its number": tried,
            },
            show=name == args.cases[-1],
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            compiled=compiled,
            seed=0,
            peers=speed_peers.versions() if args.peers else {},
        )
    try:
        plot(rows, args.out / f"{name_of(device)}.png")
    except ImportError:
        say("no picture: pip install matplotlib (or glem-augment[plots])")


if __name__ == "__main__":
    main()
