"""The accuracy on real images of classifiers that are trained on samples of private models alone.

    GLEM_DATA=... python benchmarks/proof/private.py --method taef2 latents
    GLEM_DATA=... python benchmarks/proof/private.py --method latents --data cifar10 --delta 1.8e-6
    GLEM_DATA=... python benchmarks/proof/private.py --method latents --cells 1 --epsilon 1 10
    GLEM_DATA=... python benchmarks/proof/private.py --method latents --images 300 2000 --epsilon 1 3 10 --seeds 0 1 2
    GLEM_DATA=... python benchmarks/proof/private.py --method real --images 300 2000 --epsilon 0 --seeds 0 1 2
    GLEM_DATA=... python benchmarks/proof/private.py --data fashion-mnist --epsilon 0 --cells 32 --seeds 0 1 2

A row is one release with new noise (which has no seed), 20,000 new samples, and a new classifier, the small ResNet of
samples_alone.py, judged on all real test images. Latents are computed once and stay in `--work`; they are secret, and
the releases are made from them as `GLEM.fit(..., privacy=...)` makes them. Stored rows are not measured again.

    taef2       latents of TAEF2 in the bundled coordinates: `glem fit --autoencoder taef2 --epsilon E`
    pixels      the same releases of the pixels, with the bundled photographs as public images: the control
    latents     the same releases as taef2, but a perceptron on latents in place of decoded images and the ResNet
    real        the same perceptron on latents of the real images, for as many steps: with --epsilon 0
    long        the same releases as taef2, but 60,000 samples for 30 epochs in place of 20,000 for 8

Epsilon 0 stands for no privacy: the classes of `glem fit --autoencoder taef2 --rank 512`. Of the real images,
samples_alone.py has the accuracy. With --images, so many training images of each class, drawn by the seed, are the
private (or real) ones; only latents and real have it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.classes.privacy import Privacy
from glem_augment.classes.private import private_classes
from glem_augment.model.private_fit import latents_alone, set_coordinates

from benchmarks.common import ROOT, Rows, descend, find_images, parser
from benchmarks.paper.classifier import Classifier, Recipe, train_classifier
from glem_augment import GLEM, GLEMAugment, Mixup, SyntheticDataset, open_data
from glem_augment.errors import DataError
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.images.dataset import ImageData
from glem_augment.io import save_png

NAME = "private"
AUGMENT: dict[str, tuple[str, ...]] = {"fashion-mnist": ("crop",)}  # all shoes point the same way
METHODS = ("taef2", "pixels", "latents", "real", "long")
PER_CLASS, EPOCHS = 2000, 8
LONG_PER_CLASS, LONG_EPOCHS = 6000, 30


@cache
@torch.no_grad()
def encoded(model: GLEM, images: ImageData) -> Tensor:
    """Latents [N, d] of images, in the coordinates of a model."""
    return torch.cat([model.encode(part)[0] for part in images.tensor().split(256)])


class Images:
    """The images of one data set and their latents, which stay in `work`."""

    def __init__(self, data: str, method: str, work: Path) -> None:
        self.name, self.method = data, method
        self.per_class, self.epochs = (LONG_PER_CLASS, LONG_EPOCHS) if method == "long" else (PER_CLASS, EPOCHS)
        folder = find_images(NAME, data, data)
        train, self.judged = open_data(folder, "train"), open_data(folder, "test")
        self.train = train
        self.autoencoder = None if method == "pixels" else "taef2"
        self.base = GLEM.create(
            "stationary", train.image_shape, train.classes, train.class_ids, autoencoder=self.autoencoder
        ).eval()
        self.unprotected: dict[int | None, GLEM] = {}  # by cells
        public = None
        if method == "pixels":
            whole = open_data("bundled:photographs", channels=train.image_shape[0]).tensor()
            tiles = whole.unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            x = F.interpolate(tiles.float(), train.image_shape[1:], mode="bilinear", antialias=True)
            public = ImageData.from_tensors(x.round().to(torch.uint8), torch.zeros(len(x)).long(), ["image"])
        self.prior, self.clip = set_coordinates(self.base, public)
        self.work = work / f"{data} {self.autoencoder or method}"
        self.work.mkdir(parents=True, exist_ok=True)

    def latents(self, count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Latents [N, d] and labels [N] of the private images, in public coordinates; `count`: so many of each class,
        drawn by the seed."""
        path = self.work / "latents.npz"
        if not path.is_file():
            z, y = latents_alone(self.base, self.train)
            with path.open("wb") as file:
                np.savez(file, z=z.numpy(), y=y.numpy())
        with np.load(path) as file:
            z, y = torch.from_numpy(file["z"]), torch.from_numpy(file["y"])
        if count is None:
            return z, y
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[y[order] == k][:count] for k in range(10)])
        return z[rows], y[rows]

    def model(
        self, epsilon: float, delta: float, cells: int | None, count: int | None = None, seed: int = 0
    ) -> tuple[GLEM, dict[str, float]]:
        """A new private model of all images, or of `count` of each class, and facts of its release.

        Raises:
            DataError: the fit refuses, since everything would be noise.
        """
        if self.method == "real":
            return self.base, {}
        if not epsilon:
            if cells not in self.unprotected:
                found = GLEM.fit(self.train, self.autoencoder, rank=10**4)
                self.unprotected[cells] = found
            return self.unprotected[cells], {}
        z, y = self.latents(count, seed)
        found = private_classes(z, y, 10, self.prior, self.clip, Privacy(epsilon, delta, images=len(y)), cells)
        self.base.latent_classes = found.classes
        assert self.base.modes is not None
        return self.base, {"cells": self.base.modes.parts}

    def accuracy(self, model: GLEM, seed: int, count: int | None = None) -> float:
        """Percent of real images that a classifier of samples recognises."""
        if self.method in ("latents", "real"):
            return self.perceptron(model, seed, count)
        data = SyntheticDataset(model, self.per_class, seed=seed, source="rfcm")
        found = self.classifier(data.images(range(len(data))), torch.tensor(data.targets), seed)
        return 100 * found.accuracy(self.judged.tensor(), torch.from_numpy(self.judged.targets))

    def perceptron(self, model: GLEM, seed: int, count: int | None) -> float:
        """Percent of real images that a perceptron of latents recognises: of samples, or of the real images."""
        torch.manual_seed(seed)
        y = torch.arange(10).repeat(PER_CLASS)
        if self.method == "real":
            z, y = self.latents(count, seed)
        else:
            z = model.sample_latents(y, 1.0, torch.Generator().manual_seed(seed), "rfcm")
        found = perceptron(z, y)(encoded(model, self.judged)).argmax(1)
        return 100 * float((found == torch.from_numpy(self.judged.targets)).double().mean())

    def classifier(self, x: Tensor, y: Tensor, seed: int) -> Classifier:
        """The small ResNet, trained on images x uint8 with labels y."""
        augment = AUGMENT.get(self.name, ("flip", "crop"))
        recipe = Recipe(arch="resnet18_quarter_half", epochs=self.epochs, augment=augment, seed=seed)
        return train_classifier(lambda epoch: (x, y), 10, recipe)


