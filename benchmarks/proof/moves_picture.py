"""Make docs/moves.png: photographs, and the same photographs moved along modes of the pixels, as advised.

    python benchmarks/proof/moves_picture.py

The modes are the main directions in which 1,000 training images of Imagenette vary within their classes, at 64 pixels.
Moves along them are the fast ones, which gave the best networks in `photographs.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, find_images
from glem_augment import GLEM, GLEMAugment, Noise, open_data
from glem_augment.evaluation import spread
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.io import save_png

COLUMNS = {  # strength and seed
    "noise, strength 0.5": (0.5, 1),
    "another draw": (0.5, 2),
    "a third draw": (0.5, 3),
    "strength 1": (1.0, 4),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    known = open_data(find_images("moves_picture.py", "Imagenette", "imagenette128"), image_size=64, channels=3)
    model = GLEM.fit(known.subset(spread(len(known), 1000)), pooled=True)
    data = open_data("bundled:photographs", image_size=128)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    moved = [GLEMAugment(model, Noise(strength), p=1.0, seed=seed)(x, y)[0] for strength, seed in COLUMNS.values()]
    cells = torch.stack([x, *moved], 1)
    save_png(compose("", "", [Section("", cells, ["real", *COLUMNS])]), ROOT / "docs" / "moves.png")


if __name__ == "__main__":
    main()
