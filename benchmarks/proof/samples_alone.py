"""The accuracy on real images of classifiers that are trained on samples alone.

    GLEM_DATA=... python benchmarks/proof/samples_alone.py search --data fashion-mnist cifar10
    GLEM_DATA=... python benchmarks/proof/samples_alone.py final --data fashion-mnist cifar10 --seeds 0 1 2
    GLEM_DATA=... python benchmarks/proof/samples_alone.py final --data cifar10 --cells "identity: rfcm rank=256 T=0.8"
    GLEM_DATA=... python benchmarks/proof/samples_alone.py final --data cifar10 --cells "real: images=1000 epochs=30"

A row is one classifier: a ResNet18 with a quarter of the channels that halves the image first, trained on 20,000 images
drawn from the flow. The method "real" trains the classifier for as many steps on all training images. `search` measures
every tenth training image, which "real" then leaves out, with samples of one seed. `final` measures the test images,
with new samples for every seed. Its default settings are the best in `search`, one for each source and its options.
Stored rows are not measured again. Every row with another setting has the command with --cells "METHOD: SETTING", as
the columns say. Imagenette, at 64 pixels, has --data imagenette128 --flow bundled:imagenette with --cells "real:",
"taef2: rfcm rank=full T=1" and "bundled: rfcm T=0.9", as chosen for CIFAR-10.

The controls use the same code: "identity" has Gaussians of the pixels, and "taef2" has Gaussians of an autoencoder's
latents. "taef2: rfcm rank=full" is one full covariance per class.
Rows of "taef2: rfcm rank=128 parts=4" were measured with the stored model of cifar10_gaussians.py, whose modes are in
half precision. A setting is a source of `SyntheticDataset` and
options:

    T=          temperature of the draws, 1 by default
    rank=       modes of rfcm, or "full"; by default the bundled modes, and 64 for the pixels and with parts=
    parts=      Gaussians per class, from groups of its images that k-means finds among their latents
    best=       draw so many times as many samples, and keep the best by the oracle, a classifier of the real images
    labels=     "posterior": of the flow, "oracle": of that classifier, both soft
    x=          so many times 20,000 images, each of them shown less often
    images=     of "real": so many images, equally many of each class, for as many steps
    epochs=     of 20,000 images each, 8 by default; of "real", too; the last option

"taef2: reconstructions" has the real images, encoded and decoded: the upper limit for samples.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, find_images, interval, machine, parser, processors, publish, usage
from benchmarks.paper.classifier import Classifier, Recipe, train_classifier
from examples._quality import coverage, feature_fid, label_reliability, memorisation_ratio
from glem_augment import GLEM, SyntheticDataset, open_data
from glem_augment.evaluation.metrics import spread
from glem_augment.images.dataset import ImageData, images_for
from glem_augment.io import atomic_write, write_json

NAME = "samples_alone"
PER_CLASS, EPOCHS = 2000, 8
SEARCH_SEED, ORACLE_SEED, ORACLE_EPOCHS = 1000, 2000, 16
MEASURED = 5000  # samples, for the quality of a set
AUGMENT: dict[str, tuple[str, ...]] = {"fashion-mnist": ("crop",)}  # all shoes point the same way
FLOW = "bundled"
SEARCH = [
    ("real", ""),
    *(("identity", f"{source} T={t}") for source in ("gaussian", "rfcm rank=full") for t in (0.6, 0.8, 1)),
    *(("taef2", f"rfcm rank=full T={t}") for t in (0.9, 1)),
    *((FLOW, f"rfcm T={t}") for t in (0.8, 0.9, 1)),
]


class Images:
    """The images of one data set, its flows, and their samples, which stay in `work`."""

    def __init__(self, data: str, work: Path, flow: str) -> None:
        self.name, self.work, self.flow_name = data, work / data, flow
        self.flows: dict[tuple[str, str, int], GLEM] = {}
        self.folder = find_images(NAME, data, data)
        self.work.mkdir(parents=True, exist_ok=True)
        model = self.flow(FLOW)
        self.train, self.test = (
            images_for(model, open_data(self.folder, split, image_size=model.image_shape[1]))
            for split in ("train", "test")
        )
        val = np.arange(len(self.train)) % 10 == 9
        self.fit, self.val = (self.train.subset(np.flatnonzero(rows)) for rows in (~val, val))

    def flow(self, method: str, rank: str = "", parts: int = 1) -> GLEM:
        """The bundled flow for these images, or Gaussians of the pixels; `rank` and `parts` as in a setting."""
        key = method, rank, parts
        if key not in self.flows:
            self.flows[key] = self._flow(*key)
        return self.flows[key]

    def _flow(self, method: str, rank: str, parts: int) -> GLEM:
        place = self.work / (f"{method} {rank}" + f" {parts}" * (parts > 1))
        modes = 10**6 if rank == "full" else int(rank or 64)  # no more than there are dimensions
        bundled = GLEM.from_pretrained(self.flow_name)
        if method == FLOW and not rank and parts == 1:
            return bundled
        if not place.is_dir():
            model, train = bundled, self.train
            if method != FLOW:
                autoencoder = None if method == "identity" else method
                model = GLEM.create("identity", bundled.image_shape, bundled.classes, autoencoder=autoencoder)
            if method not in (FLOW, "identity"):  # mirror images are images of the class too, as in the bundled model
                x, y = labelled(train)
                train = ImageData.from_tensors(torch.cat([x, x.flip(3)]), torch.cat([y, y]), train.classes)
            model.adapt(train, rank=modes, parts=parts).save(place)
        return GLEM.from_pretrained(place)

    def oracle(self) -> Classifier:
        """A classifier of the real images, trained for twice as long."""
        path = self.work / "oracle.safetensors"
        if not path.is_file():
            self.classifier(*labelled(self.fit), ORACLE_SEED, ORACLE_EPOCHS).save(path)
        return Classifier.load(path)

    def classifier(self, x: Tensor, y: Tensor, seed: int, epochs: int = EPOCHS) -> Classifier:
        """A classifier that trains on each set of 20,000 images in turn."""
        arch, size = "resnet18_quarter_half", PER_CLASS * 10
        g = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(x), generator=g) for _ in range(-(-epochs * size // len(x)))])
        parts = order.split(size)
        recipe = Recipe(arch=arch, epochs=epochs, augment=AUGMENT.get(self.name, ("flip", "crop")), seed=seed)
        return train_classifier(lambda epoch: (x[parts[epoch]], y[parts[epoch]]), 10, recipe)

    def samples(self, method: str, setting: str, seed: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, C, H, W], and labels int64 [N] or float32 [N, 10], as in the setting."""
        source, *pairs = setting.split()
        if source == "reconstructions":
            return self.reconstructions(method), labelled(self.train)[1]
        options = dict(pair.split("=") for pair in pairs)
        labels, best, sets = options.pop("labels", "hard"), int(options.pop("best", 1)), int(options.pop("x", 1))
        count, parts = PER_CLASS * best * sets, int(options.get("parts", 1))
        drawn = " ".join([source, *(f"{k}={v}" for k, v in options.items())])
        path = self.work / f"{method} {drawn} {count} {seed}.npz"
        if not path.is_file():
            x, z, y = self.draw(method, source, options, count, seed)
            p = self.flow(method, options.get("rank", ""), parts).latent_classes.posterior(z)
            with path.open("wb") as file:
                np.savez(file, x=x.numpy(), y=y.numpy(), p=p.numpy())
        with np.load(path) as file:
            x, y, p = (torch.from_numpy(file[name]) for name in "xyp")
        if best > 1:
            score = self.oracle().run(x)[1].log_softmax(1)[torch.arange(len(y)), y]
            kept = [rows[score[rows].argsort(descending=True)[: PER_CLASS * sets]] for rows in rows_of(y)]
            x, y, p = (values[torch.cat(kept)] for values in (x, y, p))
        if labels == "oracle":
            y = self.oracle().run(x)[1].softmax(1)
        return x, p.float() if labels == "posterior" else y

    @torch.no_grad()
    def reconstructions(self, method: str) -> Tensor:
        """All training images, encoded and decoded by the autoencoder: uint8 [N, C, H, W]."""
        path = self.work / f"{method} reconstructions.npy"
        if not path.is_file():
            model, x = self.flow(method), self.train.tensor()
            parts = [model.codec.decode(model.numbers(part)).clamp(0, 1) for part in x.split(500)]
            np.save(path, (255 * torch.cat(parts)).round().to(torch.uint8).numpy())
        return torch.from_numpy(np.load(path))

    def draw(self, method: str, source: str, options: dict[str, str], n: int, seed: int) -> tuple[Tensor, ...]:
        model = self.flow(method, options.get("rank", ""), int(options.get("parts", 1)))
        real = self.train if source == "mixup" else None
        drawing: dict[str, Any] = dict(seed=seed, temperature=float(options.get("T", 1)), source=source)
        data = SyntheticDataset(model, n, real=real, **drawing)
        return data.images(range(len(data))), data.latents(range(len(data))), torch.tensor(data.targets)

    def measure(self, method: str, setting: str, seed: int, search: bool) -> dict[str, float]:
        """Accuracies in percent, and, for the first seed of a final setting, the quality of the set."""
        judged = self.val if search else self.test
        real = labelled(self.fit if search else self.train)
        count = subset(setting)
        setting, _, epochs = setting.partition("epochs=")
        if method == "real":
            x, y = some(*real, count, seed) if count else real
        else:
            x, y = self.samples(method, setting.strip(), seed)
        found = self.classifier(x, y, seed, int(epochs or EPOCHS))
        accuracy = found.accuracy(*labelled(judged))
        result = {"validation CNN-A" if search else "CNN-A": 100 * accuracy}
        if search or method == "real" or seed or epochs or setting == "reconstructions":
            return result
        rows = torch.from_numpy(spread(len(x), MEASURED))
        x, y = x[rows], self.samples(method, setting.partition(" labels=")[0], seed)[1][rows]
        (features, logits), (reference, _) = (self.oracle().run(images) for images in (x, judged.tensor()[:MEASURED]))
        pixels = [images.flatten(1).float() / 255 for images in (x[::2], self.train.tensor(), judged.tensor())]
        return result | {
            "FID": feature_fid(reference, features),
            "Coverage": 100 * coverage(reference, features, 5)["coverage"],
            "Label reliability": 100 * label_reliability(logits, y),
            "Memorisation ratio": memorisation_ratio(*pixels)["ratio"],
        }


