"""The accuracy on real images of classifiers that are trained on samples alone.

    GLEM_DATA=... python benchmarks/proof/samples_alone.py --data fashion-mnist cifar10
    GLEM_DATA=... python benchmarks/proof/samples_alone.py --data cifar10 --cells "identity: rfcm rank=256 T=0.8"
    GLEM_DATA=... python benchmarks/proof/samples_alone.py --data cifar10 --cells "real: images=1000 epochs=30"

A row is one classifier: a ResNet18 with a quarter of the channels that halves the image first, trained on 20,000 images
drawn from the flow, with new samples for every seed. The method "real" trains the classifier for as many steps on all
training images. With `--validation`, every tenth training image judges, which "real" then leaves out; such rows of one
seed chose the settings. Without --cells, the stored arms are measured, for seeds that have no rows. Imagenette, at 64
pixels, has --data imagenette128 --flow bundled:imagenette and settings as chosen for CIFAR-10.

The controls use the same code: "identity" has Gaussians of the pixels, and "taef2" has Gaussians of an autoencoder's
latents. "taef2: rfcm rank=full" is one full covariance per class.
A setting is a source of `SyntheticDataset` and options:

    T=          temperature of the draws, 1 by default
    rank=       "fit": the classes are estimated by `adapt`; by default the bundled classes, and "fit" without a flow
    x=          so many times 20,000 images, each of them shown less often
    images=     of "real": so many images, equally many of each class, for as many steps
    epochs=     of 20,000 images each, 8 by default; of "real", too; the last option
    judged      instead of training: the share in % of the samples to which a classifier of all real training images,
                trained for 30 epochs with seed 0, gives the class that was asked for; the last option

Stored rows with rank= (a number), parts=, best=, labels=, mixup or reconstructions (the real images, encoded and
decoded), and the quality of sets (FID and others), were measured by the code of commit 309e287.
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
from glem_augment.images.dataset import ImageData, images_for

NAME = "samples_alone"
PER_CLASS, EPOCHS, JUDGE_EPOCHS = 2000, 8, 30
JUDGED = " judged"
AUGMENT: dict[str, tuple[str, ...]] = {"fashion-mnist": ("crop",)}  # all shoes point the same way
FLOW = "bundled"


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

    def flow(self, method: str, rank: str = "") -> GLEM:
        """The bundled flow for these images, or Gaussians of the pixels or of latents; `rank` as in a setting."""
        key = method, rank
        if key not in self.flows:
            self.flows[key] = self._flow(*key)
        return self.flows[key]

    def _flow(self, method: str, rank: str) -> GLEM:
        place = self.work / f"{method} {rank}"
        bundled = GLEM.from_pretrained(self.flow_name)
        if method == FLOW and not rank:
            return bundled
        if not place.is_dir():
            model, train = bundled, self.train
            if method != FLOW:
                autoencoder = None if method == "identity" else method
                model = GLEM.create("identity", bundled.image_shape, bundled.classes, autoencoder=autoencoder)
            if method not in (FLOW, "identity"):  # mirror images are images of the class too, as in the bundled model
                x, y = labelled(train)
                train = ImageData.from_tensors(torch.cat([x, x.flip(3)]), torch.cat([y, y]), train.classes)
            model.adapt(train).save(place)
        return GLEM.from_pretrained(place)

    def classifier(self, x: Tensor, y: Tensor, seed: int, epochs: int = EPOCHS) -> Classifier:
        """A classifier that trains on each set of 20,000 images in turn."""
        arch, size = "resnet18_quarter_half", PER_CLASS * 10
        g = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(x), generator=g) for _ in range(-(-epochs * size // len(x)))])
        parts = order.split(size)
        recipe = Recipe(arch=arch, epochs=epochs, augment=AUGMENT.get(self.name, ("flip", "crop")), seed=seed)
        return train_classifier(lambda epoch: (x[parts[epoch]], y[parts[epoch]]), 10, recipe)

    def judge(self) -> Classifier:
        """A classifier of all real training images, in the folder `work` once it is trained."""
        place = self.work / "judge.safetensors"
        if not place.is_file():
            self.classifier(*labelled(self.train), 0, JUDGE_EPOCHS).save(place)
        return Classifier.load(place)

    def samples(self, method: str, setting: str, seed: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, C, H, W], and labels int64 [N]."""
        source, *pairs = setting.split()
        options = dict(pair.split("=") for pair in pairs)
        count = PER_CLASS * int(options.pop("x", 1))
        drawn = " ".join([source, *(f"{k}={v}" for k, v in options.items())])
        path = self.work / f"{method} {drawn} {count} {seed}.npz"
        if not path.is_file():
            x, y = self.draw(method, source, options, count, seed)
            with path.open("wb") as file:
                np.savez(file, x=x.numpy(), y=y.numpy())
        with np.load(path) as file:
            return torch.from_numpy(file["x"]), torch.from_numpy(file["y"])

    def draw(self, method: str, source: str, options: dict[str, str], n: int, seed: int) -> tuple[Tensor, ...]:
        model = self.flow(method, options.get("rank", ""))
        drawing: dict[str, Any] = dict(seed=seed, temperature=float(options.get("T", 1)), source=source)
        data = SyntheticDataset(model, n, **drawing)
        return data.images(range(len(data))), torch.tensor(data.targets)

    def measure(self, method: str, setting: str, seed: int, search: bool) -> dict[str, float]:
        """Accuracy in percent."""
        judged = self.val if search else self.test
        real = labelled(self.fit if search else self.train)
        count = subset(setting)
        if setting.endswith(JUDGED):
            judge, (x, y) = self.judge(), self.samples(method, setting.removesuffix(JUDGED), seed)
            return {"recognised": 100 * judge.accuracy(x, y), "judge": 100 * judge.accuracy(*labelled(self.test))}
        setting, _, epochs = setting.partition("epochs=")
        if method == "real":
            x, y = some(*real, count, seed) if count else real
        else:
            x, y = self.samples(method, setting.strip(), seed)
        found = self.classifier(x, y, seed, int(epochs or EPOCHS))
        return {"CNN-A": 100 * found.accuracy(*labelled(judged))}


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


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", nargs="+", default=["fashion-mnist", "cifar10"], help="of ten classes (%(default)s)")
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(%(default)s)")
    args.add_argument("--cells", nargs="+", help='"method: setting" to measure (default: see above)')
    args.add_argument("--validation", action="store_true", help="judge held-out training images")
    args.add_argument("--flow", default="bundled:{data}", help="flow of each data set (%(default)s)")
    args.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="folder for samples (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows, split = Rows("samples", args.out), "validation" if args.validation else "test"
    for data in args.data:
        images = Images(data, args.work, args.flow.format(data=data))
        stored = dict.fromkeys(arm for arm, part, *_ in rows.arms(data) if part == split)
        arms = [" ".join(cell.replace(":", " ", 1).split()) for cell in args.cells or ()] or stored
        for seed, arm in itertools.product(args.seeds, arms):
            method, _, setting = arm.partition(" ")
            rows.once(data, arm, seed, split, partial(images.measure, method, setting, seed, args.validation))


if __name__ == "__main__":
    main()
