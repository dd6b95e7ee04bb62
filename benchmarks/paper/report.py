"""The rows of the paper's tables, as JSON and as a page beside the printed numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import interval, markdown, processors
from benchmarks.paper.lab import Number
from benchmarks.paper.scales import Scale
from benchmarks.paper.tables import TITLES, Cell, cells_of
from glem_augment.io import atomic_write, write_json

_ORACLE = "oracle"
OTHER = "NF accuracy against bits/dim and FID, equal training steps"


def row(table: int | str, cell: Cell, data: str, seed: int, number: Number) -> dict[str, Any]:
    """One measured number."""
    return {
        "table": table, "method": cell.label, "data_set": data, "role": cell.data, "setting": cell.setting,
        "metric": number.metric, "seed": seed, "value": number.value, "weights_hash": number.weights,
        "key": number.key, "processor": number.processor,
    }  # fmt: skip


def oracle_row(table: int, role: str, data: str, number: Number) -> dict[str, Any]:
    """The accuracy of the data set's oracle."""
    return row(table, Cell(_ORACLE, role, "", ("accuracy",)), data, 0, number)


def numbers_of(folder: Path, scale: str, name: str = "*") -> list[Number]:
    """The numbers of a scale in earlier results, from one file (`table3`, `pareto`, ...) or from all files."""
    result = []
    for path in sorted(folder.glob(f"{name}.{scale}.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            if isinstance(entry, dict) and "key" in entry:
                values = (entry[part] for part in ("metric", "value", "weights_hash", "key", "processor"))
                result.append(Number(*values))
    return result


def write_rows(path: Path, name: str, scale: Scale, rows: list[dict[str, Any]], command: str) -> None:
    """Write the rows of table1 to table8 or pareto as JSON, and their page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(markdown(page(name, scale, rows, command)))


def page(name: str, scale: Scale, rows: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """A line for each data set, method and setting: means and 95 % intervals over seeds, and the printed numbers."""
    number = int(name.removeprefix("table")) if name != "pareto" else None
    cells = [] if number is None else cells_of(number, scale.sizes)
    printed = {(cell.data, cell.label, cell.setting): cell.paper for cell in cells}
    beside = {metric for numbers in printed.values() for metric in numbers}
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for entry in rows:
        key = entry["role"], entry["data_set"], entry["method"], entry["setting"]
        found.setdefault(key, {}).setdefault(entry["metric"], []).append(entry["value"])
    lines = []
    for (role, data, method, setting), values in found.items():
        line: dict[str, Any] = {"data": data, "method": method, "setting": setting}
        for metric in dict.fromkeys(entry["metric"] for entry in rows):
            line[metric] = _text(values[metric]) if metric in values else ""
            if metric in beside:
                line[f"{metric}, the paper"] = printed.get((role, method, setting), {}).get(metric)
        lines.append(line)
    networks = (("oracle", scale.oracle), ("CNN-A", scale.cnn), ("ViT-A", scale.vit))
    options = [f"{k} {v}" for k, v in scale.flow.items() if k not in ("modes_rank", "sample_every")]
    return {
        "title": OTHER if number is None else f"Table {number}: {TITLES[number]}",
        "command": command,
        "measured on": processors(rows),
        "flows": ", ".join(options),
        "classifiers": "; ".join(f"{each}: {r.arch}, {r.epochs} epochs, batch {r.batch_size}" for each, r in networks),
        "FID and Cov": f"oracle features, at most {scale.measured} images of each kind, k = {scale.neighbours}",
        "the paper": f"of CIFAR-100 beside {scale.main.name}, of CIFAR-10 beside {scale.second.name}: no aim",
        "rows": lines,
    }


def _text(values: list[float]) -> str:
    mean = interval(values)
    return f"{mean.mean:.4g} ± {mean.half:.2g}" if mean.seeds > 1 else f"{mean.mean:.4g}"
