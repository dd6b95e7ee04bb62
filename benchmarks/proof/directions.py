"""Do the directions of noise matter? A class's modes, pooled modes and smooth noise, each as strong, in four settings.

    GLEM_DATA=... python benchmarks/proof/directions.py

Images of the settings and seeds of `augmentation/run.py`, and the networks, steps and controls of `photographs.py`,
which has a fifth setting: crop + flip alone; with noise 0.5 along the modes of the class, along pooled modes, and with
smooth noise; and with ColorJitter 0.4, which changes brightness and contrast of grey images. Nothing is chosen. Each
seed draws other training images; all test images are judged. Stored rows are not measured again.
"""

from __future__ import annotations

import itertools
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Interval, Named, Rows, interval, parser, processors, publish, table, usage
from benchmarks.proof.augmentation.data import make_task
from benchmarks.proof.augmentation.named import bold
from benchmarks.proof.augmentation.settings import SETTINGS
from benchmarks.proof.comparison import PLAIN, Comparison, Stack
from benchmarks.proof.photographs import COPIES, JITTERED, POOLED, SMOOTH, STEPS, TUNING, fit, fit_pooled, on
from glem_augment import Noise
from glem_augment.images.dataset import ImageData

NAME = "directions"
NAMES = ("fashion-10", "fashion-50", "cifar10-50", "imagenette32-20")
STACKS = {
    "crop + flip": PLAIN, "class noise": on(PLAIN, Noise(0.5)), "pooled noise": POOLED, "smooth noise": SMOOTH,
    "ColorJitter": JITTERED,
}  # fmt: skip
OVER = ("crop + flip", "pooled noise", "smooth noise", "ColorJitter")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each setting: accuracies, and class noise over each of the other stacks, by seeds that all have."""
    found = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        own: dict[str, dict[int, float]] = {what: {} for what in STACKS}
        for row in rows:
            if row["setting"] == name:
                own[row["what"]][row["seed"]] = row["accuracy"]
        seeds = [seed for seed in own["crop + flip"] if all(seed in values for values in own.values())]
        line: dict[str, Any] = {"setting": name, "seeds": len(seeds)}
        line |= {what: interval(values[seed] for seed in seeds).mean for what, values in own.items()}
        for what in OVER:
            gain = interval(own["class noise"][seed] - own[what][seed] for seed in seeds)
            line |= {f"over {what}": gain.mean, f"+/- ({what})": gain.half}
        found.append(line)
    return found


def page(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The page of the rows; gains are of class noise."""
    title = "Noise of one strength along the modes of the class, along pooled modes, and smooth"
    return {"title": title, "command": usage(__doc__), "measured on": processors(rows), "rows": summary(rows)}


def numbers(rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Named:
    """One table of these settings and of `photographs.py`, which has stored `cells`."""
    what_of = {stack.name: what for what, stack in STACKS.items()}
    photographs = [
        {"setting": "photographs", "what": what_of[cell["stack"]], "seed": cell["seed"], "accuracy": cell["value"]}
        for cell in cells
        if cell["stack"] in what_of and cell["seed"] != TUNING
    ]
    lines = []
    for row in summary(rows + photographs):
        gains = (Interval(row[f"over {what}"], row[f"+/- ({what})"], row["seeds"]) for what in OVER)
        accuracies = (f"{row[what]:.1f} %" for what in STACKS)
        lines.append([f"`{row['setting']}`", *accuracies, *map(bold, gains), str(row["seeds"])])
    head = "crop + flip | class's modes | pooled modes | smooth | ColorJitter | class's modes over crop + flip"
    yield "directions", table(f"setting | {head} | over pooled modes | over smooth | over ColorJitter | seeds", lines)


@lru_cache(1)
def images_of(name: str, seed: int) -> tuple[ImageData, ImageData]:
    """The training images of a seed, and all test images."""
    task = make_task(SETTINGS[name], seed)
    train, test = (ImageData.from_tensors(*part, task.classes) for part in (task.train, task.test))
    return train, test


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--settings", nargs="+", default=NAMES, choices=NAMES)
    args.add_argument("--seeds", nargs="+", type=int, default=[*range(10)], help="at least two (0 to 9)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows(args.out / f"{NAME}.json")
    for name, seed in itertools.product(args.settings, args.seeds):
        most = SETTINGS[name].per_class - 1  # all modes that there are
        models = {"pixels": partial(fit, rank=most), "pooled": partial(fit_pooled, rank=most)}
        comparison = Comparison(models, STEPS, copies=COPIES)
        for what, stack in STACKS.items():

            def measure(what: Stack = stack, name: str = name, at: int = seed, by: Comparison = comparison) -> Any:
                return {"accuracy": by.accuracy(what, *images_of(name, at), at)}

            rows.row({"setting": name, "what": what, "seed": seed}, measure)
    publish(args.out, NAME, page(rows.all()), rows.all())


if __name__ == "__main__":
    main()
