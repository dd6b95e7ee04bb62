"""Few labels without any network: HOG features with a linear ridge, and label spreading over unlabelled images.

    python benchmarks/proof/no_network.py
    python benchmarks/proof/no_network.py --settings fashion-10 --seeds 0 1 2

Settings, labelled images, validation images, test images and seeds are the same as in `augmentation/run.py`. The ridge
is fitted to the labelled images and their mirror images alone. Label spreading (Zhou et al. 2004, scikit-learn) uses
the other training images without their labels, like the flows called `...-unlabelled`. The prediction for a test image
is the mean of its neighbours. Both methods are tuned on validation images with the tuning seeds, and tested once. In a
long tail, classes are weighted equally. Stored settings are not measured again.

HOG is after Dalal & Triggs (2005), with 18 signed orientations. Cells have 4 pixels, or 8 pixels that overlap by half.
Blocks have 2x2 cells; each block is normalised, clipped at 0.2 and normalised again. Each pixel uses the colour channel
with the steepest gradient. The image at half its size is appended. This form was chosen on the validation images of
fashion-10 and cifar10-50.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import machine, over_seeds, parser, write_results
from benchmarks.proof.augmentation.data import images_of, split_rows, train_rows
from benchmarks.proof.augmentation.settings import FINAL_SEEDS, SETTINGS, TUNING_SEEDS, Setting

NAMES = (
    "fashion-5", "fashion-10", "fashion-20", "fashion-50", "fashion-100", "fashion-long-tail-10", "fashion-5of10-10",
    "cifar10-50", "cifar10-500", "cifar10-5of10-50", "cifar10-long-tail-10", "cifar10-long-tail-100",
    "imagenette32-20", "imagenette32-50", "imagenette32-8of10-50", "notmnist-10", "mnist-10",
)  # fmt: skip
ORIENTATIONS, CUT = 18, 0.2
RIDGE = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# Label spreading: neighbours among the main components of the features, and weight of the neighbours' labels.
NEIGHBOURS, ALPHA, COMPONENTS = (5, 10, 20), (0.5, 0.9, 0.99), 64


def describe(images: Tensor) -> Tensor:
    """HOG features and pixels: uint8 [N,C,H,W] to float32 [N, features]."""
    x = images.float() / 255
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    steepest = (across**2 + down**2).max(1, keepdim=True).indices
    across, down = across.gather(1, steepest), down.gather(1, steepest)
    place = torch.atan2(down, across).remainder(2 * torch.pi) / (2 * torch.pi) * ORIENTATIONS
    share, length = place.frac(), (across**2 + down**2).sqrt()
    bins = torch.zeros(len(x), ORIENTATIONS, *x.shape[2:])
    for step, weight in ((0, 1 - share), (1, share)):
        bins.scatter_add_(1, (place.long() + step) % ORIENTATIONS, length * weight)
    parts = [F.avg_pool2d(x, 2).flatten(1)]
    for cell in (4, 8):
        blocks = F.unfold(F.avg_pool2d(bins, cell, 4), 2)  # [N, 4 * orientations, places]
        blocks = blocks / (blocks.norm(dim=1, keepdim=True) + 0.01)
        parts.append(F.normalize(blocks.clamp(max=CUT), dim=1).flatten(1))
    return torch.cat(parts, 1)


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(part) for part in x.split(1000)])


class Images:
    """The images of a setting, and their nearest neighbours, computed once for all seeds."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.images, self.labels, classes = images_of(setting, "train")
        test, self.test_labels, _ = images_of(setting, "test")
        self.num_classes = len(classes)
        split = split_rows(self.labels, self.num_classes)
        self.val_rows = np.concatenate([held for held, _ in split])
        self.rest_rows = np.sort(np.concatenate([rest for _, rest in split]))
        self.val_labels = self.labels[self.val_rows]
        val = self.images[self.val_rows]
        self.val, self.test = in_parts(describe, val), in_parts(describe, test)
        mean = self.val.mean(0)
        axes = torch.linalg.svd(self.val - mean, full_matrices=False).Vh[:COMPONENTS].T
        base = in_parts(lambda part: (describe(part) - mean) @ axes, self.images[self.rest_rows])
        nearest = max(NEIGHBOURS)
        # Indices in `rest_rows` and distances of the nearest other training images. Each of these images is nearest to
        # itself, so the first is dropped.
        self.near = {
            "rest": tuple(values[:, 1:] for values in _nearest(base, base, nearest + 1)),
            "val": _nearest((self.val - mean) @ axes, base, nearest),
            "test": _nearest((self.test - mean) @ axes, base, nearest),
        }

    def labelled(self, seed: int) -> np.ndarray:
        return train_rows(self.setting, self.labels, self.num_classes, seed)


