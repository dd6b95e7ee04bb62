"""Out-of-distribution detection and memorisation of the flows of ``benchmarks/paper/paper.py``, one row per number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.lab import Fitted, Lab, version_of
from benchmarks.paper.report import row, write_rows
from benchmarks.paper.tables import Cell
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


def run_trust(
    lab: Lab, scale: str, out: Path, seeds: int, other: str | None, command: Callable[[str, int], str]
) -> None:
    """Measure every flow on both data sets and write ``trust.<scale>.json`` and ``.md`` once they are whole."""
    cells = [Cell(label, role, method, (), changes) for role in ("main", "second") for label, method, changes in FLOWS]
    while all(lab.has(cell, seeds, _memory(lab, seeds, "gaussian")) for cell in cells):
        seeds += 1
    about = version_of(lab.scale.measured, _identity(other))
    rows: list[dict[str, Any]] = []
    for cell in cells:
        data = lab.spec(cell.data).name
        for seed in range(seeds):
            numbers = []
            for source in ("gaussian", "rfcm"):
                drawn = replace(cell, source=source)
                make = partial(_memorisation, lab, drawn, seed)
                numbers += lab.numbers(drawn, seed, _memory(lab, seed, source), make)
            numbers += lab.numbers(cell, seed, f"ood {about}", partial(_detection, lab, cell, other))
            rows += [row("trust", cell, data, seed, number) for number in numbers]
            print(f"trust, seed {seed}, {data}, {cell.label}", flush=True)
    path = out / f"trust.{scale}.json"
    write_rows(path, "Out-of-distribution detection and memorisation", rows, command("trust", seeds))


def _memory(lab: Lab, seed: int, source: str) -> str:
    return f"memory {source} {version_of(lab.scale.measured, asdict(lab.scale.oracle), seed)}"


def _identity(other: str | None) -> tuple[str, int] | None:
    """A folder's name and how many files it has: paths are other ones on every machine."""
    return None if other is None else (Path(other).name, sum(path.is_file() for path in Path(other).rglob("*")))


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
