"""The time that GLEMAugment takes: of a training step, and per image beside other augmentations of a worker.

    python benchmarks/speed/overhead.py [--model resnet18] [--batch 64] [--rounds 24]

A step is forward, cross-entropy, backward and SGD of a timm network on one batch of normalised images. The batch is
augmented first, which is timed alone: the difference of two steps would be less exact. In a worker, the transform
takes uint8 images that are a batch already, through the collate function, or image by image through `as_transform`.
torchvision's augmentations take PIL images, as in most loaders, and none of the times includes loading.

All sides take turns in balanced order. A ratio compares two times of one round, so a temporarily slow machine slows
both. With --threads 1, times are CPU time, which other load changes only through caches and memory bandwidth. Otherwise
times are wall-clock time, and the machine should be idle.

Pixels and TAEF2's latents have the size of the images, the flow has 32x32. The flow has its final size but is not
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
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import balanced_orders, parser, seconds, write_results
from glem_augment import GLEM, GLEMAugment

CLASSES, FLOW_SIDE, SEED, WARM = 10, 32, 0, 1
SIDES, WORKER_BATCH = (64, 128), 32
# glow_fast with narrower networks.
FLOW = {"preset": "glow_fast", "depth": [8, 8], "width": [48, 64]}
POLICIES = ("mixup", "noise", "adversarial")
COLUMNS = ("% of the step", "middle half of the rounds", "kept as they were %")
PER_IMAGE = "per image in a worker"  # a heading of the results
OTHERS = {
    "ColorJitter(0.4, 0.4, 0.4)": v2.ColorJitter(0.4, 0.4, 0.4),
    "TrivialAugmentWide()": v2.TrivialAugmentWide(),
    "RandAugment()": v2.RandAugment(),
}


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
    model.requires_grad_(False).fit_modes((as_uint8(x), y))
    with FlopCounterMode(display=False) as counter:
        model.encode(x[:1])
    return model, counter.get_total_flops() / 2


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


def spread(ratios: list[float]) -> tuple[float, str]:
    """The median, and the middle half in words."""
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return float(median), f"{low:.3g} to {high:.3g}"


def of_steps(args: argparse.Namespace, size: int, models: dict[str, GLEM]) -> list[dict[str, Any]]:
    """Lines of the table of steps; ratios are relative to the plain step of the same round."""
    step = Step(args.model, size, args.batch)
    sides: dict[str, Callable[[], Any]] = {"none, ": step}
    made: dict[str, GLEMAugment] = {}
    for codec, model in models.items():
        for policy in POLICIES:
            aug = GLEMAugment(model, policy, args.p, seed=SEED, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
            made[f"{codec}, {policy}"] = aug.attach(step.net) if aug.policy.wants_classifier else aug
            sides[f"{codec}, {policy}"] = partial(aug, step.x, step.y)
    times, rows = timed(sides, args.rounds), []
    for side in sides:
        codec, _, policy = side.partition(", ")
        row: dict[str, Any] = {
            "size": size,
            "codec": codec,
            "policy": policy,
            "ms": 1e3 * statistics.median(times[side]),
        }
        found: tuple[Any, ...] = (None, None, None)
        if policy:
            ratios = [100 * a / b for a, b in zip(times[side], times["none, "], strict=True)]
            stats = made[side].stats
            found = (*spread(ratios), 100 * stats["rejected"] / max(1, stats["selected"]))
        rows.append(row | dict(zip(COLUMNS, found, strict=True)))
    return rows


def per_image(rounds: int, size: int, model: GLEM) -> list[dict[str, Any]]:
    """Lines of the table of workers; ratios are relative to ColorJitter in the same round."""
    x, y = images(WORKER_BATCH, size, SEED)
    x, labels = as_uint8(x), y.tolist()
    pictures = [v2.functional.to_pil_image(image) for image in x]
    sides: dict[str, Callable[[], Any]] = {
        name: lambda other=other: [other(picture) for picture in pictures] for name, other in OTHERS.items()
    }
    for policy in ("mixup", "noise"):
        for p in (0.5, 1.0):
            collate = GLEMAugment(model, policy, p, seed=SEED).collate_fn(lambda _: (x, y))
            sides[f"{policy}, p = {p:g}, collate_fn"] = partial(collate, [])
        single = GLEMAugment(model, policy, 1.0, seed=SEED).as_transform()
        sides[f"{policy}, p = 1, as_transform"] = lambda single=single: [*map(single, zip(x, labels, strict=True))]
    times, rows = timed(sides, rounds), []
    for side in sides:
        ratio, middle = spread([a / b for a, b in zip(times[side], times[next(iter(OTHERS))], strict=True)])
        milliseconds = 1e3 * statistics.median(times[side]) / WORKER_BATCH
        rows.append({"size": size, "side": side, "ms": milliseconds, "of ColorJitter": ratio, "middle half": middle})
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="resnet18", help="of timm (%(default)s)")
    arguments.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    arguments.add_argument(
        "--p", type=float, default=0.5, help="share of a step's images that are changed (%(default)s)"
    )
    arguments.add_argument(
        "--rounds", type=int, default=24, help="of steps; four times as many in workers (%(default)s)"
    )
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    flow, macs = make_flow()
    rows, workers = [], []
    for size in SIDES:
        pixels = fitted(size)
        more = {"taef2": fitted(size, "taef2"), "flow": flow} if size == SIDES[0] else {}
        rows += of_steps(args, size, {"pixels": pixels, **more})
        workers += per_image(4 * args.rounds, size, pixels)
    write_results(
        args.out,
        "overhead",
        "What GLEMAugment adds to a training step, and per image",
        rows,
        {PER_IMAGE: workers},
        step=f"timm {args.model}, batch {args.batch}, float32; p = {args.p:g}",
        flow=f"{json.dumps(FLOW)}, 3x{FLOW_SIDE}x{FLOW_SIDE}, {macs / 1e6:.1f} M multiply-adds per image and direction",
        worker=f"modes of pixels, batches of {WORKER_BATCH} images, uint8; torchvision's augmentations on PIL images",
        rounds=f"{args.rounds} of steps, {4 * args.rounds} in workers, interleaved in balanced order after {WARM} to "
        f"warm up; seed {SEED}",
        clock="CPU time" if torch.get_num_threads() == 1 else "wall clock",
    )


if __name__ == "__main__":
    main()
