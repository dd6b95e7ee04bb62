"""How well do private models recognise images, beside models without a promise and a private linear layer?

    python benchmarks/proof/private.py                  # all settings; needs GLEM_DATA
    python benchmarks/proof/private.py cifar10 --per-class 100 300 --epsilon 1 --seeds 0 1 2
    python benchmarks/proof/private.py --epsilon 10 1 --picture docs/front.png

A row is one release, with delta = 1e-5 and the mechanism's own noise, which has no seed. The seed draws the private
images from the training images. All rows are accuracies on all real test images, in %.

    predict       the posterior of the private model, `GLEM.predict`: `glem fit --autoencoder taef2 --epsilon E`
    samples       a perceptron on latents of 20,000 samples of this model
    not private   the posterior of `glem fit --autoencoder taef2` of the same images
    linear layer  the opponent: a linear layer of the same latents alone, trained with the same promise

The linear layer sees all images in each step. A step clips the gradient of each image and adds normal noise to their
sum, and T steps are sqrt(T) mu-GDP, which is exact. It takes the public coordinates and weights of
`privacy.coordinates`, and divides latents by their norm. Its trials are judged on every tenth training image, by seed
100, and then trained on the other training images. The best one is measured. The choice costs no privacy here, which
favours this method.

The private model's parts of the budget were chosen on training images of CIFAR-10 and Fashion-MNIST. Stored rows are
not measured again. The images are encoded once; `--work` keeps their latents, which are secret.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, descend, find_images, parser
from benchmarks.proof.few_images import SETTINGS, fitted, latents
from glem_augment import GLEM, GLEMAugment, Mixup, Privacy, SyntheticDataset, open_data
from glem_augment.classes.classes import Classes
from glem_augment.codec.published import prior_file
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.flows.public import PublicFlow
from glem_augment.io import save_png
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.fit import private_classes
from glem_augment.privacy.latents import public_codec

SIZES = {"cifar10": (100, 300, 2000, 5000), "fashion-mnist": (100, 300, 2000, 6000)}  # images of each class
DELTA, SAMPLES, PASSES = 1e-5, 20_000, 8
TRIALS = tuple(itertools.product((10, 30, 100), (4.0, 16.0)))  # steps, and the learning rate, of the linear layer


class Images:
    """Latents of one data set, and what is fitted to some of them.

    Attributes:
        coordinates, public: the public coordinates of releases, and of other fits.
        h, y, judged, truth: latents [n, C, h, w] and labels [n] of the training images and of the test images.
    """

    def __init__(self, data: str, work: Path | None) -> None:
        self.h, self.y, grey = latents(data, "train", work)
        self.judged, self.truth, _ = latents(data, SETTINGS[data][1], work)
        self.classes = int(self.y.max()) + 1
        path = prior_file("taef2")
        assert path is not None
        shape = self.h.shape[1], self.h.shape[2], self.h.shape[3]
        self.coordinates = ReleaseCoordinates(path, shape, grey)
        self.public = PublicFlow.from_file(path, shape, grey, torch.ones(shape[0]))

    def some(self, per_class: int, seed: int, validation: bool = False) -> Tensor:
        """Rows of so many training images of each class; for validation, without every tenth one."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        order = order[order % 10 > 0] if validation else order
        return torch.cat([order[self.y[order] == k][:per_class] for k in range(self.classes)])

    @cached_property
    def released(self) -> tuple[Tensor, Tensor]:
        """The training and the test latents [n, d] in public coordinates."""
        train, test = (torch.cat([self.coordinates(part) for part in h.split(256)]) for h in (self.h, self.judged))
        return train, test

    def private(self, rows: Tensor, epsilon: float) -> Classes:
        promise = Privacy(epsilon, DELTA, images=10**5)
        return private_classes(self.released[0][rows], self.y[rows], self.classes, self.coordinates, promise).classes

    def unprotected(self, rows: Tensor) -> Classes:
        of_class = [rows[self.y[rows] == k] for k in range(self.classes)]
        return fitted(self.h, of_class, self.public)

    def recognised(self, classes: Classes) -> float:
        found = torch.cat([classes.log_prob(part.flatten(1)).argmax(1) for part in self.judged.split(1000)])
        return 100 * float((found == self.truth).double().mean())

    def taught(self, classes: Classes, seed: int) -> float:
        """Percent of test images that a perceptron of samples' latents recognises."""
        y = torch.arange(self.classes).repeat_interleave(SAMPLES // self.classes)
        torch.manual_seed(seed)
        z = classes.sampler("rfcm").sample(y, 1.0, torch.Generator().manual_seed(seed))
        with torch.enable_grad():
            found = perceptron(z, y)(self.judged.flatten(1)).argmax(1)
        return 100 * float((found == self.truth).double().mean())

    def linear(self, rows: Tensor, trial: tuple[int, float], epsilon: float, seed: int, validation: bool) -> float:
        """Percent that a linear layer recognises, which is trained with the promise on the images `rows`."""
        train, test = (F.normalize(u.float() * self.coordinates.weights.float()) for u in self.released)
        judged, truth = (train[::10], self.y[::10]) if validation else (test, self.truth)
        mu = Privacy(epsilon, DELTA, images=10**5).mu
        weight = private_layer(train[rows], self.y[rows], self.classes, trial, mu, seed)
        return 100 * float(((judged @ weight.T).argmax(1) == truth).double().mean())


def perceptron(z: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores of latents by a perceptron that is trained on latents z [n, d] with labels y of all classes."""
    scale = z.std(0).clamp_min(1e-6)
    net = nn.Sequential(nn.Linear(z.shape[1], 512), nn.ReLU(), nn.Linear(512, int(y.max()) + 1))
    rows = (own for _ in range(PASSES) for own in torch.randperm(len(z)).split(128))
    descend(net, ((z[own] / scale, y[own]) for own in rows), torch.optim.Adam(net.parameters(), 1e-3))
    return lambda x: net(x / scale).detach()


def private_layer(x: Tensor, y: Tensor, classes: int, trial: tuple[int, float], mu: float, seed: int) -> Tensor:
    """The weight [K, d] of a linear layer that is mu-GDP: gradients of norm 1, all images in each step, momentum 0.9.

    `x` [n, d] have norm 1. The layer starts at zero.
    """
    steps, rate = trial
    generator = torch.Generator().manual_seed(seed)
    weight, speed = torch.zeros(2, classes, x.shape[1]).unbind()
    for _ in range(steps):
        error = (x @ weight.T).softmax(1) - F.one_hot(y, classes)
        error *= (1 / error.norm(dim=1, keepdim=True)).clamp(max=1)  # of the gradient error x^T of an image, as |x| = 1
        noise = torch.randn(weight.shape, generator=generator) * math.sqrt(steps) / mu
        speed = 0.9 * speed + (error.T @ x + noise) / len(x)
        weight = weight - rate * speed
    return weight


def picture(data: str, epsilons: list[float], work: Path | None) -> Section:
    """Two cells of each class: images of the bundled flow, and below of new private models, a row for each epsilon.

    Real images of Fashion-MNIST and their moves stand above them. CIFAR-10's images have no licence to be shown.
    """
    folder, split, side, _ = SETTINGS[data]
    real = open_data(find_images(Path(__file__).name, data, folder), split, image_size=side)
    y = torch.arange(10).repeat_interleave(2)
    rows: dict[str, Tensor] = {}
    if data == "fashion-mnist":
        first = np.concatenate([np.flatnonzero(real.targets == k)[:2] for k in range(10)])
        rows["real"] = real.subset(first).tensor().float() / 255
        rows["moved"] = GLEMAugment(f"bundled:{data}", Mixup(), p=1.0, seed=0)(rows["real"], y)[0]
    rows["drawn"] = SyntheticDataset(f"bundled:{data}", 2, seed=0).images(range(20)).float() / 255
    images = Images(data, work)
    model = GLEM.create("identity", real.image_shape, real.classes, autoencoder="taef2").eval()
    model.codec = public_codec(model.codec)
    for epsilon in epsilons:
        model.latent_classes = images.private(torch.arange(len(images.y)), epsilon)
        rows[f"private, epsilon {epsilon:g}"] = model.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm").cpu()
    cells = torch.stack([x.expand(-1, 3, -1, -1) for x in rows.values()])
    return Section("Fashion-MNIST" if data == "fashion-mnist" else "CIFAR-10", cells, rows=list(rows))


def measure(
    rows: Rows, data: str, sizes: Sequence[int], epsilons: list[float], seeds: list[int], work: Path | None
) -> None:
    """Add the rows of a data set that are not stored yet."""
    images = Images(data, work)

    def once(setting: str, arm: str, seed: int, found: Callable[[], float], split: str = "test") -> float:
        return rows.once(setting, arm, seed, split, lambda: {"accuracy": found()})["accuracy"]

    for size, seed in itertools.product(sizes, seeds):
        some = images.some(size, seed)
        once(f"{data} images={size}", "not private", seed, lambda: images.recognised(images.unprotected(some)))  # noqa: B023
    for size, epsilon in itertools.product(sizes, epsilons):
        setting = f"{data} images={size} epsilon={epsilon:g} delta={DELTA:g}"
        for seed in seeds:
            some = images.some(size, seed)
            once(setting, "predict", seed, lambda: images.recognised(images.private(some, epsilon)))  # noqa: B023

        def layer(trial: tuple[int, float], split: str, seed: int) -> float:
            held = split == "validation"
            found = partial(images.linear, images.some(size, seed, held), trial, epsilon, seed, held)  # noqa: B023
            return once(setting, f"linear layer(steps={trial[0]},lr={trial[1]:g})", seed, found, split)  # noqa: B023

        best = max(TRIALS, key=lambda trial: layer(trial, "validation", 100))  # noqa: B023
        for seed in seeds:
            layer(best, "test", seed)
    for size, epsilon, seed in itertools.product(sizes, epsilons, seeds):
        setting, some = f"{data} images={size} epsilon={epsilon:g} delta={DELTA:g}", images.some(size, seed)
        once(setting, "samples", seed, lambda: images.taught(images.private(some, epsilon), seed))  # noqa: B023


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", nargs="*", metavar="DATA", help=f"of {', '.join(SIZES)} (default: all)")
    arguments.add_argument("--per-class", type=int, nargs="+", metavar="N", help="images of a class (default: several)")
    arguments.add_argument("--epsilon", nargs="+", type=float, default=[1, 3, 10], help="(%(default)s)")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(%(default)s)")
    arguments.add_argument("--picture", type=Path, help="draw README's picture, and do no more")
    arguments.add_argument("--work", type=Path, help="folder in which latents are kept for the next run")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    if args.picture is not None:
        sections = [picture(data, args.epsilon, args.work) for data in ("fashion-mnist", "cifar10")]
        save_png(compose("", sections), args.picture)
        return
    rows = Rows("private", args.out)
    for data in args.data or SIZES:
        measure(rows, data, args.per_class or SIZES[data], args.epsilon, args.seeds, args.work)


if __name__ == "__main__":
    main()
