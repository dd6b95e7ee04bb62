#!/usr/bin/env python3
"""Make the data of the setting `notmnist-10`: glyphs of the letters A to J from many fonts, 28x28, grey.

    git clone https://github.com/davidflanagan/notMNIST-to-MNIST
    python benchmarks/proof/make_notmnist.py notMNIST-to-MNIST $GLEM_DATA/notmnist

Reads the two files t10k-*.gz of Yaroslav Bulatov's notMNIST in the layout of MNIST. They hold 10,000 images, some of
them several times. Of each letter, the first 650 different images in file order become training images, and all further
images become test images.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.io import atomic_write

PER_CLASS = 650


def read(file: Path, header: int) -> np.ndarray:
    """The bytes of an idx file after its header."""
    if not file.is_file():
        raise SystemExit(f"make_notmnist: {file} is missing: is this a clone of notMNIST-to-MNIST?")
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz")
    parser.add_argument("out", type=Path, help="the four idx files go to OUT/MNIST/raw")
    args = parser.parse_args()
    images = read(args.source / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read(args.source / "t10k-labels-idx1-ubyte.gz", 8)
    first = np.sort(np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1])
    chosen = np.concatenate([first[labels[first] == letter][:PER_CLASS] for letter in range(10)])
    training = np.isin(first, chosen)
    raw = args.out / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", first[training]), ("t10k", first[~training])):
        parts = {
            "images-idx3": (images[rows], (0x803, len(rows), 28, 28)),
            "labels-idx1": (labels[rows], (0x801, len(rows))),
        }
        for kind, (values, header) in parts.items():
            with atomic_write(raw / f"{name}-{kind}-ubyte") as file:
                file.write(np.array(header, ">u4").tobytes() + values.tobytes())
        print(f"{name}: {len(rows)} images")


if __name__ == "__main__":
    main()
