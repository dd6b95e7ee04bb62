"""The best class-conditional flow classifier for a fixed budget: NF accuracy against bits/dim and FID.

This goes beyond the paper. All methods train the same flow for the same number of steps. Held-out *training* images
choose settings (`val_accuracy` in the model's record). The numbers shown are on test images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.lab import Fitted, Lab, describe, version_of
from benchmarks.paper.report import numbers_of, row, write_rows
from benchmarks.paper.tables import Cell
from glem_augment import GLEM
from glem_augment.training import TrainConfig

# curve: points of (label, method, changes)
CURVES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "GLEM": [(f"GLEM {w:g}", "glem", dict(kld_weight=w)) for w in (1.0, 3.0, 10.0)],
    "IB-INN": [(f"IB-INN {b:g}", "ib-inn", dict(beta=b)) for b in (0.3, 1.0, 3.0)],
    "FlowGMM": [("FlowGMM", "flowgmm", {})],
    "ULCGM": [("ULCGM", "ulcgm", {})],
    "hybrid": [("hybrid 0.3", "hybrid", {})],
    "hybrid-joint": [(f"hybrid-joint {b:g}", "hybrid-joint", dict(beta=b)) for b in (0.1, 0.3, 1.0)],
    # The default without one of its parts.
    "hybrid-joint, less": [
        ("hybrid-joint 0.3 without label smoothing", "hybrid-joint", dict(label_smoothing=0.0)),
        ("hybrid-joint 0.3 without EMA", "hybrid-joint", dict(averaging="none")),
    ],
    "saturating": [("saturating 0.3", "saturating", dict(kld_weight=0.3))],
}
# These points lie away from the front, or between two points of the same curve, so one seed is enough.
ONCE = ("GLEM 1", "IB-INN 0.3", "saturating 0.3", *(label for label, *_ in CURVES["hybrid-joint, less"]))


def run_pareto(lab: Lab, scale: str, out: Path, seeds: int, command: Callable[[str, int], str]) -> None:
    """Measure all points for `seeds` seeds, or more if they are known, and points of `ONCE` for one seed.

    Then write `pareto.<scale>.json`, `.md` and `.png`.
    """
    rows: list[dict[str, Any]] = []
    lab.learn(numbers_of(out, scale, "pareto"))
    while all(lab.knows(cell, seeds) for role in ("main", "second") for _, cell in _points(role, seeds)):
        seeds += 1
    for role in ("main", "second"):
        data = lab.spec(role).name
        for seed in range(seeds):
            for curve, cell in _points(role, seed):
                new = not lab.knows(cell, seed)
                numbers = lab.measure(cell, seed)
                numbers += lab.numbers(cell, seed, f"averaged {version_of()}", partial(_averaged, lab, cell))
                rows += [{**row("pareto", cell, data, seed, number), "curve": curve} for number in numbers]
                if new:
                    print(f"pareto, seed {seed}, {data}, {cell.label}: {describe(numbers)}", flush=True)
    path = out / f"pareto.{scale}.json"
    write_rows(path, "pareto", lab.scale, rows, command("pareto", seeds))
    plot(rows, path.with_suffix(".png"))


def _points(role: str, seed: int) -> list[tuple[str, Cell]]:
    """The curves and cells that are measured with this seed."""
    return [
        (curve, Cell(label, role, method, ("NF-A", "BPD", "ECE", "FID"), changes, tau=1.0))
        for curve, points in CURVES.items()
        for label, method, changes in points
        if seed == 0 or label not in ONCE
    ]


def _averaged(lab: Lab, cell: Cell, fitted: Fitted) -> dict[str, float]:
    """Accuracy with averaged posteriors, and the held-out accuracy for choosing settings."""
    test = lab.data(cell.data)[1]
    flip = "flip" in lab.scale.flow.get("augment", ())  # otherwise the flow was not trained on mirror images
    posterior = averaged_posterior(fitted.model, test.tensor(), draws=4, flip=flip)
    right = (posterior.argmax(1) == torch.from_numpy(test.targets)).double().mean()
    # Without held-out images, this number comes from training images of the flow.
    own = lab.scale.flow.get("val_fraction", TrainConfig.val_fraction) > 0
    held_out = fitted.model.config.training.get("held_out", {}).get("val_accuracy") if own else None
    result = {"NF-A averaged": 100 * float(right)}
    return result if held_out is None else {**result, "held-out accuracy": 100 * held_out}


@torch.no_grad()
def averaged_posterior(model: GLEM, x: Tensor, draws: int, flip: bool) -> Tensor:
    """Mean of p(y | x + u) over draws of the dequantisation noise u, and over both mirror images with `flip`.

    Probabilities are averaged, because the densities p(x + u | y) differ by many nats. In an average of densities, one
    draw would decide.

    Args:
        x: uint8 [N,C,H,W].

    Returns:
        [N, K] float64 on the CPU.
    """
    g = torch.Generator().manual_seed(0)
    out = []
    for part in x.split(256):
        views = [part, part.flip(3)] if flip else [part]
        scores = [model.gaussians.log_prob(model.encode(view, g)[0]) for view in views for _ in range(draws)]
        out.append(torch.stack(scores).double().softmax(2).mean(0).cpu())
    return torch.cat(out)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against bits/dim (left) and FID (right), a line per curve, a row of panels per data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = list(dict.fromkeys(r["data_set"] for r in rows))
    figure, axes = plt.subplots(len(sets), 2, figsize=(10, 4.2 * len(sets)), squeeze=False)
    for line, data in zip(axes, sets, strict=True):
        for axis, metric in zip(line, ("BPD", "FID"), strict=True):
            for curve in CURVES:
                labels = list(dict.fromkeys(r["method"] for r in rows if r["curve"] == curve))
                points = [(_mean(rows, data, n, metric), _mean(rows, data, n, "NF-A")) for n in labels]
                known = [(x, y) for x, y in points if x is not None and y is not None]
                if known:
                    line_style = "" if curve == "hybrid-joint, less" else "-"  # points, not a curve
                    axis.plot(*zip(*known, strict=True), marker="o", linestyle=line_style, label=curve)
            axis.set(xlabel="bits/dim" if metric == "BPD" else metric, ylabel="NF accuracy, %", title=data)
        line[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _mean(rows: list[dict[str, Any]], data: str, method: str, metric: str) -> float | None:
    found = [r["value"] for r in rows if (r["data_set"], r["method"], r["metric"]) == (data, method, metric)]
    return statistics.mean(found) if found else None
