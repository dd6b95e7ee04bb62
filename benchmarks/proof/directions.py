"""Do the directions of noise matter? A class's modes, pooled modes and smooth noise, each as strong, in four settings.

    GLEM_DATA=... python benchmarks/proof/directions.py
    GLEM_DATA=... python benchmarks/proof/directions.py --settings fashion-10 --seeds 0 1 2

Images of the settings and seeds of `augmentation/run.py`, and the networks, steps and controls of `photographs.py`,
which has a fifth setting: crop + flip alone; with noise 0.5 along the modes of the class, along pooled modes, and with
smooth noise; and with ColorJitter 0.4, which changes brightness and contrast of grey images. Nothing is chosen. Each
seed draws other training images; all test images are judged. Stored rows are not measured again.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import command as line_of
from benchmarks.common import machine, parser, processors, publish
from benchmarks.proof.augmentation.data import make_task
from benchmarks.proof.augmentation.settings import SETTINGS
from benchmarks.proof.photographs import COPIES, JITTERED, POOLED, SMOOTH, STEPS, fit, fit_pooled, on
from glem_augment import ImageData, Noise
from glem_augment.evaluation.compare import report
from glem_augment.evaluation.intervals import difference
from glem_augment.evaluation.stacks import PLAIN
from glem_augment.evaluation.trainings import Comparison
from glem_augment.io import write_json

NAME = "directions"
NAMES = ("fashion-10", "fashion-50", "cifar10-50", "imagenette32-20")
STACKS = {
    "crop + flip": PLAIN, "class noise": on(PLAIN, Noise(0.5)), "pooled noise": POOLED, "smooth noise": SMOOTH,
    "ColorJitter": JITTERED,
}  # fmt: skip
OVER = ("crop + flip", "pooled noise", "smooth noise", "ColorJitter")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each setting: accuracies, and class noise over each of the other stacks."""
    table = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        found: dict[str, dict[int, float]] = {what: {} for what in STACKS}
        for row in rows:
            if row["setting"] == name:
                found[row["what"]][row["seed"]] = row["accuracy"]
        seeds = [seed for seed in found["crop + flip"] if all(seed in values for values in found.values())]
        lines = report({what: [values[seed] for seed in seeds] for what, values in found.items()})
        line_for = dict(zip(found, lines, strict=True))
        line: dict[str, Any] = {"setting": name, "seeds": len(seeds)}
        line |= {what: line_for[what]["mean"] for what in STACKS}
        for what in OVER:
            points, half = difference(line_for["class noise"], line_for[what])
            line |= {f"class noise over {what}": points, f"+/- ({what})": half}
        table.append(line)
    return table


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--settings", nargs="+", default=NAMES, choices=NAMES)
    args.add_argument("--seeds", nargs="+", type=int, default=[*range(10)], help="at least two (0 to 9)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for name in args.settings:
        for seed in args.seeds:
            left = [what for what in STACKS if (name, seed, what) not in _measured(rows)]
            if not left:
                continue
            setting, task = SETTINGS[name], make_task(SETTINGS[name], seed)
            train, test = (ImageData.from_tensors(*part, task.classes) for part in (task.train, task.test))
            models = {"pixels": partial(fit, rank=setting.per_class - 1)}
            models["pooled"] = partial(fit_pooled, rank=setting.per_class - 1)
            comparison = Comparison(models, STEPS, copies=COPIES)
            for what in left:
                stack = STACKS[what]
                if not comparison.has_moved(stack, train):
                    comparison.moved(stack, train)  # in float32
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # see photographs.py
                    value = comparison.accuracy(stack, train, test, seed)
                row = {"setting": name, "what": what, "seed": seed, "accuracy": value}
                rows.append(row | {"processor": machine()["processor"]})
                write_json(path, rows)
                print(*row.values(), flush=True)
    title = "Noise of one strength along the modes of the class, along pooled modes, and smooth"
    asked = line_of(f"benchmarks/proof/{NAME}.py")
    publish(
        args.out, NAME,
        {"title": title, "command": asked, "measured on": processors(rows), "rows": summary(rows)}, rows,
    )  # fmt: skip


def _measured(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {(row["setting"], row["seed"], row["what"]) for row in rows}


if __name__ == "__main__":
    main()
