"""Rows, verdicts and the picture of ``speed.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.speed_measure import Draws, Times, draws, half_width, overhead
from glem_augment.io import atomic_write

OURS, PUBLISHED = "glem-augment", "published (MEF)"
REVERSIBLE, COMPILED = f"{OURS} reversible", f"{OURS} compiled"
OPERATIONS = ("train", "encode", "decode")

# By case, side and operation.
Drawn = dict[tuple[str, str, str], Draws]


def rows_of(case: str, batch: int, times: Times, held: dict[str, int]) -> list[dict[str, Any]]:
    """One row per side: medians in ms, overheads as shares, images/s and MiB held; None where there is no such thing.

    Args:
        case: its name.
        batch: images per step.
        times: from ``measure``.
        held: bytes held for the backward, by side.
    """
    rows = []
    for name in dict.fromkeys(name for name, _ in times):
        row: dict[str, Any] = {"case": case, "side": name}
        is_floor = name.startswith("floor")
        for operation in OPERATIONS:
            # The floor of both directions is the networks' forward.
            kind = "forward" if is_floor and operation != "train" else operation
            taken = times.get((name, kind))
            row[f"{operation} ms"] = None if taken is None else statistics.median(taken) * 1e3
            row[f"{operation} overhead"] = None if is_floor else overhead(times, name, operation)
        for operation in ("train", "encode", "decode"):
            taken_ms = row[f"{operation} ms"]
            row[f"{operation} images/s"] = None if taken_ms is None else batch / taken_ms * 1e3
        row["MiB for backward"] = held[name] / 2**20 if name in held else None
        row["rounds"] = max(len(taken) for (side, _), taken in times.items() if side == name)
        rows.append(row)
    return rows


def drawn_from(case: str, times: Times) -> Drawn:
    """What ``verdicts`` takes the noise from."""
    found = {(case, name, what): draws(times, name, what) for name, what in times if not name.startswith("floor")}
    return {key: each for key, each in found.items() if each is not None}


def verdicts(
    rows: list[dict[str, Any]], growth: Sequence[dict[str, Any]] = (), drawn: Drawn | None = None
) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached: dicts with case, what, value, limit, noise and met.

    Value and limit are both measured, where the limit is a share of another's overhead; noise is half the width of the
    95 % interval of their difference, for the side that was the best in this run. Where they are closer than that,
    another run may find otherwise.

    Overhead above the floor: training at most 15 % (a level of ``mef_cifar``) and 40 % (``mef_tiny``), decoding 20 %;
    at most a third of the published flow's, with no step slower; at most half of the best library's. Reversible
    training: at most 1.5 times the time, and 1.3 times the memory at four times the depth. This library's ordinary form
    is judged; the compiled one only against the limits above the floor, in lines of its own.

    Args:
        rows: from ``rows_of``.
        growth: from ``memory_growth``.
        drawn: from ``drawn_from`` of every case.
    """
    result: list[dict[str, Any]] = []

    def check(
        case: str,
        what: str,
        value: float | None,
        limit: float,
        sides: Sequence[tuple[str, str]] = (),
        apart: Callable[..., np.ndarray] = lambda ours: ours.overhead,
    ) -> None:
        """sides: and operations, whose noise it is; apart: value - limit, but for a constant, from their draws."""
        if value is not None:
            found = [(drawn or {}).get((case, *side)) for side in sides]
            noise = half_width(apart(*found)) if found and None not in found else None
            result.append(
                {"case": case, "what": what, "value": value, "limit": limit, "noise": noise, "met": value <= limit}
            )

    for case in dict.fromkeys(row["case"] for row in rows):
        mine = {row["side"]: row for row in rows if row["case"] == case}
        ours, others = mine[OURS], [row for name, row in mine.items() if not name.startswith((OURS, "floor"))]
        if case.startswith("mef"):
            for name, suffix in ((OURS, ""), (COMPILED, ", compiled")):
                if name in mine:
                    limit = 0.4 if case == "mef_tiny" else 0.15
                    check(case, f"train overhead{suffix}", mine[name]["train overhead"], limit, [(name, "train")])
                    check(case, f"decode overhead{suffix}", mine[name]["decode overhead"], 0.2, [(name, "decode")])
        if REVERSIBLE in mine:
            ratio, both = mine[REVERSIBLE]["train ms"] / ours["train ms"], [(REVERSIBLE, "train"), (OURS, "train")]
            check(case, "reversible step / ordinary step", ratio, 1.5, both, _quotient)
        share, rival = (
            (1 / 3, f"1/3 of {PUBLISHED}") if case.startswith("mef") else (1 / 2, "1/2 of the best library's")
        )
        for operation in OPERATIONS if others else ():
            best = min(others, key=itemgetter(f"{operation} overhead"))
            both = [(OURS, operation), (best["side"], operation)]
            value, limit = ours[f"{operation} overhead"], share * best[f"{operation} overhead"]
            apart = partial(_above_share, share)
            check(case, f"{operation} overhead against {rival}", value, limit, both, apart)
            fastest = min(others, key=itemgetter(f"{operation} ms"))
            both = [(OURS, operation), (fastest["side"], operation)]
            ratio = ours[f"{operation} ms"] / fastest[f"{operation} ms"]
            check(case, f"{operation} time / the fastest other's", ratio, 1.0, both, _quotient)
    for row in growth:
        if row["side"] == REVERSIBLE:
            check("mef_tiny", "reversible memory at 4x depth / 1x", row["ratio"], 1.3)
    return result


def _quotient(ours: Draws, theirs: Draws) -> np.ndarray:
    return ours.seconds / theirs.seconds


def _above_share(share: float, ours: Draws, theirs: Draws) -> np.ndarray:
    return ours.overhead - share * theirs.overhead


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the overhead above the floor in training and decoding, on a logarithmic scale.

    Raises:
        ImportError: without matplotlib.
    """
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
                # Below a percent it is noise, and a logarithm needs something above zero.
                percent = 100 * row[f"{operation} overhead"]
                height, told = max(1.0, percent), f"{percent:.0f}" if percent >= 1 else "<1"
                place = index + (position - (len(present) - 1) / 2) * width
                axis.bar(place, height, 0.92 * width, color=f"C{sides.index(row['side'])}")
                axis.text(place, height, told, ha="center", va="bottom", fontsize=6)
        axis.set_yscale("log")
        axis.set_ylim(0.8, 1.3 * axis.get_ylim()[1])  # the least bar and the highest number in sight
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_ylabel(f"{'training' if operation == 'train' else 'decoding'}: % above the subnets alone")
        axis.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(range(len(cases)), cases, rotation=20)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{index}") for index in range(len(sides))]
    figure.legend(handles, sides, loc="outside upper center", ncols=4 if len(cases) > 2 else 2, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
