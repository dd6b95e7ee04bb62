"""Which flow is best for a fixed time of training on a CPU: one setting at a time changed from a common base.

    python benchmarks/speed/backbones.py [--data cifar10 fashion-mnist] [--seeds 0 1 2] [--seconds 240] [--only PATTERN]

A cell is a variant trained on a data set with a seed. All get the same recipe (hybrid objective, beta 0.3 on scores
times 0.2, batches of 32, Adamax with a cosine from 0.01, where the variant does not say otherwise) and the same seconds
of training: the cost of a step is measured first and sets the number of steps, so that the cosine ends where the budget
does; the table has the seconds that it then took. With --threads 1 times are CPU time, which other load on the machine
changes by its use of the caches only. Else they are wall-clock time, and the step is measured in turns with steps of
the base, so that the load cancels. Measuring is not counted.
Bits/dim and accuracy come from training images that no cell trains on (--val); the test set takes no part. On the way
they are measured on the first few of those, for the curves in the picture.

A short budget favours small flows, and shows the start of a long run only.

Variants marked "=" have their widths scaled so that the networks cost as many FLOPs as the base's. FLOPs are those of
convolutions, matrix products and attention in one forward pass, times three; a multiply-add counts as two.

Each finished cell is stored in backbones.json at once, and a rerun goes on with the missing ones; table and picture are
made anew each time. Fashion-MNIST is looked for in $GLEM_DATA/fashion-mnist, then where Debian's package
dataset-fashion-mnist puts it; CIFAR-10 in $GLEM_DATA/cifar10.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, machine, parser
from benchmarks.speed.backbones_report import draw, write_table
from benchmarks.speed.backbones_variants import (
    BASE,
    PRESET,
    RECIPE,
    VARIANTS,
    count_flops,
    flow_spec,
    network_flops,
    settings_of,
)
from glem_augment import GLEM, open_data
from glem_augment.data.dataset import ImageData
from glem_augment.errors import TrainingError
from glem_augment.flows import resolve_preset
from glem_augment.io import write_json
from glem_augment.training import TrainConfig, Trainer, optim
from glem_augment.training.batches import G_FRACTION, stratified_split
from glem_augment.training.em import training_mode
from glem_augment.training.logs import held_out

TITLE = "Flows for the same training time on a CPU"
optim.MAX_ROLLBACKS = 0  # a variant that diverges has failed
# Passes over the images that fit the Gaussians, in the whole run.
M_ROUNDS, WARMUP = 4, 200
# Shares of the run after which the held-out images are measured on the way, and how many of them.
ON_THE_WAY, FEW = (1 / 3, 2 / 3), 500
# Images for the first steps, which are only timed.
TRIAL = 600
# Fewer images than this, of a budget of a step or two on a slow machine, could leave a class without any.
LEAST = 200
DATA = {
    "fashion-mnist": ("fashion-mnist", "/usr/share/datasets/fashion-mnist"),
    "cifar10": ("cifar10", None),
    "bundled": (None, "bundled:fashion-mnist"),
}


# ---- data ------------------------------------------------------------------------------------------------------------


class Images:
    """The training images of a data set: the held-out ones, the same for every cell, and a pool to train on.

    Args:
        name: one of ``DATA``; ``limit``: use only so many images (for a quick look), 0 for all.
        held_out: how many images no cell trains on, at most a twentieth.
    """

    def __init__(self, name: str, limit: int = 0, held_out: int = 2000) -> None:
        folder, otherwise = DATA[name]
        found = find_images("backbones", name, folder, otherwise)
        data = open_data(found, "train")
        rows = np.random.default_rng(0xDA7A).permutation(len(data))
        data = data.subset(np.sort(rows[: limit or len(rows)]))
        split = stratified_split(data.targets, len(data.classes), min(0.05, held_out / len(data)), seed=0)
        self.name, self.shape = name, data.image_shape
        self.val = data.subset(split.val)
        self.pool = data.subset(np.sort(np.concatenate([split.nf, split.g])))

    def draw(self, count: int, seed: int) -> ImageData:
        """``count`` images of the pool."""
        rows = np.random.default_rng([seed, 0xD2A3]).permutation(len(self.pool))
        return self.pool.subset(np.sort(rows[:count]))


# ---- a cell ----------------------------------------------------------------------------------------------------------


class TimedTrainer(Trainer):
    """Times its training alone, with a bar of its own; measures when the study wants it, not after each epoch."""

    def set_up(self, clock: Any, text: str, few: list[tuple[Tensor, Tensor]]) -> TimedTrainer:
        """``clock`` gives seconds; ``few``: held-out batches for the curve."""
        self.clock, self.spent, self.started = clock, 0.0, clock()
        self.few, self.curve = few, []
        self.due = [max(1, round(share * self.total_steps)) for share in ON_THE_WAY]
        self.bar = tqdm(total=self.total_steps, desc=text, unit="step", dynamic_ncols=True, leave=False)
        return self

    def e_step(self, x: Tensor, y: Tensor) -> float:
        loss = super().e_step(x, y)
        self.bar.update(1)
        if self.step + 1 in self.due:  # the trainer counts the step after it
            began = self.clock()
            found = held_out(self.evaluated(), self.few, torch.Generator().manual_seed(0))
            if math.isfinite(found["val_bits_per_dim"]):
                self.curve.append(
                    {
                        "seconds": began - self.started,
                        "steps": self.step + 1,
                        "bits_per_dim": found["val_bits_per_dim"],
                        "accuracy": found["val_accuracy"],
                    }
                )
            self.started += self.clock() - began
        return loss

    def measure(self) -> dict[str, float]:
        self.spent = self.clock() - self.started  # after the last step of each epoch; the last call counts
        return {}


class Study:
    """What all cells share: budget, clock, and one trainer of the base per data set, to measure time against."""

    def __init__(self, args: Any) -> None:
        self.args = args
        # With one thread CPU time is exact whatever else runs; with more, waiting threads would count.
        self.clock = time.process_time if args.threads == 1 else time.perf_counter
        self.bases: dict[str, Trainer] = {}
        self.images: dict[str, Images] = {}

    def data(self, name: str) -> Images:
        if name not in self.images:
            self.images[name] = Images(name, self.args.images, self.args.val)
        return self.images[name]

    def trainer(
        self, data: ImageData, spec: dict[str, Any], folder: str, seed: int, cls: type[Trainer] = Trainer, **more: Any
    ) -> Trainer:
        options = {key: value for key, value in spec.items() if key not in ("preset", "image_shape")}
        config = TrainConfig(
            **{
                **RECIPE, "flow_options": options, "precision": self.args.precision, "threads": self.args.threads,
                "seed": seed, **more,
            }
        )  # fmt: skip
        return cls(data, config, folder, device="cpu", progress=False)

    def costs(
        self, name: str, spec: dict[str, Any], settings: dict[str, Any], reference: dict[str, float]
    ) -> tuple[float, float]:
        """Seconds of a training step, and of encoding one image.

        In wall-clock time they are what they would be were the machine as idle as for ``reference``, which is filled
        with the base's step the first time.
        """
        images, clock = self.data(name), self.clock
        with tempfile.TemporaryDirectory() as folder:
            few = images.draw(TRIAL, 0)
            trainers = [self.trainer(few, spec, f"{folder}/variant", 0, **settings)]
            if self.args.threads != 1:
                if name not in self.bases:
                    plain = resolve_preset(PRESET, images.shape, **BASE)
                    self.bases[name] = self.trainer(few, plain, f"{folder}/base", 0)
                trainers.append(self.bases[name])
        modes = ExitStack()
        for trainer in trainers:
            modes.enter_context(training_mode(trainer.model.flow, trainer.config))
        batches = [next(few.batches(np.arange(len(few)), t.config.batch_size)) for t in trainers]
        steps: list[list[float]] = [[] for _ in trainers]
        encodes: list[float] = []
        for turn in range(1 + self.args.rounds):
            for times, trainer, batch in zip(steps, trainers, batches, strict=True):
                began = clock()
                trainer.e_step(*batch)
                times.append(clock() - began)
            with torch.no_grad():
                began = clock()
                trainers[0].model.encode(batches[0][0], torch.Generator().manual_seed(turn))
                encodes.append((clock() - began) / len(batches[0][0]))
        modes.close()
        step, encode = statistics.median(steps[0][1:]), statistics.median(encodes[1:])
        if self.args.threads == 1:
            return step, encode
        base = statistics.median(steps[1][1:])
        load = reference.setdefault(name, base) / base
        return step * load, encode * load

    def cell(self, variant: str, name: str, seed: int, spec: dict[str, Any], reference: dict[str, float]) -> dict:
        """Train and measure one; returns its row."""
        images, began, changes = self.data(name), time.perf_counter(), settings_of(variant)
        batch = changes.get("batch_size", RECIPE["batch_size"])
        step, encode = self.costs(name, spec, changes, reference)
        # So many passes over D_g belong to the run, which is a ninth of the images that the steps see in one epoch.
        share, epochs = G_FRACTION / (1 - G_FRACTION), 1
        while True:
            rounds = max(1, round(M_ROUNDS / epochs))
            steps = max(1, int(self.args.seconds / (step + rounds * share * batch * encode)))
            needed = math.ceil(steps * batch / epochs / (1 - G_FRACTION))
            if needed <= len(images.pool):
                break
            epochs += 1
        data = images.draw(min(len(images.pool), max(needed, LEAST)), seed)
        row: dict[str, Any] = {"variant": variant, "data": name, "seed": seed, "spec": spec, "settings": changes}
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(
                data, spec, f"{folder}/run", seed, TimedTrainer, epochs=epochs, m_rounds=rounds,
                warmup_steps=min(WARMUP, steps // 10), **changes,
            )  # fmt: skip
            few = list(images.val.batches(np.arange(min(FEW, len(images.val))), 250))
            trainer.set_up(self.clock, f"{variant}, {name}, seed {seed}", few)
            try:
                model: GLEM | None = trainer.fit()
            except TrainingError as error:
                model, row["failed"] = None, str(error)[:200]
                trainer.measure()  # the seconds until then
            finally:
                trainer.bar.close()
        found = {"val_bits_per_dim": None, "val_accuracy": None}
        if model is not None:
            batches = images.val.batches(np.arange(len(images.val)), 256)
            found = held_out(model, batches, torch.Generator().manual_seed(0))
        forward = count_flops(trainer.model.flow.float(), torch.zeros(1, *images.shape))
        bits = found["val_bits_per_dim"]
        if bits is not None and not math.isfinite(bits):
            bits, row["failed"] = None, "bits/dim is not finite"
        return {
            **row,
            "bits_per_dim": bits,
            "accuracy": found["val_accuracy"] if bits is not None else None,
            "parameters": sum(p.numel() for p in trainer.model.flow.parameters()),
            "flops_per_image": 3 * forward,
            "images_per_second": trainer.step * batch / max(trainer.spent, 1e-9),
            "seconds": trainer.spent,
            "steps": trainer.step,
            "images_seen": trainer.step * batch,
            "curve": trainer.curve,
            "epochs": epochs,
            "images": len(data),
            "wall_seconds": time.perf_counter() - began,
        }


# ---- results ---------------------------------------------------------------------------------------------------------


class Store:
    """``backbones.json``: read before every use, so that two processes may share the work."""

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        self.path, self.conditions = folder / "backbones.json", conditions

    def read(self) -> dict[str, Any]:
        fresh = {"title": TITLE, "conditions": self.conditions, "reference_step_seconds": {}, "rows": []}
        if not self.path.is_file():
            return fresh
        record = json.loads(self.path.read_text(encoding="utf-8"))
        if record["conditions"] != self.conditions:
            raise SystemExit(
                f"backbones: {self.path} was made under {record['conditions']}, this run has {self.conditions}; "
                "give the same options, or another folder with --out"
            )
        return record

    def done(self, variant: str, data: str, seed: int, spec: dict[str, Any]) -> bool:
        """Whether the cell is there, with the settings that the variant has now."""
        wanted = (variant, data, seed, spec, settings_of(variant))
        keys = ("variant", "data", "seed", "spec", "settings")
        return any(tuple(row[key] for key in keys) == wanted for row in self.read()["rows"])

    def add(self, row: dict[str, Any], reference: dict[str, float]) -> None:
        record, key = self.read(), ("variant", "data", "seed")
        record["rows"] = [old for old in record["rows"] if any(old[k] != row[k] for k in key)] + [row]
        record["machine"] = machine()
        record["reference_step_seconds"] = {**reference, **record["reference_step_seconds"]}
        self.write(record)

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Store ``record``, and give it back, with this command, which found the cells that it did not make."""
        command = " ".join(shlex.quote(word) for word in ["benchmarks/speed/backbones.py", *sys.argv[1:]])
        record = {**record, "command": f"python {command}"}
        write_json(self.path, record)
        return record


