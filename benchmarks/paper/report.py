"""Write the rows of a table as JSON, and as Markdown beside the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import interval, processors
from benchmarks.paper.lab import Number
from benchmarks.paper.scales import Scale
from benchmarks.paper.tables import ALL, TITLES, Cell
from glem_augment.io import atomic_write, write_json

_ORACLE = "oracle"
OTHERS = {"pareto": "NF accuracy against bits/dim and FID, equal training steps"}


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


def write_table(
    folder: Path, table: int, scale_name: str, scale: Scale, cells: list[Cell], rows: list[dict[str, Any]], command: str
) -> Path:
    """Write `table<N>.<scale>.json` (the rows) and `.md`; returns the JSON's path."""
    path = folder / f"table{table}.{scale_name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(markdown(table, scale_name, scale, cells, rows, command))
    return path


def markdown(
    table: int, scale_name: str, scale: Scale, cells: list[Cell], rows: list[dict[str, Any]], command: str
) -> str:
    """Measured means (and 95 % intervals over seeds), the paper's number after each."""
    lines = [f"# Table {table}: {TITLES[table]} ({scale_name})", "", f"`{command}`", ""]
    for role, printed in (("second", "CIFAR-10"), ("main", "CIFAR-100")):
        chosen = [cell for cell in cells if cell.data == role]
        if not chosen:
            continue
        name = (scale.main if role == "main" else scale.second).name
        metrics = list(dict.fromkeys([*ALL, *(metric for cell in chosen for metric in cell.metrics)]))
        metrics = [metric for metric in metrics if any(metric in cell.metrics for cell in chosen)]
        # Samples of a monomodal flow are sorted by their codes: the kept share, and the rarest class's share.
        metrics += [m for m in ("kept", "rarest class") if any(r["metric"] == m and r["role"] == role for r in rows)]
        beside = {m for m in metrics if any(m in cell.paper for cell in chosen)}
        heads = ["method", "setting"]
        for metric in metrics:
            heads += [metric, "paper"] if metric in beside else [metric]
        lines += [f"## {name} (the paper: {printed})", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for cell in chosen:
            line = [cell.label, cell.setting]
            for metric in metrics:
                line.append(_measured(cell, name, metric, rows))
                if metric in beside:
                    line.append(f"{cell.paper[metric]:g}" if metric in cell.paper else "")
            lines.append("| " + " | ".join(line) + " |")
        for accuracy in values_of(rows, _ORACLE, name, "default", "accuracy"):
            lines += ["", f"Oracle: {accuracy:.2f} % on the real test images."]
        lines.append("")
    lines += [
        f"Measured on {processors(rows)}.",
        f"FID and Cov: oracle features, at most {scale.measured} generated and real test images, "
        f"k = {scale.neighbours}. All flows: {_flow(scale.flow)}.",
        "; ".join(
            f"{name}: {recipe.arch}, {recipe.epochs} epochs of batch {recipe.batch_size}"
            for name, recipe in (("Oracle", scale.oracle), ("CNN-A", scale.cnn), ("ViT-A", scale.vit))
        )
        + ".",
        "Columns named paper are the published numbers, on its data and at its size: they are beside, not the aim.",
        "",
    ]
    return "\n".join(lines)


def _measured(cell: Cell, data: str, metric: str, rows: list[dict[str, Any]]) -> str:
    found = values_of(rows, cell.label, data, cell.setting, metric)
    if not found:
        return "" if metric in cell.metrics else "x"
    return _text(found)


def _text(values: list[float]) -> str:
    mean = interval(values)
    return f"{mean.mean:.4g} ± {mean.half:.2g}" if mean.seeds > 1 else f"{mean.mean:.4g}"


def values_of(rows: list[dict[str, Any]], method: str, data: str, setting: str, metric: str) -> list[float]:
    """The values over seeds."""
    key = (method, data, setting, metric)
    return [r["value"] for r in rows if (r["method"], r["data_set"], r["setting"], r["metric"]) == key]


def _flow(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("modes_rank", "sample_every"))


def write_rows(path: Path, what: str, rows: list[dict[str, Any]], command: str) -> None:
    """Write rows of `OTHERS`, as JSON and Markdown."""
    write_json(path, rows)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(rows_markdown(what, rows, command))


def rows_markdown(what: str, rows: list[dict[str, Any]], command: str) -> str:
    """A line per method and a column per metric."""
    lines = [f"# {OTHERS[what]}", "", f"`{command}`", ""]
    for data in dict.fromkeys(r["data_set"] for r in rows):
        chosen = [r for r in rows if r["data_set"] == data]
        metrics = list(dict.fromkeys(r["metric"] for r in chosen))
        lines += [f"## {data}", "", "| method | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        for method in dict.fromkeys(r["method"] for r in chosen):
            line = [method]
            for metric in metrics:
                found = [r["value"] for r in chosen if (r["method"], r["metric"]) == (method, metric)]
                line.append(_text(found) if found else "")
            lines.append("| " + " | ".join(line) + " |")
        lines.append("")
    seeds = sorted({r["seed"] for r in rows})
    once = " A number without ± is of one seed." if len(seeds) > 1 else ""
    lines += [
        f"Measured on {processors(rows)}. Seeds {', '.join(map(str, seeds))}.{once} Data and flows as in the tables of "
        "this scale.",
        "",
    ]
    return "\n".join(lines)
