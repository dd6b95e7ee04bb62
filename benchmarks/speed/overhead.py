"""The time that GLEMAugment adds to a training step, for every codec and policy.

    python benchmarks/speed/overhead.py [--model resnet18] [--size 64] [--batch 64] [--rounds 24]

A step is forward, cross-entropy, backward and SGD of a timm network on one batch of normalised images. The batch is
augmented first, which is timed alone: the difference of two steps would be less exact. Steps and augmentations take
turns in balanced order. A ratio compares two times of one round, so a temporarily slow machine slows both. With
--threads 1, times are CPU time, which other load changes only through the caches. Otherwise times are wall-clock time,
and the machine should be idle.

The pixels and TAEF2's latents have the size of the images, the flow has 32x32. The flow has its final size but is not
trained (its last convolutions are random), which does not change the cost. Its ActNorms and all modes are fitted to
images like the step's images, so that few moves are rejected. Multiply-adds are counted in one pass from image to
latent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
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

from benchmarks.common import balanced_orders, parser, seconds, write_results
from glem_augment import GLEM, GLEMAugment

CLASSES, FLOW_SIDE, SEED, WARM = 10, 32, 0, 1
# glow_fast with narrower networks.
FLOW = {"preset": "glow_fast", "depth": [8, 8], "width": [48, 64]}
POLICIES = ("mixup", "noise", "adversarial")
COLUMNS = ("% of the step", "middle half of the rounds", "kept as they were %")


def images(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images [n, 3, size, size] in [0, 1], tinted by their class, and labels [n]."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    tint = torch.rand(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(SEED))[y]
    coarse = 0.3 + 0.2 * tint + 0.2 * torch.rand(n, 3, 8, 8, generator=g)
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False), y


class Step:
    """A training step of a timm network, with model, size and batch from the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.net: nn.Module = timm.create_model(args.model, num_classes=CLASSES).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.001, momentum=0.9)
        x, self.y = images(args.batch, args.size, SEED)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.x = (x - mean) / std

    def __call__(self) -> None:
        loss = F.cross_entropy(self.net(self.x), self.y)
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
    aug = GLEMAugment(model, policy, p, seed=SEED, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    if aug.policy.wants_classifier:
        aug.attach(step.net)
    return aug


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round."""
    names, times = list(sides), {name: [] for name in sides}
    orders = balanced_orders(len(names))
    for number in range(-WARM, rounds):
        for index in next(orders):
            taken = seconds(sides[names[index]])
            if number >= 0:
                times[names[index]].append(taken)
    return times


def row(side: str, times: dict[str, list[float]], aug: GLEMAugment | None) -> dict[str, Any]:
    """One line of the table, "none" for the plain step; ratios are relative to the plain step of the same round."""
    codec, _, policy = side.partition(", ")
    found: dict[str, Any] = {"codec": codec, "policy": policy, "ms": 1e3 * statistics.median(times[side])}
    if aug is None:
        return found | dict.fromkeys(COLUMNS)
    more = [100 * a / b for a, b in zip(times[side], times["none"], strict=True)]
    low, median, high = np.percentile(more, [25, 50, 75])
    kept = 100 * aug.stats["rejected"] / max(1, aug.stats["selected"])
    return found | dict(zip(COLUMNS, (float(median), f"{low:.3g} to {high:.3g}", kept), strict=True))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="resnet18", help="of timm (%(default)s)")
    arguments.add_argument("--size", type=int, default=64, help="side of the images (%(default)s)")
    arguments.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    arguments.add_argument("--p", type=float, default=0.5, help="share of the images that are changed (%(default)s)")
    arguments.add_argument("--rounds", type=int, default=24, help="(%(default)s)")
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    step = Step(args)
    flow, macs = make_flow()
    x, y = images(100 * CLASSES, args.size, SEED + 1)
    data = (255 * x).round().to(torch.uint8), y
    models = {"pixels": GLEM.fit(data), "taef2": GLEM.fit(data, "taef2"), "flow": flow}
    made: dict[str, GLEMAugment | None] = {"none": None}
    for codec, model in models.items():
        made |= {f"{codec}, {policy}": make_augment(model, policy, step, args.p) for policy in POLICIES}
    sides = {name: step if aug is None else partial(aug, step.x, step.y) for name, aug in made.items()}
    times = timed(sides, args.rounds)
    write_results(
        args.out,
        "overhead",
        "What GLEMAugment adds to a training step",
        [row(name, times, aug) for name, aug in made.items()],
        step=f"timm {args.model} on 3x{args.size}x{args.size}, batch {args.batch}, float32; p = {args.p:g}",
        flow=f"{json.dumps(FLOW)}, 3x{FLOW_SIDE}x{FLOW_SIDE}, {macs / 1e6:.1f} M multiply-adds per image and direction",
        rounds=f"{args.rounds}, interleaved in balanced order after {WARM} to warm up; seed {SEED}",
        clock="CPU time" if torch.get_num_threads() == 1 else "wall clock",
    )


if __name__ == "__main__":
    main()
