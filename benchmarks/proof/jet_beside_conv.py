"""A small Jet beside the convolutional flow, after the same CPU time of training on CIFAR-10, one thread each.

    GLEM_DATA=... python benchmarks/proof/jet_beside_conv.py [--minutes 60] [--flows jet_tiny glow_fast] [--runs FOLDER]
    GLEM_DATA=... python benchmarks/proof/jet_beside_conv.py --minutes 2 --flows jet_tiny --rates 0.001 0.003 0.01

Both flows have the same method, augmentation, batch size and budget. The budget is CPU seconds of the process, so other
work on the machine matters little. The time of a step is measured first, one flow right after the other, and sets
the number of steps, so that the cosine ends with the budget. If the steps are not whole epochs, each epoch has fewer
images. The table has the CPU time of each run.

--rates compares learning rates on held-out training images and stops. The test images are measured once, at the end of
the runs. The same command resumes a stopped run: FOLDER holds checkpoints and models.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, find_images, parser, write_results
from glem_augment import GLEM, ImageData, open_data
from glem_augment.evaluation import evaluate
from glem_augment.io import write_json
from glem_augment.model.weights import WEIGHTS
from glem_augment.training import TrainConfig, Trainer
from glem_augment.training.checkpoint import NEWEST
from glem_augment.training.log import METRICS

NAME = "jet_beside_conv"
FLOWS: dict[str, dict[str, Any]] = {"jet_tiny": dict(lr=0.003), "glow_fast": dict(lr=0.01)}
RECIPE: dict[str, Any] = dict(
    batch_size=32, schedule="cosine", augment=("flip",), modes_rank=0, sample_every=0, threads=1, seed=0
)
TRIAL_STEPS, WARMUP = 25, 300


class CPUTrainer(Trainer):
    """A run that measures the CPU time of the process; `began` must be a time of `time.process_time`."""

    def seconds(self) -> float:
        return time.process_time() - self._clock


def make_trainer(flow: str, data: ImageData, folder: Path, plan: dict[str, Any]) -> CPUTrainer:
    """The planned run of `flow`, resumed from a checkpoint if there is one."""
    rows = np.random.default_rng(0).permutation(len(data))[: plan["images"]]
    config = TrainConfig(preset=flow, epochs=plan["epochs"], warmup_steps=plan["warmup"], **RECIPE, **plan["settings"])
    resume = (folder / NEWEST).is_file()
    began = time.process_time()
    return CPUTrainer(data.subset(np.sort(rows)), config, folder, resume, device="cpu", progress=False, began=began)


def make_plan(flow: str, data: ImageData, minutes: float, **changes: Any) -> dict[str, Any]:
    """A plan of epochs, images and warm-up that takes `minutes`, with the measured CPU seconds of a step."""
    plan: dict[str, Any] = {"epochs": 1, "images": len(data), "warmup": 1, "settings": {**FLOWS[flow], **changes}}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(flow, data, Path(folder), plan)
        rows = trainer.batches.split.nf[: TRIAL_STEPS * RECIPE["batch_size"]]
        for x, y, share in trainer.batches.read(rows, RECIPE["batch_size"]):
            began = time.process_time()
            trainer.e_step.take(x, y, share, trainer.so_far)
            times.append(time.process_time() - began)
    step = statistics.median(times[2:])
    steps, full = max(1, round(60 * minutes / step)), trainer.steps_per_epoch
    epochs = math.ceil(steps / full)
    # Every class needs images to train on, to fit and to hold out, whatever the budget.
    images = max(min(len(data), 400), len(data) * steps // (epochs * full))
    warmup = min(WARMUP, steps // 10)
    return {**plan, "epochs": epochs, "images": images, "warmup": warmup, "step_seconds": step}


def train(flow: str, data: ImageData, folder: Path, plan: dict[str, Any]) -> GLEM:
    """The trained model, from `folder` or from the rest of its run."""
    if (folder / WEIGHTS).is_file():
        return GLEM.from_pretrained(folder)
    return make_trainer(flow, data, folder, plan).fit()


def row_of(flow: str, model: GLEM, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The row of a run, from its record."""
    log = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    epochs = [entry for entry in log if entry["kind"] == "epoch"]
    last = epochs[-1]
    return {
        "flow": flow, "parameters": sum(p.numel() for p in model.flow.parameters()), "lr": plan["settings"]["lr"],
        "CPU seconds": round(last["seconds"]), "steps": last["step"], "epochs": plan["epochs"],
        "images": plan["images"], "held-out bits/dim": last["val_bits_per_dim"],
        "held-out accuracy %": 100 * last["val_accuracy"], "returns": model.config.training["rollbacks"],
        "curve": [[entry[k] for k in ("seconds", "val_bits_per_dim", "val_accuracy")] for entry in epochs],
    }  # fmt: skip


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--minutes", type=float, default=60, help="of the CPU, for each flow (%(default)s)")
    args.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS), metavar="NAME")
    args.add_argument("--rates", nargs="+", type=float, help="compare these learning rates on held-out images instead")
    args.add_argument("--runs", type=Path, default=ROOT / "runs" / NAME, help="checkpoints and models (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    folder = find_images(NAME, "CIFAR-10", "cifar10")
    data = open_data(folder, "train", progress=False)
    if args.rates:
        for flow in args.flows:
            plan = make_plan(flow, data, args.minutes)
            for rate in args.rates:
                out = args.runs / f"{flow}-{args.minutes:g}-{rate:g}"
                own = {**plan, "settings": {**plan["settings"], "lr": rate}}
                row = row_of(flow, train(flow, data, out, own), out, own)
                print({key: value for key, value in row.items() if key != "curve"}, flush=True)
        return
    path = args.runs / "plan.json"
    if not path.is_file():
        write_json(path, {"minutes": args.minutes, **{flow: make_plan(flow, data, args.minutes) for flow in FLOWS}})
    plans = json.loads(path.read_text())
    if plans["minutes"] != args.minutes:
        raise SystemExit(f"{args.runs} holds runs of {plans['minutes']:g} minutes: use another folder")
    rows: list[dict[str, Any]] = []
    test = open_data(folder, "test", progress=False)
    for flow in args.flows:
        out = args.runs / flow
        model = train(flow, data, out, plans[flow])
        found = evaluate(model, test, round_trip=200, progress=False)
        rows.append(
            {
                **row_of(flow, model, out, plans[flow]), "test bits/dim": found["bits_per_dim"],
                "test accuracy %": 100 * found["accuracy"],
                "largest error of a round trip, uint8 steps": found["round_trip"]["max_error"],
            }
        )  # fmt: skip
        write_results(
            args.out, NAME, "A small Jet beside the convolutional flow after equal CPU time, CIFAR-10", rows,
            test_images=len(test), method="hybrid-joint", recipe=RECIPE, settings=FLOWS, plans=plans,
        )  # fmt: skip


if __name__ == "__main__":
    main()
