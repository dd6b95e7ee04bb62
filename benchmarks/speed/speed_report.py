"""Rows, verdicts and the picture of `speed.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.speed.speed_measure import Times, floor_of, ratios
from glem_augment.io import atomic_write

OURS, PUBLISHED = "glem-augment", "published (MEF)"
REVERSIBLE, COMPILED = f"{OURS} reversible", f"{OURS} compiled"
OPERATIONS = ("train", "encode", "decode")


def rows_of(case: str, batch: int, times: Times, held: dict[str, int]) -> list[dict[str, Any]]:
    """One row per side: median ms, overhead above the fastest floor as a share, images/s and MiB held for a backward.

    Args:
        batch: images per step. held: bytes by side.
    """
    rows = []
    for name in dict.fromkeys(name for name, _ in times):
        row: dict[str, Any] = {"case": case, "side": name}
        for operation in OPERATIONS:
            # The floor of both directions is the networks' forward.
            key = (name, "forward" if name.startswith("floor") and operation != "train" else operation)
            taken = statistics.median(times[key]) if key in times else None
            row[f"{operation} ms"] = taken and 1e3 * taken
            row[f"{operation} images/s"] = taken and batch / taken
            is_flow = taken is not None and not name.startswith("floor")
            row[f"{operation} overhead"] = ratios(times, key, floor_of(times, operation))[0] - 1 if is_flow else None
        row["MiB for backward"] = held[name] / 2**20 if name in held else None
        row["rounds"] = max(len(taken) for (side, _), taken in times.items() if side == name)
        rows.append(row)
    return rows


def verdicts(case: str, times: Times) -> list[dict[str, Any]]:
    """Time ratios with their limits and noise; a difference within the noise is a tie, and counts as met.

    The limits: `mef_tiny` trains at most 40 % and decodes at most 25 % above its networks; no operation takes longer
    than the fastest other library's, nor more than 1 / 1.1 of the published flow's time. They hold for the ordinary
    form, not for the compiled one.
    """
    result = []

    def check(what: str, side: tuple[str, str], other: tuple[str, str], limit: float) -> None:
        ratio, noise = ratios(times, side, other)
        result.append(dict(case=case, what=what, ratio=ratio, noise=noise, limit=limit, met=ratio - noise <= limit))

    if case == "mef_tiny":
        for operation, limit in (("train", 1.4), ("decode", 1.25)):
            check(f"{operation} / its networks", (OURS, operation), floor_of(times, operation), limit)
    for operation in OPERATIONS:
        keys = [key for key in times if key[1] == operation and not key[0].startswith((OURS, "floor"))]
        if keys:
            other = min(keys, key=lambda key: statistics.median(times[key]))
            limit = 1 / 1.1 if other[0] == PUBLISHED else 1.0
            check(f"{operation} / {other[0]}", (OURS, operation), other, limit)
    return result


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the overhead above the floor in training and decoding, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row["side"].startswith("floor")]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    figure, axes = plt.subplots(2, 1, figsize=(max(6.0, 1.4 * len(cases) + 2), 7), sharex=True, layout="constrained")
    for axis, operation in zip(axes, ("train", "decode"), strict=True):
        for index, case in enumerate(cases):
            present = [row for row in rows if row["case"] == case and row[f"{operation} overhead"] is not None]
            width = 0.8 / max(1, len(present))
            for position, row in enumerate(present):
                percent = 100 * row[f"{operation} overhead"]
                height = max(1.0, percent)  # less is noise, and a logarithm needs something above zero
                place = index + (position - (len(present) - 1) / 2) * width
                axis.bar(place, height, 0.92 * width, color=f"C{sides.index(row['side'])}")
                axis.text(place, height, f"{percent:.0f}" if percent >= 1 else "<1", ha="center", va="bottom", size=6)
        axis.set(yscale="log", ylabel=f"{operation}: % above the subnets alone")
        axis.set_ylim(0.8, 1.3 * axis.get_ylim()[1])
        axis.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(range(len(cases)), cases, rotation=20)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{index}") for index in range(len(sides))]
    figure.legend(handles, sides, loc="outside upper center", ncols=4, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