def _nearest(points: Tensor, base: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and distances [N, count] of the nearest rows of `base`."""
    found = [torch.cdist(part, base).topk(count, largest=False) for part in points.split(1000)]
    return torch.cat([f.indices for f in found]).numpy(), torch.cat([f.values for f in found]).numpy()


def ridge(images: Images, seed: int, strengths: tuple[float, ...], x: Tensor, y: Tensor) -> list[float]:
    """Accuracy on features `x` of a linear ridge that is fitted to the labelled images of a seed, for each strength."""
    rows = images.labelled(seed)
    shown, labels = images.images[rows], images.labels[rows]
    if images.setting.flip:
        shown, labels = torch.cat([shown, shown.flip(-1)]), torch.cat([labels, labels])
    features, target = in_parts(describe, shown), 2.0 * F.one_hot(labels, images.num_classes) - 1
    weight = (1.0 / torch.bincount(labels))[labels][:, None]
    weight = weight / weight.mean()
    mean, middle = (weight * features).mean(0), (weight * target).mean(0)
    features, target = weight.sqrt() * (features - mean), weight.sqrt() * (target - middle)
    kernel, against, found = features @ features.T, (x - mean) @ features.T, []
    for strength in strengths:
        factor = torch.linalg.cholesky(kernel + strength * torch.eye(len(kernel)))
        found.append(_share(against @ torch.cholesky_solve(target, factor) + middle, y))
    return found


def _share(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).double().mean())


def spread(images: Images, seed: int, neighbours: int, alpha: float, part: str, y: Tensor) -> float:
    """Accuracy on `part` after label spreading from the labelled images to the other training images."""
    index, distance = (values[:, :neighbours] for values in images.near["rest"])
    count, width = len(index), distance.mean()
    weight = np.exp(-((distance / width) ** 2)).ravel()
    graph = csr_matrix((weight, (np.repeat(np.arange(count), neighbours), index.ravel())), shape=(count, count))
    graph = graph.maximum(graph.T)
    rows, known = images.labelled(seed), np.full(count, -1)
    known[np.searchsorted(images.rest_rows, rows)] = images.labels.numpy()[rows]
    model = LabelSpreading(kernel=lambda *_: graph, alpha=alpha, max_iter=30, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns before convergence, which thirty steps nearly reach
        model.fit(np.arange(count)[:, None], known)
    shares = model.label_distributions_ / model.label_distributions_.sum(0)  # all classes count equally
    index, distance = (values[:, :neighbours] for values in images.near[part])
    weight = np.exp(-((distance / width) ** 2))[..., None]
    return _share(torch.from_numpy((shares[index] * weight).sum(1)), y)


def run(setting: Setting, seeds: list[int]) -> list[dict[str, Any]]:
    """Tune both methods on validation images; a row of test accuracy for every method and seed."""
    images, rows = Images(setting), []
    facts = dict(images=len(images.labelled(0)), measured_on=len(images.test), processor=machine()["processor"])

    def add(method: str, params: dict[str, float], chosen_by: float, measured: Callable[[int], float]) -> None:
        for seed in seeds:
            began = time.process_time()
            row = dict(setting=setting.name, method=method, params=params, seed=seed, accuracy=measured(seed))
            rows.append({**row, "val_accuracy": chosen_by, "seconds": time.process_time() - began, **facts})

    tried = [ridge(images, seed, RIDGE, images.val, images.val_labels) for seed in TUNING_SEEDS]
    means = [statistics.mean(values) for values in zip(*tried, strict=True)]
    best = RIDGE[means.index(max(means))]
    on_test = (images.test, images.test_labels)
    add("hog-ridge", {"strength": best}, max(means), lambda seed: ridge(images, seed, (best,), *on_test)[0])

    trials = {
        key: statistics.mean(spread(images, seed, *key, "val", images.val_labels) for seed in TUNING_SEEDS)
        for key in itertools.product(NEIGHBOURS, ALPHA)
    }
    key = max(trials, key=trials.__getitem__)
    params = {"neighbours": key[0], "alpha": key[1]}
    add("label-spreading", params, trials[key], lambda seed: spread(images, seed, *key, "test", images.test_labels))
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each setting and method."""
    return over_seeds([row | {"tuned": str(row["params"])} for row in rows], "setting", "method", "tuned")


def store(rows: list[dict[str, Any]], out: Path, show: bool) -> None:
    """Write the rows and their table."""
    write_results(out, "no_network", "Few labels without a network", summary(rows), {"measured": rows}, show=show)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(NAMES), metavar="SETTING")
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="(%(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "no_network.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["measured"] if path.is_file() else []
    for name in args.settings:
        if not set(args.seeds) <= {row["seed"] for row in rows if row["setting"] == name}:
            rows = [row for row in rows if row["setting"] != name] + run(SETTINGS[name], args.seeds)
            store(rows, args.out, show=False)
    store(rows, args.out, show=True)


if __name__ == "__main__":
    main()
