"""Make docs/moves.png: photographs, and the same photographs moved along the shared modes of `bundled:photographs`.

Command: python benchmarks/proof/moves_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT
from glem_augment import GLEM, GLEMAugment, Mixup, Noise, Policy, open_data
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.io import save_png

MODEL = "bundled:photographs"
COLUMNS: dict[str, tuple[Policy, int]] = {  # with the seed
    "noise, strength 0.5": (Noise(0.5, basis="shared"), 1),
    "another draw": (Noise(0.5, basis="shared"), 2),
    "noise, strength 1": (Noise(1.0, basis="shared"), 3),
    "mixed with another": (Mixup(partner="any", basis="shared", labels="hard"), 4),
}


def main() -> None:
    torch.set_num_threads(1)
    data, model = open_data(MODEL, image_size=128), GLEM.from_pretrained(MODEL)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    moved = [GLEMAugment(model, policy, p=1.0, modes=128, seed=seed)(x, y)[0] for policy, seed in COLUMNS.values()]
    cells = torch.stack([x, *moved], 1)
    save_png(compose("", "", [Section("", cells, ["real", *COLUMNS])]), ROOT / "docs" / "moves.png")


if __name__ == "__main__":
    main()
