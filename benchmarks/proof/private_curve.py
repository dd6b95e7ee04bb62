"""The accuracy of a perceptron on samples' latents of private models, against images per class and epsilon.

    GLEM_DATA=... python benchmarks/proof/private_curve.py --seeds 0 1 2

A row is one release with new noise (which has no seed) of training images of Fashion-MNIST or CIFAR-10, as many of each
class as the row says, drawn by the seed. The perceptron of private.py is trained on 2,000 samples' latents of each
class, and judged on latents of the real test images. The accuracy is the mean over classes. Of the sets of two classes,
the first has a tenth as many images. "all" coordinates is the control: class means of all coordinates, and covariances
of each class, at any size. Latents are computed once and stay in `--work`; they are secret. The numbers of the
mechanism were chosen on held-out training images. Stored rows are not measured again.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, Rows, interval, parser, processors, publish, usage
from benchmarks.proof.private import PER_CLASS, Images, perceptron
from glem_augment.classes import private
from glem_augment.classes.privacy import Privacy
from glem_augment.errors import DataError
from glem_augment.io import atomic_write
from glem_augment.model.private_fit import latents_alone

NAME, DELTA = "private_curve", 1e-5
EPSILONS = 1.0, 3.0, 10.0
CLOTHES, PHOTOGRAPHS = "ten kinds of clothes", "CIFAR-10"
SETS = {  # the data set, and the classes
    CLOTHES: ("fashion-mnist", range(10)),
    "T-shirt and shirt": ("fashion-mnist", (0, 6)),
    PHOTOGRAPHS: ("cifar10", range(10)),
    "cat and dog": ("cifar10", (3, 5)),
}
CELLS = [
    *itertools.product([CLOTHES], (100, 300, 1000, 2000, 6000), EPSILONS, ["chosen"]),
    *itertools.product(["T-shirt and shirt", "cat and dog"], [3000], (1.0, 3.0), ["chosen", "all"]),
    *itertools.product([PHOTOGRAPHS], (300, 2000, 5000), EPSILONS, ["chosen"]),
    *itertools.product([CLOTHES], (100, 300, 1000), (1.0, 3.0), ["all"]),
]
RULES = {"chosen": {"_OWN": private._OWN}, "all": {"_OWN": 0, "_MEAN_NOISE": math.inf}}


def judged(images: Images) -> tuple[Tensor, Tensor]:
    path = images.work / "judged.npz"
    if not path.is_file():
        z, y = latents_alone(images.base, images.judged)
        np.savez(path, z=z.numpy(), y=y.numpy())
    with np.load(path) as file:
        return torch.from_numpy(file["z"]), torch.from_numpy(file["y"])


def accuracy(images: Images, name: str, per_class: int, epsilon: float, coordinates: str, seed: int) -> float | None:
    """Percent, the mean over classes; None: the fit refuses, since everything is noise."""
    z, y = images.latents()
    classes = SETS[name][1]
    counts = [per_class // 10 if len(classes) == 2 and k == classes[0] else per_class for k in classes]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows = [order[y[order] == k][:count] for k, count in zip(classes, counts, strict=True)]
    z, y = z[torch.cat(rows)], torch.arange(len(rows)).repeat_interleave(torch.tensor([len(own) for own in rows]))
    try:
        privacy = Privacy(epsilon, DELTA, images=100_000)
        with mock.patch.multiple(private, **RULES[coordinates]):
            found = private.private_classes(z, y, len(counts), images.prior, images.clip, privacy, None)
    except DataError:
        return None
    torch.manual_seed(seed)
    y = torch.arange(len(counts)).repeat(PER_CLASS)
    z = found.classes.sampler("rfcm").sample(y, 1.0, torch.Generator().manual_seed(seed))
    scores, (x, truth) = perceptron(z, y), judged(images)
    right = [scores(x[truth == k]).argmax(1) == place for place, k in enumerate(classes)]
    return 100 * statistics.mean(float(each.double().mean()) for each in right)


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The page of the rows: means and 95 % intervals."""
    table = []
    columns = ("set", "per class", "epsilon", "coordinates")
    for cell in dict.fromkeys(tuple(row[name] for name in columns) for row in rows):
        key = dict(zip(columns, cell, strict=True))
        values = [row["accuracy"] for row in rows if key.items() <= row.items()]
        good = [value for value in values if value is not None]
        half = interval(good).half if len(good) > 1 else None
        mean = statistics.mean(good) if good else None
        table.append({**key, "seeds": len(values), "refused": len(values) - len(good), "accuracy": mean, "+/-": half})
    order, then = [*SETS], ("per class", "coordinates", "epsilon")
    table.sort(key=lambda line: (order.index(line["set"]), *(line[name] for name in then)))
    title = "A perceptron on samples' latents of private models, by images per class"
    return {"title": title, "command": usage(__doc__), "measured on": processors(rows), "rows": table}


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Accuracies over the number of images of each class, a line for each epsilon, for the two sets of ten classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, 2, sharey=True), (CLOTHES, PHOTOGRAPHS), strict=True):
        for epsilon in EPSILONS:
            cell = {"set": name, "epsilon": epsilon, "coordinates": "chosen"}
            own = [line for line in table if cell.items() <= line.items() and line["accuracy"] is not None]
            x, y, half = ([line[key] or 0 for line in own] for key in ("per class", "accuracy", "+/-"))
            axis.errorbar(x, y, half, marker="o", label=f"ε = {epsilon:g}")
        axis.set(title=name, xlabel="private images of each class", xscale="log")
        axis.minorticks_off()
        ticks = sorted({line["per class"] for line in table if line["set"] == name})
        axis.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on real images in %")
    figure.axes[1].legend(loc="lower right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args.add_argument("--work", type=Path, default=ROOT / "runs" / "private", help="folder for latents (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows, images = Rows(args.out / f"{NAME}.json"), cache(lambda data: Images(data, "latents", args.work, False))
    for cell, seed in itertools.product(CELLS, args.seeds):
        key = dict(zip(("set", "per class", "epsilon", "coordinates"), cell, strict=True)) | {"seed": seed}
        rows.row(key, lambda: {"accuracy": accuracy(images(SETS[cell[0]][0]), *cell, seed)})  # noqa: B023
    publish(args.out, NAME, report(rows.all()), rows.all())
    draw(report(rows.all())["rows"], args.out / f"{NAME}.png")


if __name__ == "__main__":
    main()
