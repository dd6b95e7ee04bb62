"""Out-of-distribution detection and memorisation of the flows that `paper.py` trains, one row per number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from benchmarks.paper.lab import Fitted, Lab, version_of
from benchmarks.paper.report import row, write_rows
from benchmarks.paper.tables import Cell
from glem_augment import GLEM, open_data
from glem_augment.evaluation import memorisation_ratio
from glem_augment.evaluation.metrics import spread

FLOWS = (("GLEM 10", "glem"), ("lambda = 0", "lambda0"), ("IB-INN", "ib-inn"), ("hybrid", "hybrid"))
SCORES = ("likelihood", "typicality", "entropy")


def run_trust(lab: Lab, scale: str, out: Path, seeds: int, other: str, command: Callable[[str, int], str]) -> None:
    """Measure every flow on both data sets, then write `trust.<scale>.json` and `.md`.

    Args:
        other: a folder of photographs. Numbers are stored under the folder's name, since paths differ between machines.
    """
    cells = [Cell(label, role, method, ()) for role in ("main", "second") for label, method in FLOWS]
    rows: list[dict[str, Any]] = []
    for cell in cells:
        for seed in range(seeds):
            numbers = []
            for source in ("gaussian", "rfcm"):
                drawn = replace(cell, source=source)
                about = f"memory {source} {version_of(lab.scale.measured, asdict(lab.scale.oracle), seed)}"
                numbers += lab.numbers(drawn, seed, about, partial(_memorisation, lab, drawn, seed))
            about = f"ood {version_of(lab.scale.measured, Path(other).name)}"
            numbers += lab.numbers(cell, seed, about, partial(_detection, lab, cell, other))
            rows += [row("trust", cell, lab.spec(cell.data).name, seed, number) for number in numbers]
    path = out / f"trust.{scale}.json"
    write_rows(path, "trust", rows, command("trust", seeds))


# ---- images that the flow was not trained on -----------------------------------------------------------------------


def outside_images(x: Tensor, kind: str) -> Tensor:
    """Images unlike `x` uint8 [N,C,H,W]: "noise" (uniform pixels), "rotated" (by 90 degrees) or "inverted"."""
    if kind == "noise":
        return torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.rot90(x, 1, (2, 3)).contiguous() if kind == "rotated" else 255 - x


@torch.no_grad()
def ood_scores(model: GLEM, x: Tensor, mean_nll: float = 0.0) -> dict[str, Tensor]:
    """Scores that are higher for images unlike the training data, each [N] float64.

    Args:
        x: uint8 [N,C,H,W]. mean_nll: mean of -log p(x) over training images, in nats.

    Returns:
        `likelihood`: -log p(x), nats, uniform prior over classes. `typicality`: |-log p(x) - mean_nll| (Nalisnick et
        al. 2019, batches of one). `entropy` of the class posterior, nats.
    """
    g = torch.Generator().manual_seed(0)
    scores = torch.cat([model.log_prob_per_class(part, g).double().cpu() for part in x.split(256)])
    likelihood = math.log(scores.shape[1]) - scores.logsumexp(1)
    log_posterior = scores.log_softmax(1)
    entropy = -(log_posterior.exp() * log_posterior).sum(1)
    return {"likelihood": likelihood, "typicality": (likelihood - mean_nll).abs(), "entropy": entropy}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score from `outside` [M] exceeds one from `inside` [N]; ties count half (Mann & Whitney).

    torchmetrics squeezes scores beyond [0, 1] through a sigmoid, which makes likelihoods of thousands of nats equal.
    """
    return float(mannwhitneyu(outside, inside).statistic) / (len(inside) * len(outside))


def _detection(lab: Lab, cell: Cell, other: str, fitted: Fitted) -> dict[str, float]:
    train, test = lab.data(cell.data)
    count = min(len(test), lab.scale.measured)
    training = train.tensor()[torch.from_numpy(spread(len(train), count))]
    mean_nll = float(ood_scores(fitted.model, training)["likelihood"].mean())
    x = test.tensor()[torch.from_numpy(spread(len(test), count))]
    # A rotated photograph is still a photograph, so colour images are compared with noise and other photographs.
    grey = x.shape[1] == 1
    sets = {kind: outside_images(x, kind) for kind in (("noise", "rotated", "inverted") if grey else ("noise",))}
    if not grey:
        crops = open_data(other, "val", image_size=tuple(x.shape[2:]), channels=3, progress=False).tensor()
        sets["other images"] = crops[: len(x)]
    inside = ood_scores(fitted.model, x, mean_nll)
    result = {}
    for name, images in sets.items():
        outside = ood_scores(fitted.model, images, mean_nll)
        for score in SCORES:
            result[f"AUROC {score}, {name}"] = auroc(inside[score], outside[score])
    return result


# ---- memorisation --------------------------------------------------------------------------------------------------


def _memorisation(lab: Lab, cell: Cell, seed: int, fitted: Fitted) -> dict[str, float]:
    """Distances in the oracle's features; for the class Gaussians, the likelihood gap too."""
    train, test = lab.data(cell.data)
    count = min(len(test), len(train), lab.scale.measured)
    some, held = spread(len(train), count), spread(len(test), count)
    samples = lab.samples(fitted, cell, max(1, count // len(train.classes)), seed + 3)[0]
    sets = (samples, train.tensor()[torch.from_numpy(some)], test.tensor()[torch.from_numpy(held)])
    found = memorisation_ratio(*(lab.oracle(cell.data).run(x)[0] for x in sets))
    tail = "" if cell.source == "gaussian" else ", RFCM"
    result = {f"NN distance ratio{tail}": found["ratio"], f"share nearer to train{tail}": found["share_nearer_train"]}
    if cell.source == "gaussian":
        # A flow that has memorised its training images needs fewer bits for them.
        bits = [mean_bits(fitted.model, data.batches(rows, 256)) for data, rows in ((train, some), (test, held))]
        result["train-test gap, bits/dim"] = bits[1] - bits[0]
    return result


@torch.no_grad()
def mean_bits(model: GLEM, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean -log2 p(x|y) per dimension, with dequantisation noise from a fixed seed."""
    g = torch.Generator().manual_seed(0)
    total, images = 0.0, 0
    for x, y in batches:
        total -= float(model.log_prob(x, y, g).double().sum())
        images += len(y)
    return total / (images * model.dim * math.log(2))
