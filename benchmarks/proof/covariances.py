"""How far to shrink class covariances to the pooled covariance, and how many images full covariances need.

    GLEM_DATA=... python benchmarks/proof/covariances.py

TAEF2's latents (512 numbers) of photographs and of CIFAR-10 at 32 pixels. Models without a flow are adapted to more and
more training images, with variances per dimension, and with full covariances that are shrunk by shares from 0 to 1.
Accuracies are of 1,000 (photographs) and 5,000 (CIFAR-10) other training images.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, parser, write_results
from glem_augment import GLEM, open_data
from glem_augment.classes import modes
from glem_augment.classes.fit import fit_classes
from glem_augment.classes.statistics import class_statistics

NAME, SHARES = "covariances", (0.0, 0.2, 0.5, 0.8, 0.9, 1.0)
# Folder: (held-out images, training images per dimension).
DATA = {"imagenette128": (1000, (0.5, 1, 2, 4, 5.8)), "cifar10": (5000, (1, 2, 4, 8, 16, 32, 87))}


def measure(z: Tensor, y: Tensor, held: int, count: int) -> dict[str, Any]:
    """Accuracies in percent on the last `held` latents after adapting to the first `count`."""
    train, labels, classes, dim = z[:count], y[:count], int(y.max()) + 1, z.shape[1]
    others, truth = z[-held:], y[-held:]

    def accuracy(full: bool) -> float:
        statistics = class_statistics(lambda k: train[labels == k], range(classes), dim, 64)
        right = fit_classes(statistics, 64, full=full).log_prob(others).argmax(1) == truth
        return round(100 * float(right.double().mean()), 2)

    row: dict[str, Any] = {"variances": accuracy(False)}
    for share in SHARES:
        with mock.patch.object(modes, "SHRUNK", share):
            try:
                row[f"shrunk by {share:g}"] = accuracy(True)
            except torch.linalg.LinAlgError:
                row[f"shrunk by {share:g}"] = None  # a class covariance or the pooled covariance lacks full rank
    return row


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for folder, (held, per_dimension) in DATA.items():
        data = open_data(find_images(NAME, folder, folder), "train", image_size=32, channels=3)
        order = np.random.default_rng(0).permutation(len(data))
        model = GLEM.create("identity", data.image_shape, data.classes, autoencoder="taef2")
        model.codec.fit(data.some(2048))
        with torch.no_grad():
            z = torch.cat([model.numbers(x.float() / 255).flatten(1) for x in data.tensor()[order].split(500)])
        y = torch.from_numpy(data.targets[order])
        for ratio in per_dimension:
            count = min(round(ratio * z.shape[1]), len(z) - held)
            rows.append({"images": folder, "count": count, "per dimension": ratio, **measure(z, y, held, count)})
            print(*rows[-1].values(), flush=True)
    write_results(args.out, NAME, "Accuracy of class covariances of TAEF2's latents, held-out images, %", rows)


if __name__ == "__main__":
    main()
