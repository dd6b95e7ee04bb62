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

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, Rows, find_images, parser
from benchmarks.paper.classifier import Classifier, Recipe, train_classifier
from glem_augment import GLEM, SyntheticDataset, open_data
from glem_augment.evaluation import coverage, feature_fid, label_reliability, memorisation_ratio
from glem_augment.evaluation.metrics import spread
from glem_augment.images.dataset import ImageData, images_for

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
        result = {"CNN-A": 100 * accuracy}
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


def subset(setting: str) -> int:
    """How many real images a setting has, 0 for all of them."""
    return int(setting.partition("epochs=")[0].partition("images=")[2] or 0)


def best_settings(rows: Rows, data: str) -> list[tuple[str, str]]:
    """The best setting on the validation images, for every method and source."""
    found: dict[tuple[str, ...], tuple[float, str, str]] = {}
    for arm, split, _, values in rows.arms(data):
        if split == "validation":
            method, _, setting = arm.partition(" ")
            key = (method, *(word for word in setting.split() if not word.startswith("T=")))
            found[key] = max(found.get(key, (0.0, "", "")), (max(values.values()), method, setting))
    return [(method, setting) for _, method, setting in found.values()]


def main() -> None:
    args = parser(__doc__)
    args.add_argument("stage", choices=("search", "final"))
    args.add_argument("--data", nargs="+", default=["fashion-mnist", "cifar10"], help="of ten classes (%(default)s)")
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of `final` (0 1 2)")
    args.add_argument("--cells", nargs="+", help='"method: setting" to measure (default: see above)')
    args.add_argument("--flow", default="bundled:{data}", help="flow of each data set (%(default)s)")
    args.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="folder for samples (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows, search = Rows("samples", args.out), args.stage == "search"
    for data in args.data:
        images = Images(data, args.work, args.flow.format(data=data))
        named = [cell.partition(":") for cell in args.cells or ()]
        cells = [(method.strip(), setting.strip()) for method, _, setting in named] or (
            SEARCH if search else best_settings(rows, data)
        )
        for seed, (method, setting) in itertools.product([SEARCH_SEED] if search else args.seeds, cells):
            measure = partial(images.measure, method, setting, seed, search)
            rows.once(data, f"{method} {setting}".strip(), seed, "validation" if search else "test", measure)


if __name__ == "__main__":
    main()
