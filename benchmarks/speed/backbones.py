"""Which flow is best for a fixed time of training on a CPU? Each variant changes one setting of a common base.

    python benchmarks/speed/backbones.py [--seeds 0 1 2] [--seconds 90]

A cell is a variant trained with a seed. All cells have the same recipe and the same CPU seconds of training on one
thread. The time of a step is measured first. It sets the number of images, so that the cosine ends with the budget.
Bits/dim and accuracy are measured on training images that no cell trains on; the test set takes no part. A short budget
favours small flows, and says nothing about large flows after hours.

The widths of variants marked "=" are chosen so that their networks take as many FLOPs as the base. FLOPs count
convolutions and matrix products in one forward pass, times three; a multiply-add counts as two.

Each finished cell is stored in backbones.json at once, and a rerun continues with the missing cells.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, parser, write_results
from benchmarks.paper.research import ResearchTrainer, split_settings
from glem_augment import open_data
from glem_augment.distributed import share
from glem_augment.errors import TrainingError
from glem_augment.evaluation import evaluate
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig, Trainer

BASE: dict[str, Any] = {"depth": [8, 8], "width": [48, 64], "blocks": [1, 1]}
AFFINE = {"coupling": "affine", "activation": "relu"}  # the cheapest coupling and activation
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "affine": {"coupling": "affine"},
    "affine, relu": {**AFFINE},
    "affine, relu, narrow": {**AFFINE, "width": [32, 40]},
    "affine, relu, bottleneck": {**AFFINE, "subnet": "bottleneck", "width": [64, 96]},
    "affine, relu, depth 4": {**AFFINE, "depth": [4, 4], "width": [64, 88]},
    "affine, relu, depth 16, narrow": {**AFFINE, "depth": [16, 16], "width": [24, 32]},
    "affine, relu, 3 levels": {**AFFINE, "depth": [8, 8, 8], "width": [40, 56, 72], "blocks": [1, 1, 1]},
    "bottleneck =": {"subnet": "bottleneck", "width": [136, 184]},
    "patch 4 =": {"patch": 4, "depth": [16], "width": [32], "blocks": [1]},
    "depth 16 =": {"depth": [16, 16], "width": [32, 40]},
}
RECIPE: dict[str, Any] = dict(
    preset="mef_tiny", objective="hybrid", joint=False, beta=0.3, ce_scale=0.2, batch_size=32, lr=0.01,
    schedule="cosine", m_rounds=4, m_steps=20, sigma_lr_scale=5.0, refit_beta=0.0, modes_rank=0, val_fraction=0.0,
    sample_every=0, threads=1, precision="bf16",
)  # fmt: skip
TRIAL_STEPS, WARMUP, HELD_OUT = 12, 200, 1000
COSTS = ("seconds", "steps", "parameters", "images_seen", "flops_per_image")


def make_trainer(variant: str, data: ImageData, folder: str, seed: int, warmup: int) -> Trainer:
    flow = {**BASE, **VARIANTS[variant]}
    settings = {**RECIPE, "seed": seed, "warmup_steps": warmup, "epochs": 1, "flow_options": flow}
    own, research = split_settings(settings)
    return ResearchTrainer(data, TrainConfig(**own), folder, device="cpu", research=research)


def step_seconds(variant: str, pool: ImageData) -> float:
    """CPU seconds of a training step."""
    rows = np.random.default_rng(2).integers(len(pool), size=TRIAL_STEPS * RECIPE["batch_size"])
    times = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, pool.subset(rows), folder, 0, 1)
        for x, y in pool.batches(rows, RECIPE["batch_size"]):
            began = time.process_time()
            trainer.e_step.take(x, y, share(len(x)), trainer.so_far)
            times.append(time.process_time() - began)
    return statistics.median(times[2:])


def run_cell(variant: str, pool: ImageData, held_out: ImageData, seed: int, seconds: float) -> dict[str, Any]:
    """Train and measure one variant."""
    batch = RECIPE["batch_size"]
    steps = max(1, int(seconds / step_seconds(variant, pool)))
    # Every class must have images, whatever the budget; a tenth of the images fits the Gaussians alone.
    count = min(len(pool), max(200, int(steps * batch / 0.9)))
    data = pool.subset(np.sort(np.random.default_rng([seed, 1]).permutation(len(pool))[:count]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, data, folder, seed, min(WARMUP, steps // 10))
        began = time.process_time()
        try:
            found = evaluate(trainer.fit(), held_out, round_trip=0)
        except TrainingError:
            found = {"bits_per_dim": None, "accuracy": None}
        spent = time.process_time() - began
    flow = trainer.model.flow.float()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        flow(torch.zeros(1, *pool.image_shape))
    weights, flops = sum(p.numel() for p in flow.parameters()), 3 * counter.get_total_flops()
    costs = zip(COSTS, (spent, trainer.step, weights, trainer.step * batch, flops), strict=True)
    return {"bits_per_dim": found["bits_per_dim"], "accuracy": found["accuracy"], **dict(costs)}


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant: means over the seeds (largest minus smallest), best bits/dim first."""

    def text(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ({max(values) - min(values):.3f})" if values else "diverged"

    rows = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        own = [cell for cell in cells if cell["variant"] == variant]
        good = [cell for cell in own if cell["bits_per_dim"] is not None]
        mean = {key: statistics.mean(cell[key] for cell in own) for key in COSTS}
        rows.append(
            {
                "data": "cifar10", "variant": variant, "bits/dim": text([cell["bits_per_dim"] for cell in good]),
                "NF accuracy %": text([100 * cell["accuracy"] for cell in good]), "seeds": len(own),
                "parameters": f"{mean['parameters'] / 1e6:.3f} M", "MFLOP/image": round(mean["flops_per_image"] / 1e6),
                "seconds": round(mean["seconds"]),
                "TFLOP in all": round(mean["flops_per_image"] * mean["images_seen"] / 1e12, 1),
                "images/s": round(mean["images_seen"] / mean["seconds"]), "steps": round(mean["steps"]),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: float(row["bits/dim"].replace("diverged", "inf").split()[0]))


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args.add_argument("--seconds", type=float, default=90, help="of training per cell (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "backbones.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    done = {(cell["variant"], cell["seed"]) for cell in cells}
    data = open_data(find_images("backbones", "cifar10", "cifar10"), "train")
    rows = np.random.default_rng(0).permutation(len(data))
    held_out, pool = (data.subset(np.sort(part)) for part in (rows[:HELD_OUT], rows[HELD_OUT:]))
    title = "Flows for the same training time on a CPU"
    # Seeds are the outer loop, so that an interrupted study has compared all variants.
    for seed, variant in itertools.product(args.seeds, VARIANTS):
        if (variant, seed) not in done:
            found = run_cell(variant, pool, held_out, seed, args.seconds)
            cells.append({"variant": variant, "data": "cifar10", "seed": seed, **found})
            write_results(args.out, "backbones", title, summary(cells), {"cells": cells}, show=False)
    write_results(args.out, "backbones", title, summary(cells), {"cells": cells})


if __name__ == "__main__":
    main()
