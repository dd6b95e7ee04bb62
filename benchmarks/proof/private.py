"""How well do private models recognise images, beside models without a promise and a private linear layer?

    python benchmarks/proof/private.py                  # all settings; needs GLEM_DATA
    python benchmarks/proof/private.py cifar10 --per-class 100 300 --epsilon 1 --seeds 0 1 2

A row is one release, with delta = 1e-5 and the mechanism's own noise, which has no seed. The seed draws the private
images from the training images. All rows are accuracies on all real test images, in %.

    predict       the posterior of the private model, `GLEM.predict`: `glem fit --autoencoder taef2 --epsilon E`
    not private   the posterior of `glem fit --autoencoder taef2` of the same images
    linear layer  the opponent: a linear layer of the same latents alone, trained with the same promise

The linear layer sees all images in each step. A step clips the gradient of each image and adds normal noise to their
sum, and T steps are sqrt(T) mu-GDP, which is exact. It takes the public coordinates and weights of
`privacy.coordinates`, and divides latents by their norm. Its trials are judged on every tenth training image, by seed
100, and then trained on the other training images. The best one is measured. The choice costs no privacy here, which
favours this method.

The private model's parts of the budget were chosen on training images of CIFAR-10 and Fashion-MNIST. PneumoniaMNIST is
of MedMNIST v2 (CC BY 4.0); the measured folder had 1,213 and 1,210 training images, each once. Stored rows are not
measured again. The images are encoded once; `--work` keeps their latents, which are secret.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, parser
from benchmarks.proof.few_images import SETTINGS, fitted, latents
from glem_augment import Privacy
from glem_augment.classes.classes import Classes
from glem_augment.codec.published import prior_file
from glem_augment.flows.public import PublicFlow
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.fit import private_classes

SIZES = {  # images of each class
    "cifar10": (100, 300, 2000, 5000),
    "fashion-mnist": (100, 300, 2000, 6000),
    "pneumoniamnist": (100, 300, 1200),
}
DELTA = 1e-5
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

    def linear(self, rows: Tensor, trial: tuple[int, float], epsilon: float, seed: int, validation: bool) -> float:
        """Percent that a linear layer recognises, which is trained with the promise on the images `rows`."""
        train, test = (F.normalize(u.float() * self.coordinates.weights.float()) for u in self.released)
        judged, truth = (train[::10], self.y[::10]) if validation else (test, self.truth)
        mu = Privacy(epsilon, DELTA, images=10**5).mu
        weight = private_layer(train[rows], self.y[rows], self.classes, trial, mu, seed)
        return 100 * float(((judged @ weight.T).argmax(1) == truth).double().mean())


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


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", nargs="*", metavar="DATA", help=f"of {', '.join(SIZES)} (default: all)")
    arguments.add_argument("--per-class", type=int, nargs="+", metavar="N", help="images of a class (default: several)")
    arguments.add_argument("--epsilon", nargs="+", type=float, default=[1, 3, 10], help="(%(default)s)")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(%(default)s)")
    arguments.add_argument("--work", type=Path, help="folder in which latents are kept for the next run")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("private", args.out)
    for data in args.data or SIZES:
        measure(rows, data, args.per_class or SIZES[data], args.epsilon, args.seeds, args.work)


if __name__ == "__main__":
    main()
