"""Make docs/moves.png, which shows mixup, adversarial moves and new images of the bundled flow.

Command: python benchmarks/proof/moves_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT
from glem_augment import GLEM, SyntheticDataset, open_data
from glem_augment.evaluation.preview import MIX_SHARES, NOISE_STRENGTHS, Section, _augmentations, compose
from glem_augment.io import save_png


def main() -> None:
    torch.set_num_threads(1)
    model, data = (opened("bundled:fashion-mnist") for opened in (GLEM.from_pretrained, lambda n: open_data(n, "test")))
    mixed, moved = (_augmentations(model, data, 6, policy, 64, 0) for policy in ("mixup", "adversarial"))
    new = SyntheticDataset(model, dict.fromkeys(mixed.rows, 3))
    images = torch.stack(
        [new.images([i for i, y in enumerate(new.targets) if new.classes[y] == row]) for row in mixed.rows]
    )
    parts = [mixed.cells, moved.cells[:, 1:], images.float() / 255]
    gap = torch.ones_like(parts[0][:, :1])
    cells = torch.cat([parts[0], gap, parts[1], gap, parts[2]], 1)
    assert mixed.marked is not None and moved.marked is not None
    none = torch.zeros(len(cells), 1, dtype=torch.bool)
    marked = torch.cat([mixed.marked, none, moved.marked[:, 1:], none.expand(-1, 4)], 1)
    columns = [
        "real",
        *(f"{share:.0%}" for share in MIX_SHARES),
        "partner",
        "",
        *(f"s = {s:g}" for s in NOISE_STRENGTHS),
    ]
    columns += ["", "new", "", ""]
    note = "mixed along the modes of the class, by what is kept; adversarial, by s standard deviations; new images"
    save_png(
        compose("", "", [Section("Six images through the bundled flow", cells, columns, mixed.rows, note, marked)]),
        ROOT / "docs" / "moves.png",
    )


if __name__ == "__main__":
    main()
