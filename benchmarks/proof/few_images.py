"""How well do the classes that `GLEM.fit` estimates recognise images, by the number of images of each class?

    python benchmarks/proof/few_images.py                      # all settings that GLEM_DATA has
    python benchmarks/proof/few_images.py cifar10 --per-class 5 20 --draws 3
    python benchmarks/proof/few_images.py imagenette-64 --per-class 20 50 --flow bundled:tiny-imagenet

For each number of images and each draw of training images the classes are fitted to TAEF2's latents. On the test images
the rows have the accuracy of `predict` in %, the negative log-likelihood in nats per number, and the expected
calibration error of the posterior (15 bins). Draw k takes images by the seed 100 + k. The strengths of the estimate
were chosen on training images of CIFAR-10 and Fashion-MNIST and tried on Tiny ImageNet, Imagenette and pixels.

With --flow the classes are fitted to the latents of a flow behind TAEF2, without public coordinates. All images are
encoded once. Scale and offset of the latents do not matter: the public coordinates take them up.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, find_images, parser
from glem_augment import GLEM, open_data
from glem_augment.classes.classes import Classes
from glem_augment.classes.covariances import to_public
from glem_augment.classes.fit import directions_of_class, fit_classes
from glem_augment.classes.statistics import class_statistics
from glem_augment.codec.published import prior_file
from glem_augment.flows.public import PublicFlow
from glem_augment.io import atomic_write

# Setting: folder of GLEM_DATA, test split, side in pixels, numbers of images of a class.
SETTINGS = {
    "cifar10": ("cifar10", "test", 32, (5, 20, 50, 100, 300, 1000, 5000)),
    "fashion-mnist": ("fashion-mnist", "test", 28, (5, 20, 50, 100, 300, 1000, 6000)),
    "imagenette-64": ("imagenette128", "val", 64, (5, 20, 50, 100, 300)),
    "imagenette-128": ("imagenette128", "val", 128, (5, 20, 50, 100, 300)),
    "pneumoniamnist": ("pneumoniamnist", "test", 28, (5, 20, 50, 100, 300, 1200)),
}
BINS, SEED = 15, 100


@torch.no_grad()
def latents(setting: str, split: str, work: Path | None) -> tuple[Tensor, Tensor, bool]:
    """Latents [n, C, h, w] of all images of a split, their classes, and whether the images are grey."""
    folder, _, side, _ = SETTINGS[setting]
    place = work / f"{setting}-{split}.pt" if work else None
    if place and place.is_file():
        h, y, grey = torch.load(place)
        return h.float(), y, grey
    data = open_data(find_images(Path(__file__).name, setting, folder), split, image_size=side)
    model = GLEM.create("identity", data.image_shape, data.classes, autoencoder="taef2")
    parts = [(model.numbers(x).half(), y) for x, y in data.batches(range(len(data)), 256)]
    h, y = (torch.cat(column) for column in zip(*parts, strict=True))
    if place:
        with atomic_write(place) as file:
            torch.save((h, y, data.image_shape[0] == 1), file)
    return h.float(), y, data.image_shape[0] == 1


def measures(scores: Tensor, y: Tensor, temperature: float, dim: int) -> dict[str, float]:
    """Accuracy in %, nats per number, and expected calibration error of log p(x | y) [n, K]."""
    confidence, best = (scores / temperature).softmax(1).max(1)
    right, bins = (best == y).double(), (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS).double().index_add_(0, bins, right - confidence.double())
    return {
        "accuracy": 100 * float(right.mean()),
        "nats": -float(scores.gather(1, y[:, None]).double().mean()) / dim,
        "ece": float(gap.abs().sum() / len(y)),
    }


@torch.no_grad()
def through(model: GLEM, h: Tensor) -> Tensor:
    """TAEF2's latents as latents of the model's flow, in the same shape."""
    codec: Any = model.codec
    parts = [model.encode_numbers((part - codec.mean) / codec.std)[0].view(part.shape) for part in h.split(256)]
    return torch.cat(parts)


def fitted(h: Tensor, rows: list[Tensor], public: PublicFlow | None) -> Classes:
    """Classes that are estimated from the rows of latents [n, C, h, w] of each class."""
    dim, classes = h[0].numel(), len(rows)

    def of_class(k: int) -> Tensor:
        return to_public(h[rows[k]].flatten(1), public)

    statistics = class_statistics(of_class, range(classes), dim, directions_of_class(classes, dim))
    return fit_classes(statistics, (h.shape[1], h.shape[2], h.shape[3]), 1, public)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(SETTINGS)} (default: all)")
    arguments.add_argument("--per-class", type=int, nargs="+", metavar="N", help="images of a class (default: several)")
    arguments.add_argument("--draws", type=int, default=3, help="draws of training images (%(default)s)")
    arguments.add_argument("--flow", help="the name of a model with a flow in TAEF2's latents")
    arguments.add_argument("--work", type=Path, help="folder in which latents are kept for the next run")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    rows, path = Rows("fit", args.out), prior_file("taef2")
    assert path is not None
    for setting in args.settings or SETTINGS:
        h, y, grey = latents(setting, "train", args.work)
        test, truth, _ = latents(setting, SETTINGS[setting][1], args.work)
        public: PublicFlow | None = None
        if args.flow is None:
            public = PublicFlow.from_file(path, (h.shape[1], h.shape[2], h.shape[3]), grey, torch.ones(h.shape[1]))
        else:
            h, test = (through(GLEM.from_pretrained(args.flow), part) for part in (h, test))
        of_class = [(y == k).nonzero()[:, 0] for k in range(int(y.max()) + 1)]
        for per_class in args.per_class or SETTINGS[setting][3]:
            whole = per_class >= max(map(len, of_class))
            for draw in range(SEED, SEED + (1 if whole else args.draws)):
                g = torch.Generator().manual_seed(draw)
                some = [each[torch.randperm(len(each), generator=g)[:per_class]] for each in of_class]
                found = fitted(h, some, public)
                scores = torch.cat([found.log_prob(part.flatten(1)) for part in test.split(1000)])
                measured = measures(scores, truth, found.temperature, h[0].numel())
                rows.add(setting, f"{args.flow or ''} {per_class:,} per class".strip(), draw, "test", measured)


if __name__ == "__main__":
    main()
