"""Out-of-distribution detection and memorisation of the flows of ``benchmarks/paper.py``, one row per number."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_lab import Fitted, Lab, version_of
from paper_report import row, write_rows
from paper_tables import Cell
from torch import Tensor

from glem_augment import open_data
from glem_augment.evaluation import auroc, likelihood_gap, memorisation_ratio, ood_images, ood_scores

FLOWS = (
    ("GLEM 10", "glem", {}),
    ("lambda = 0", "lambda0", {}),
    ("IB-INN", "ib-inn", {}),
    ("hybrid", "hybrid", {}),
)
SCORES = ("likelihood", "typicality", "entropy")


def _outside(x: Tensor, role: str, other: str | None) -> dict[str, Tensor]:
    """Sets of images that are not the data's: noise, rotated and inverted ones for grey data, noise and the crops of
    ``other`` for colour (a turned photograph is still one)."""
    kinds = ("noise", "rotated", "inverted") if x.shape[1] == 1 else ("noise",)
    sets = {kind: ood_images(x, kind) for kind in kinds if kind != "rotated" or x.shape[2] == x.shape[3]}
    if other is not None and x.shape[1] == 3:
        crops = open_data(other, "val", image_size=tuple(x.shape[2:]), channels=3, progress=False).tensor()
        if crops is not None:
            sets["other images"] = crops[: len(x)]
    return sets


def run_trust(lab: Lab, scale: str, out: Path, seeds: int, other: str | None, command: str) -> None:
    """Measure every flow on both data sets and write ``trust.<scale>.json`` and ``.md`` after each."""
    rows: list[dict[str, Any]] = []
    for role in ("main", "second"):
        data = lab.spec(role).name
        for seed in range(seeds):
            for label, method, changes in FLOWS:
                cell = Cell(label, role, method, (), changes)
                numbers = []
                for source in ("gaussian", "rfcm"):
                    drawn = Cell(label, role, method, (), changes, source=source)
                    about = version_of(lab.scale.measured, asdict(lab.scale.oracle), seed)
                    make = partial(_memorisation, lab, drawn, seed)
                    numbers += lab.numbers(drawn, seed, f"memory {source} {about}", make)
                about = version_of(lab.scale.measured, other and Path(other).name)
                numbers += lab.numbers(cell, seed, f"ood {about}", partial(_detection, lab, cell, other))
                rows += [row("trust", cell, data, seed, number) for number in numbers]
                write_rows(out / f"trust.{scale}.json", "Out-of-distribution detection and memorisation", rows, command)
                print(f"trust, seed {seed}, {data}, {label}", flush=True)


def _detection(lab: Lab, cell: Cell, other: str | None, fitted: Fitted) -> dict[str, float]:
    model = fitted.model
    train, test = lab.data(cell.data)
    count = min(len(test), lab.scale.measured)
    rows = (torch.arange(count) * len(test)) // count
    some = (torch.arange(count) * len(train)) // count
    mean_nll = float(ood_scores(model, train.tensor()[some])["likelihood"].mean())
    x = test.tensor()[rows]
    inside = ood_scores(model, x, mean_nll)
    result = {}
    for name, images in _outside(x, cell.data, other).items():
        outside = ood_scores(model, images, mean_nll)
        for score in SCORES:
            result[f"AUROC {score}, {name}"] = auroc(inside[score], outside[score])
    return result


def _memorisation(lab: Lab, cell: Cell, seed: int, fitted: Fitted) -> dict[str, float]:
    """In the oracle's features; and, once, the likelihood gap."""
    train, test = lab.data(cell.data)
    count = min(len(test), len(train), lab.scale.measured)
    pick = (torch.arange(count) * len(train)) // count
    held = (torch.arange(count) * len(test)) // count
    oracle = lab.oracle(cell.data)
    samples, _ = lab.samples(fitted, cell, max(1, count // len(train.classes)), seed + 3)
    sets = [oracle.run(x)[0] for x in (samples, train.tensor()[pick], test.tensor()[held])]
    found = memorisation_ratio(*sets)
    tail = "" if cell.source == "gaussian" else ", RFCM"
    result = {
        f"NN distance ratio{tail}": found["ratio"],
        f"share nearer to train{tail}": found["share_nearer_train"],
    }
    if cell.source == "gaussian":
        parts = [data.batches(rows.numpy(), 256) for data, rows in ((train, pick), (test, held))]
        gap = likelihood_gap(fitted.model, *parts)
        result |= {"train-test gap, bits/dim": gap["gap"]}
    return result
