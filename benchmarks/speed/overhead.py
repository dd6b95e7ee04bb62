"""What GLEMAugment adds to a training step: seconds and peak memory, for every policy.

    python benchmarks/speed/overhead.py
    python benchmarks/speed/overhead.py --device cuda --model eva02_base_patch14_448 --size 448 --amp

A step is forward, cross-entropy, backward and SGD of a timm network on one batch of normalised images, with the batch
augmented before it, or not ("none"). All sides share the network and take turns in balanced order; a ratio is that of
two steps of one round, so that a machine that is slow for a while slows both. With --threads 1 times are CPU time,
which other load changes by its use of the caches only; otherwise they are wall-clock time, and the machine should be
quiet.

The flow has its final size but is not trained (its last convolutions are drawn at random), which changes no cost. Its
ActNorms and modes are fitted to the kind of images that the step gets, so that few moved images are given up as
implausible. Its multiply-adds are counted in one pass from image to latent.

Peak memory is that of a fresh process that loads the flow and trains for some steps, the median of a few such
processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import balanced_orders, parser, write_results
from glem_augment import GLEM, GLEMAugment

CLASSES, FLOW_SIDE, SEED = 10, 32, 0
# glow_fast with narrower networks.
FLOW = {"preset": "glow_fast", "depth": [8, 8], "width": [48, 64]}
POLICIES = ("mixup", "noise", "adversarial")
# Per cent, on a CPU and on a GPU.
TIME_LIMITS = {"cpu": {"mixup": 35, "noise": 35, "adversarial": 120}, "cuda": dict.fromkeys(POLICIES, 10)}
MEMORY_LIMIT = 20
WARM, MEMORY_STEPS, MEMORY_RUNS = 3, 20, 3


def images(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images [n, 3, size, size] in [0, 1], tinted by their class, and labels [n]."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    tint = torch.rand(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(SEED))[y]
    coarse = 0.3 + 0.2 * tint + 0.2 * torch.rand(n, 3, 8, 8, generator=g)
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False), y


class Step:
    """A training step of a timm network.

    Args:
        args: model, size, batch, device and amp of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.device, self.amp = torch.device(args.device), args.amp
        sized = {"img_size": args.size} if args.model.startswith("eva") else {}
        self.net: nn.Module = timm.create_model(args.model, num_classes=CLASSES, **sized).to(self.device).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.001, momentum=0.9)
        x, self.y = images(args.batch, args.size, SEED)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.x, self.y = ((x - mean) / std).to(self.device), self.y.to(self.device)

    def __call__(self, augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None) -> None:
        """One step."""
        x, y = (self.x, self.y) if augment is None else augment(self.x, self.y)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.net(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def make_flow() -> tuple[GLEM, float]:
    """The flow with its modes, and its multiply-adds per image."""
    torch.manual_seed(SEED)
    settings = dict(FLOW)
    shape, names = (3, FLOW_SIDE, FLOW_SIDE), [str(c) for c in range(CLASSES)]
    model = GLEM.create(settings.pop("preset"), shape, classes=names, **settings).eval()
    x, y = images(100 * CLASSES, FLOW_SIDE, SEED + 1)
    model.initialise(x[:100])
    for name, parameter in model.flow.named_parameters():
        if ".tail." in name:
            nn.init.normal_(parameter, std=1e-3)
    model.requires_grad_(False).fit_modes(((255 * x).round().to(torch.uint8), y))
    with FlopCounterMode(display=False) as counter:
        model.encode(x[:1])
    return model, counter.get_total_flops() / 2


def make_augment(model: GLEM, policy: str, step: Step, p: float) -> GLEMAugment:
    """GLEMAugment for normalised images."""
    aug = GLEMAugment(model, p=p, policy=policy, seed=SEED, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    if policy == "adversarial":
        aug.attach(step.net, autocast=torch.bfloat16 if step.amp else None)
    return aug


def timed(sides: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round."""
    clock = time.process_time if torch.get_num_threads() == 1 and args.device == "cpu" else time.perf_counter
    names, times = list(sides), {name: [] for name in sides}
    orders = balanced_orders(len(names))
    for number in range(-WARM, args.rounds):
        for index in next(orders):
            began = clock()
            sides[names[index]]()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if number >= 0:
                times[names[index]].append(clock() - began)
    return times


def peak_memory() -> float:
    """Highest resident memory of this process so far, in MiB."""
    # getrusage's maximum is inherited from the parent that started the process; VmHWM is the process's own.
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def measure_memory(args: argparse.Namespace, policy: str, flow: str) -> float:
    """MiB at the peak of some steps with one policy, or "none"; `flow` is the folder of the saved flow."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    step, augment = Step(args), None
    if policy != "none":
        augment = make_augment(GLEM.from_pretrained(flow), policy, step, args.p)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(MEMORY_STEPS):
        step(augment)
    return peak_memory() if args.device == "cpu" else torch.cuda.max_memory_allocated() / 1024**2


def memory_in_fresh_processes(args: argparse.Namespace, policy: str, flow: str) -> float:
    """`measure_memory`, the median of a few processes."""
    found = []
    for _ in range(MEMORY_RUNS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measure_memory, (args, policy, flow)))
    return statistics.median(found)


def row(
    policy: str, times: dict[str, list[float]], memory: dict[str, float], replaced: float, limits: dict[str, int]
) -> dict[str, Any]:
    """One line of the table; ratios are relative to "none" of the same round."""
    more = [100 * (a / b - 1) for a, b in zip(times[policy], times["none"], strict=True)]
    more_memory = 100 * (memory[policy] / memory["none"] - 1)
    low, median, high = np.percentile(more, [25, 50, 75])
    plain = policy == "none"
    return {
        "policy": policy,
        "ms per step": 1e3 * statistics.median(times[policy]),
        "longer by %": None if plain else float(median),
        "middle half of the rounds": None if plain else f"{low:.3g} to {high:.3g}",
        "limit %": limits.get(policy),
        "peak memory MiB": memory[policy],
        "more memory by %": None if plain else more_memory,
        "memory limit %": None if plain else MEMORY_LIMIT,
        "within limits": None if plain else bool(median <= limits[policy] and more_memory <= MEMORY_LIMIT),
        "kept as they were %": None if plain else replaced,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="resnet18", help="of timm (%(default)s)")
    arguments.add_argument("--size", type=int, default=64, help="side of the images (%(default)s)")
    arguments.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    arguments.add_argument("--p", type=float, default=0.5, help="share of the images that are changed (%(default)s)")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments.add_argument("--amp", action="store_true", help="bfloat16 autocast of the network")
    arguments.add_argument("--rounds", type=int, default=24, help="(%(default)s)")
    arguments.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    step = Step(args)
    model, macs = make_flow()
    with tempfile.TemporaryDirectory() as flow:
        model.save(flow)
        memory = {name: memory_in_fresh_processes(args, name, flow) for name in ("none", *args.policies)}
    made = {policy: make_augment(model, policy, step, args.p) for policy in args.policies}
    sides = {"none": lambda: step(None), **{name: (lambda aug=aug: step(aug)) for name, aug in made.items()}}
    times = timed(sides, args)
    lost = {name: 100 * aug.stats["replaced"] / max(1, aug.stats["selected"]) for name, aug in made.items()}
    limits = TIME_LIMITS[args.device]
    write_results(
        args.out,
        "overhead" if args.device == "cpu" else "overhead_gpu",
        "What GLEMAugment adds to a training step",
        [row(name, times, memory, lost.get(name, 0.0), limits) for name in sides],
        step=f"timm {args.model} on 3x{args.size}x{args.size}, batch {args.batch}, "
        f"{'bfloat16' if args.amp else 'float32'}, {args.device}; p = {args.p:g}",
        flow=f"{json.dumps(FLOW)}, 3x{FLOW_SIDE}x{FLOW_SIDE}, {macs / 1e6:.1f} M multiply-adds per image and direction",
        rounds=f"{args.rounds}, interleaved in balanced order after {WARM} to warm up; seed {SEED}",
        clock="CPU time" if torch.get_num_threads() == 1 and args.device == "cpu" else "wall clock",
    )


if __name__ == "__main__":
    main()
