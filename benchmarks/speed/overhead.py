"""The time that GLEMAugment takes of a training step.

    python benchmarks/speed/overhead.py [--model resnet18] [--batch 64] [--rounds 24]

A step is forward, cross-entropy, backward and SGD of a timm network on one batch of normalised images. The batch is
augmented first, which is timed alone: the difference of two steps would be less exact. All sides take turns in balanced
order. A ratio compares two times of one round, so a temporarily slow machine slows both. With --threads 1, times are
CPU time, which other load changes only through caches and memory bandwidth. Otherwise times are wall-clock time, and
the machine should be idle.

Pixels and TAEF2's latents have the size of the images, the flow has 32x32. The flow has its final size but is not
trained (its last convolutions are random), which does not change the cost. Its ActNorms and all modes are fitted to
images like the step's images, so that few moves are rejected. The stored times of workers, per image and beside other
augmentations, were measured by the code of commit 309e287.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, balanced_orders, parser, seconds
from glem_augment import GLEM, GLEMAugment

CLASSES, FLOW_SIDE, SEED, WARM = 10, 32, 0, 1
SIDES = 64, 128
# glow_fast with narrower networks.
FLOW = {"preset": "glow_fast", "depth": [8, 8], "width": [48, 64]}
POLICIES = ("mixup", "noise", "adversarial")


def images(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images [n, 3, size, size] in [0, 1], tinted by their class, and labels [n]."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    tint = torch.rand(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(SEED))[y]
    coarse = 0.3 + 0.2 * tint + 0.2 * torch.rand(n, 3, 8, 8, generator=g)
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False), y


def as_uint8(x: Tensor) -> Tensor:
    return (255 * x).round().to(torch.uint8)


class Step:
    """A training step of a timm network on a batch of images of a size."""

    def __init__(self, model: str, size: int, batch: int) -> None:
        torch.manual_seed(SEED)
        self.net: nn.Module = timm.create_model(model, num_classes=CLASSES).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.001, momentum=0.9)
        x, self.y = images(batch, size, SEED)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.x = (x - mean) / std

    def __call__(self) -> None:
        loss = F.cross_entropy(self.net(self.x), self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def make_flow() -> GLEM:
    """The flow with its modes."""
    torch.manual_seed(SEED)
    settings = dict(FLOW)
    shape, names = (3, FLOW_SIDE, FLOW_SIDE), [str(c) for c in range(CLASSES)]
    model = GLEM.create(settings.pop("preset"), shape, classes=names, **settings).eval()
    x, y = images(100 * CLASSES, FLOW_SIDE, SEED + 1)
    model.flow.initialise(model.numbers(x[:100]))
    for name, parameter in model.flow.named_parameters():
        if ".tail." in name:
            nn.init.normal_(parameter, std=1e-3)
    model.requires_grad_(False).fit_modes((as_uint8(x), y))
    return model


def fitted(size: int, autoencoder: str | None = None) -> GLEM:
    """A model of images of this size without a flow, with 64 modes per class."""
    x, y = images(65 * CLASSES, size, SEED + 1)
    return GLEM.fit((as_uint8(x), y), autoencoder)


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


def middle(times: list[float], others: list[float]) -> float:
    """The median of the ratios of two times of one round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def of_steps(args: argparse.Namespace, size: int, models: dict[str, GLEM]) -> dict[str, dict[str, float]]:
    """Milliseconds of steps and of moves, by codec and policy, and moves in % of the plain step of the same round."""
    step = Step(args.model, size, args.batch)
    sides: dict[str, Callable[[], Any]] = {"no moves": step}
    made: dict[str, GLEMAugment] = {}
    for codec, model in models.items():
        for policy in POLICIES:
            aug = GLEMAugment(model, policy, args.p, seed=SEED, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
            made[f"{codec}, {policy}"] = aug.attach(step.net) if aug.policy.wants_classifier else aug
            sides[f"{codec}, {policy}"] = partial(aug, step.x, step.y)
    times = timed(sides, args.rounds)
    found = {side: {"ms": 1e3 * statistics.median(times[side])} for side in sides}
    for side, aug in made.items():
        found[side]["% of the step"] = 100 * middle(times[side], times["no moves"])
        found[side]["% kept as they were"] = 100 * aug.stats["rejected"] / max(1, aug.stats["selected"])
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="resnet18", help="of timm (%(default)s)")
    arguments.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    arguments.add_argument("--p", type=float, default=0.5, help="share of a step's images that change (%(default)s)")
    arguments.add_argument(
        "--rounds", type=int, default=24, help="of steps; four times as many in workers (%(default)s)"
    )
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows, flow = Rows("speed", args.out), make_flow()
    for size in SIDES:
        pixels = fitted(size)
        more = {"taef2": fitted(size, "taef2"), "flow": flow} if size == SIDES[0] else {}
        for arm, values in of_steps(args, size, {"pixels": pixels, **more}).items():
            rows.add(f"{size} px", arm, "", "step", values)


if __name__ == "__main__":
    main()
