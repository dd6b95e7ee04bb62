#!/usr/bin/env python3
"""Make the bundled data: the first 100 training and 100 test images of each class of Fashion-MNIST.

    python benchmarks/proof/make_bundled_data.py ROOT

ROOT/FashionMNIST/raw holds the four idx files of Fashion-MNIST (Zalando SE, MIT licence), unpacked. Each split becomes
one lossless PNG of 2800x280 pixels: a row per class, a column per image.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.images.dataset import open_data
from glem_augment.io import atomic_write

PER_CLASS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    target = Path(__file__).resolve().parents[2] / "glem_augment" / "bundled" / "data"
    parser.add_argument("--out", type=Path, default=target)
    args = parser.parse_args()
    for split in ("train", "test"):
        data = open_data(f"torch/fashion_mnist@{args.root}", split)
        images = data.tensor().numpy()[:, 0]
        # The first images of each class in file order, so that there is no selection.
        first = np.stack([images[data.targets == k][:PER_CLASS] for k in range(len(data.classes))])
        rows, columns, height, width = first.shape
        sheet = first.swapaxes(1, 2).reshape(rows * height, columns * width)
        path = args.out / f"fashion-mnist-{split}.png"
        with atomic_write(path) as file:
            Image.fromarray(sheet).save(file, "PNG", optimize=True)
        print(f"{path}: {rows} classes x {columns} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