def labelled(images: ImageData) -> tuple[Tensor, Tensor]:
    return images.tensor(), torch.from_numpy(images.targets)


def some(x: Tensor, y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random images, equally many of each class."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.cat([own[torch.randperm(len(own), generator=g)[: count // 10]] for own in rows_of(y)])
    return x[rows], y[rows]


def rows_of(y: Tensor) -> list[Tensor]:
    return [(y == k).nonzero()[:, 0] for k in range(10)]


def as_long(setting: str) -> str:
    """The setting of "real" with as many epochs."""
    return "".join(setting.partition("epochs=")[1:])


def subset(setting: str) -> int:
    """How many real images a setting has, 0 for all of them."""
    return int(setting.removesuffix(as_long(setting)).partition("images=")[2] or 0)


def subsets(table: list[dict[str, Any]], data: str, epochs: str) -> dict[int, dict[str, Any]]:
    """The lines of real subsets with this `epochs=`, smallest first."""
    own = [line for line in table if (line["data"], line["method"]) == (data, "real")]
    lines = {subset(line["setting"]): line for line in own if as_long(line["setting"]) == epochs}
    return {count: lines[count] for count in sorted(lines) if count}


def worth(table: list[dict[str, Any]], data: str, accuracy: float, epochs: str = "") -> str:
    """How many real images teach as much, from measured subsets, between which accuracy is linear in log(images)."""
    points = [(count, line["CNN-A"]) for count, line in subsets(table, data, epochs).items()]
    if not points or accuracy > points[-1][1]:
        return f"over {points[-1][0]:,}" if points else ""
    if accuracy < points[0][1]:
        return f"under {points[0][0]:,}"
    (n, low), (m, high) = next(pair for pair in pairwise(points) if pair[1][1] >= accuracy)
    images = n * (m / n) ** ((accuracy - low) / (high - low))
    return f"{round(images, 2 - len(str(int(images)))):,.0f}"  # two digits: the subsets are few


def best_settings(rows: list[dict[str, Any]], data: str) -> list[tuple[str, str]]:
    """The best setting on the validation images, for every method and source."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        if row["data"] == data and row["metric"] == "validation CNN-A":
            key = (row["method"], *(word for word in row["setting"].split() if not word.startswith("T=")))
            found[key] = max(found.get(key, row), row, key=lambda r: r["value"])
    return [(row["method"], row["setting"]) for row in found.values()]


def summary(rows: list[dict[str, Any]], validation: bool) -> list[dict[str, Any]]:
    """One line for every setting: mean and 95 % interval over seeds, and the share of the accuracy on "real"."""
    metric = "validation CNN-A" if validation else "CNN-A"
    table = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        values: dict[tuple[str, str], list[float]] = {}
        for row in own:
            if row["metric"] == metric:
                values.setdefault((row["method"], row["setting"]), []).append(row["value"])
        for (method, setting), found in values.items():
            real = statistics.mean(values.get(("real", as_long(setting)), [float("nan")]))
            line = {"data": data, "method": method, "setting": setting, "seeds": len(found)}
            line |= {metric: statistics.mean(found), "+/-": interval(found).half if len(found) > 1 else None}
            line |= {"share of real": statistics.mean(found) / real}
            if not validation:
                more = {r["metric"]: r["value"] for r in own if (r["method"], r["setting"]) == (method, setting)}
                names = ("FID", "Coverage", "Label reliability", "Memorisation ratio")
                line |= {name: more.get(name) for name in names}
            table.append(line)
    return table


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The page of the rows."""
    return {
        "title": "Classifiers trained on samples alone",
        "command": usage(__doc__),
        "measured on": processors(rows),
        "rows": summary(rows, False),
        "Settings, on held-out training images": summary(rows, True),
    }


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Accuracies on the test images over the number of real images, and the best samples as lines, for both lengths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [data for data in dict.fromkeys(line["data"] for line in table) if subsets(table, data, "")]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for colour, longer in (("C0", ""), ("C1", "epochs=30")):
            own = [line for line in table if line["data"] == data and as_long(line["setting"]) == longer]
            real = [line for line in own if line["method"] == "real"]
            label = f"{longer.removeprefix('epochs=') or EPOCHS} epochs"
            if found := subsets(table, data, longer):
                accuracies, halves = ([line[key] or 0 for line in found.values()] for key in ("CNN-A", "+/-"))
                axis.errorbar([*found], accuracies, halves, color=colour, marker="o", label=f"{label}: real images")
            drawn = [line["CNN-A"] for line in own if line["method"] == FLOW and " x=" not in line["setting"]]
            everything = [line["CNN-A"] for line in real if line["setting"] == longer]
            for style, heights, what in ((":", everything, "all real"), ("--", drawn, "20,000 samples")):
                if heights:
                    text = f"{label}: {what}, {max(heights):.1f} %"
                    axis.axhline(max(heights), color=colour, linestyle=style, label=text)
        axis.set(title=data, xlabel="real images", ylabel="test accuracy in %", xscale="log")
        axis.minorticks_off()
        axis.set_xticks(ticks := [500, 1000, 2000, 5000, 10_000], [f"{count:,}" for count in ticks])
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("stage", choices=("search", "final"))
    args.add_argument("--data", nargs="+", default=["fashion-mnist", "cifar10"], help="of ten classes (%(default)s)")
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of `final` (0 1 2)")
    args.add_argument("--cells", nargs="+", help='"method: setting" to measure (default: see above)')
    args.add_argument("--flow", default="bundled:{data}", help="flow of each data set (%(default)s)")
    args.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="folder for samples (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    path, search = args.out / f"{NAME}.json", args.stage == "search"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for data in args.data:
        images = Images(data, args.work, args.flow.format(data=data))
        named = [cell.partition(":") for cell in args.cells or ()]
        cells = [(method.strip(), setting.strip()) for method, _, setting in named] or (
            SEARCH if search else best_settings(rows, data)
        )
        for seed in [SEARCH_SEED] if search else args.seeds:
            for method, setting in cells:
                known = {
                    "data": data,
                    "size": images.train.image_shape[1],
                    "method": method,
                    "setting": setting,
                    "seed": seed,
                }
                metric = "validation CNN-A" if search else "CNN-A"
                if any(known.items() | {("metric", metric)} <= row.items() for row in rows):
                    continue
                for name, value in images.measure(method, setting, seed, search).items():
                    rows.append(known | {"metric": name, "value": value, "processor": machine()["processor"]})
                    print(*rows[-1].values(), flush=True)
                write_json(path, rows)
    publish(args.out, NAME, report(rows), rows)
    draw(summary(rows, False), args.out / f"{NAME}.png")


if __name__ == "__main__":
    main()