def perceptron(z: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores of latents by a perceptron that is trained on latents z [n, d] with labels y of all classes.

    Few latents are shown several times, so that every perceptron has the same steps.
    """
    classes, scale = int(y.max()) + 1, z.std(0).clamp_min(1e-6)
    net = nn.Sequential(nn.Linear(z.shape[1], 512), nn.ReLU(), nn.Linear(512, classes))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    total = classes * PER_CLASS
    passes = (torch.cat([torch.randperm(len(z)) for _ in range(-(-total // len(z)))]) for _ in range(EPOCHS))
    rows = (own for order in passes for own in order[:total].split(128))
    descend(net, ((z[own] / scale, y[own]) for own in rows), optimizer)
    return lambda z: net(z / scale)


def draw(images: Images, epsilons: list[float], delta: float) -> Section:
    """Two cells of each class: images of the bundled flow, and below of new private models, a row for each epsilon.

    Real images of Fashion-MNIST and their moves stand above them. CIFAR-10's images have no licence to be shown.
    """
    y = torch.arange(10).repeat_interleave(2)
    rows: dict[str, Tensor] = {}
    if images.name == "fashion-mnist":
        first = np.concatenate([np.flatnonzero(images.judged.targets == k)[:2] for k in range(10)])
        rows["real"] = images.judged.subset(first).tensor().float() / 255
        rows["moved"] = GLEMAugment(f"bundled:{images.name}", Mixup(), p=1.0, seed=0)(rows["real"], y)[0]
    drawn = SyntheticDataset(f"bundled:{images.name}", 2, seed=0)
    rows["drawn"] = drawn.images(range(20)).float() / 255
    for epsilon in epsilons:
        model = images.model(epsilon, delta, None)[0]
        name = f"private, epsilon {epsilon:g}" if epsilon else "no privacy"
        rows[name] = model.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm").cpu()
    cells = torch.stack([x.expand(-1, 3, -1, -1) for x in rows.values()])
    return Section("Fashion-MNIST" if images.name == "fashion-mnist" else "CIFAR-10", cells, rows=list(rows))


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", nargs="+", default=["fashion-mnist", "cifar10"], help="of ten classes (%(default)s)")
    args.add_argument("--method", nargs="+", default=["taef2"], choices=METHODS)
    args.add_argument("--epsilon", nargs="+", type=float, default=[0.2, 1, 3, 10], help="0: no privacy (%(default)s)")
    args.add_argument("--delta", type=float, default=1e-5)
    args.add_argument("--cells", type=int, help="Gaussians per class (default: as many as the noise allows)")
    args.add_argument("--images", nargs="+", type=int, default=[None], help="private images of each class (all)")
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args.add_argument("--picture", type=Path, help="draw README's picture, and do no more")
    args.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="folder for latents (%(default)s)")
    args = args.parse_args()
    if "real" in args.method and any(args.epsilon):
        raise SystemExit("private: real images keep no promise: give --epsilon 0 with --method real")
    if args.images != [None] and not {"latents", "real"} >= set(args.method):
        raise SystemExit("private: --images goes with --method latents or real")
    torch.set_num_threads(args.threads)
    rows, sections = Rows(NAME, args.out), list[Section]()
    for data, method in itertools.product(args.data, args.method):
        images = Images(data, method, args.work)
        if args.picture is not None:
            sections.append(draw(images, args.epsilon, args.delta))
            continue
        for count, seed, epsilon in itertools.product(args.images, args.seeds, args.epsilon):

            def measure(images: Images = images, count: Any = count, seed: int = seed, epsilon: float = epsilon) -> Any:
                try:
                    model, facts = images.model(epsilon, args.delta, args.cells, count, seed)
                except DataError:
                    return {"refused": 1}
                return {"accuracy": images.accuracy(model, seed, count), **facts}

            promise = "" if method == "real" else f" epsilon={epsilon:g} delta={args.delta:g}"
            setting = data + promise + (f" images={count}" if count else "")
            rows.once(setting, method + (f" cells={args.cells}" if args.cells else ""), seed, "test", measure)
    if args.picture is not None:
        save_png(compose("", sections), args.picture)


if __name__ == "__main__":
    main()