# ---- the study -------------------------------------------------------------------------------------------------------


def cells(args: Any, study: Study) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Seeds outermost, so that a study cut short has compared all variants."""
    specs: dict[tuple[str, str], dict[str, Any] | None] = {}
    for seed in args.seeds:
        for data in args.data:
            for variant in VARIANTS:
                if not re.search(args.only, variant):
                    continue
                if (variant, data) not in specs:
                    try:
                        specs[variant, data] = flow_spec(variant, study.data(data).shape)
                    except (ValueError, TypeError) as error:
                        specs[variant, data] = None
                        print(f"{data}: {variant} left out: {error}", file=sys.stderr)
                spec = specs[variant, data]
                if spec is not None:
                    yield variant, data, seed, spec


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--data", nargs="+", choices=sorted(DATA), default=["cifar10"])
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    options.add_argument("--seconds", type=float, default=240.0, help="of training per cell (%(default)s)")
    options.add_argument("--only", default="", metavar="PATTERN", help="variants whose name this expression finds")
    options.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the networks (%(default)s)")
    options.add_argument("--images", type=int, default=0, help="use only so many training images, for a quick look")
    options.add_argument("--rounds", type=int, default=5, help="of timing before each cell (%(default)s)")
    options.add_argument("--val", type=int, default=2000, help="held-out images (%(default)s)")
    options.add_argument("--max-minutes", type=float, default=math.inf, help="start no cell that would end later")
    options.add_argument("--list", action="store_true", help="show the cells, their sizes and what is done; do nothing")
    args = options.parse_args()
    if args.seconds <= 0 or args.rounds < 1 or args.val < 1:
        options.error("--seconds, --rounds and --val must be positive")
    torch.set_num_threads(args.threads)
    began, study, walls = time.perf_counter(), Study(args), []
    conditions = {"seconds": args.seconds, "threads": args.threads, "precision": args.precision, "val": args.val}
    if args.images:
        conditions["images"] = args.images
    store = Store(args.out, conditions)
    for variant, data, seed, spec in cells(args, study):
        done = store.done(variant, data, seed, spec)
        if args.list:
            millions = 3 * network_flops(spec) / 1e6
            sizes = ", ".join(f"{key} {spec[key]}" for key in ("depth", "blocks", "width"))
            print(
                f"{'done' if done else '    '} {data}, seed {seed}: {variant:36s} {millions:6.0f} MFLOP/image, {sizes}"
            )
            continue
        if done:
            continue
        expected = max(walls) if walls else 1.2 * args.seconds
        if time.perf_counter() - began + expected > 60 * args.max_minutes:
            print(f"stopped before {variant}, {data}, seed {seed}: --max-minutes; run again to go on", file=sys.stderr)
            break
        reference = dict(store.read()["reference_step_seconds"])
        row = study.cell(variant, data, seed, spec, reference)
        store.add(row, reference)
        walls.append(row["wall_seconds"])
        result = row.get("failed") or f"{row['bits_per_dim']:.3f} bits/dim, {100 * row['accuracy']:.1f} %"
        print(
            f"{data}, seed {seed}, {variant}: {result}; {row['steps']} steps, {row['images_per_second']:.0f} images/s, "
            f"{row['seconds']:.0f} s ({row['wall_seconds']:.0f} s with measuring)",
            file=sys.stderr,
        )
    if args.list:
        return
    record = store.read()
    if record["rows"]:
        record = store.write(record)
        write_table(record, args.out / "backbones.md")
        draw(record, args.out / "backbones.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("backbones: stopped; finished cells are stored, run again to go on") from None
