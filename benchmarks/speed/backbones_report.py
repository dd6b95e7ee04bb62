"""Table and picture of what ``backbones.py`` measured."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.backbones_variants import VARIANTS
from glem_augment.io import atomic_write


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per variant: means over the seeds, best bits/dim first, failed ones last."""
    lines = []
    for variant in VARIANTS:
        cells = [row for row in rows if row["variant"] == variant]
        good = [row for row in cells if row["bits_per_dim"] is not None]
        if not cells:
            continue
        line: dict[str, Any] = {"variant": variant, "seeds": len(good), "failed": len(cells) - len(good)}
        for key in ("bits_per_dim", "accuracy"):
            values = [row[key] for row in good]
            line[key] = statistics.mean(values) if values else math.nan
            line[f"{key}_spread"] = max(values) - min(values) if values else math.nan
        for key in ("parameters", "flops_per_image", "images_per_second", "seconds", "steps", "images_seen"):
            line[key] = statistics.mean(row[key] for row in cells)
        lines.append({**line, "width": cells[0]["spec"]["width"]})
    return sorted(lines, key=lambda line: (math.isnan(line["bits_per_dim"]), line["bits_per_dim"]))


def write_table(record: dict[str, Any], path: Path) -> None:
    """Markdown, one table per data set, sorted by bits/dim."""
    facts, info = record["conditions"], record["machine"]
    text = [f"# {record['title']}", "", f"`{record['command']}`", ""]
    for data in dict.fromkeys(row["data"] for row in record["rows"]):
        text += [f"## {data}", ""]
        text += [
            "| # | variant | bits/dim | NF accuracy % | seeds | widths | parameters | MFLOP/image | TFLOP in all |"
        ]
        text[-1] += " images/s | seconds | steps |"
        text += ["|" + "---|" * 12]
        for index, line in enumerate(summary([row for row in record["rows"] if row["data"] == data]), 1):
            count, spread = line["seeds"], line["seeds"] > 1
            bits = f"{line['bits_per_dim']:.3f}" + (f" ({line['bits_per_dim_spread']:.3f})" if spread else "")
            right = f"{100 * line['accuracy']:.1f}" + (f" ({100 * line['accuracy_spread']:.1f})" if spread else "")
            done = line["images_seen"] * line["flops_per_image"] / 1e12
            text.append(
                f"| {index} | {line['variant']} | {bits if count else 'diverged'} | {right if count else ''} | {count}"
                f"{' + ' + str(line['failed']) + ' diverged' if count and line['failed'] else ''} | "
                f"{', '.join(map(str, line['width']))} | {line['parameters'] / 1e6:.3f} M | "
                f"{line['flops_per_image'] / 1e6:.0f} | {done:.1f} | {line['images_per_second']:.0f} | "
                f"{line['seconds']:.0f} | {line['steps']:.0f} |"
            )
        text.append("")
    text += ["In brackets: largest minus smallest over the seeds. `=`: widths scaled to the base's FLOPs.", ""]
    text += [", ".join(f"{key} {value}" for key, value in facts.items()) + "."]
    text += [f"{info['processor']}; " + ", ".join(f"{key} {value}" for key, value in info["versions"].items()) + "."]
    with atomic_write(path, "w") as file:
        file.write("\n".join(text) + "\n")
    print("\n".join(text))


def path_of(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What a variant had reached on the way and at the end, means over its seeds; the end alone where a seed lacks one.

    Each has seconds of training, training FLOPs (forward pass times three, all images so far), bits/dim and accuracy.
    """
    paths = []
    for row in rows:
        if row["bits_per_dim"] is None:
            continue
        end = {key: row[key] for key in ("seconds", "steps", "bits_per_dim", "accuracy")}
        each = row["images_seen"] / row["steps"] * row["flops_per_image"]
        paths.append([{**point, "flops": point["steps"] * each} for point in [*row["curve"], end]])
    if len({len(path) for path in paths}) > 1:
        paths = [path[-1:] for path in paths]
    keys = ("seconds", "flops", "bits_per_dim", "accuracy")
    return [{key: statistics.mean(p[key] for p in points) for key in keys} for points in zip(*paths, strict=True)]


def draw(record: dict[str, Any], path: Path) -> None:
    """Bits/dim and accuracy against seconds and training FLOPs, one row of panels per data set.

    A line is a variant, from what was measured on the way to its end; numbers are the table's.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        print("backbones: no picture without matplotlib (pip install 'glem-augment[plots]')", file=sys.stderr)
        return
    names = list(dict.fromkeys(row["data"] for row in record["rows"]))
    figure = Figure(figsize=(20, 4.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 4, squeeze=False)
    clock = "CPU" if record["conditions"]["threads"] == 1 else "wall-clock"
    label = {
        "bits_per_dim": "bits/dim", "accuracy": "NF accuracy, %", "seconds": f"{clock} seconds of training",
        "flops": "training TFLOP",
    }  # fmt: skip
    scale = {"bits_per_dim": 1.0, "accuracy": 100.0, "seconds": 1.0, "flops": 1e-12}
    panels = [(x, y) for x in ("seconds", "flops") for y in ("bits_per_dim", "accuracy")]
    for name, row in zip(names, axes, strict=True):
        cells = [cell for cell in record["rows"] if cell["data"] == name]
        for index, line in enumerate(summary(cells), 1):
            points = path_of([cell for cell in cells if cell["variant"] == line["variant"]])
            if not points:
                continue
            style = {"color": colormaps["tab20"]((index - 1) % 20), "label": f"{index}  {line['variant']}"}
            for axis, (x, y) in zip(row, panels, strict=True):
                xs, ys = ([point[key] * scale[key] for point in points] for key in (x, y))
                axis.plot(xs, ys, "o-", markersize=4, linewidth=1, **style)
                axis.annotate(str(index), (xs[-1], ys[-1]), xytext=(4, -3), textcoords="offset points", fontsize=8)
        for axis, (x, y) in zip(row, panels, strict=True):
            axis.set(xlabel=label[x], ylabel=label[y], title=name)
            if x == "flops":
                axis.set_xscale("log")
                # By themselves they are powers of ten, of which there may be one, or as many as overlap.
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter(NullFormatter())
            if y == "bits_per_dim":
                # The first point can lie far above all that matters.
                ends = [cell["bits_per_dim"] for cell in cells if cell["bits_per_dim"] is not None]
                axis.set_ylim(min(ends, default=0) - 0.2, max(ends, default=1) + 1.5)
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
