"""Make docs/moves.png: photographs, and the same photographs moved along the shared modes of `bundled:photographs`.

Command: python benchmarks/proof/moves_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT
from glem_augment import GLEM, GLEMAugment, open_data
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.io import save_png

MODEL = "bundled:photographs"
COLUMNS: dict[str, dict[str, Any]] = {
    "noise, strength 0.5": dict(policy="noise", strength=0.5, seed=1),
    "another draw": dict(policy="noise", strength=0.5, seed=2),
    "noise, strength 1": dict(policy="noise", strength=1.0, seed=3),
    "mixed with another": dict(policy="mixup", partner="any", labels="hard", seed=4),
}


def main() -> None:
    torch.set_num_threads(1)
    data, model = open_data(MODEL, image_size=128), GLEM.from_pretrained(MODEL)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    moved = [GLEMAugment(model, p=1.0, basis="shared", modes=128, **options)(x, y)[0] for options in COLUMNS.values()]
    cells = torch.stack([x, *moved], 1)
    save_png(compose("", "", [Section("", cells, ["real", *COLUMNS])]), ROOT / "docs" / "moves.png")


if __name__ == "__main__":
    main()
