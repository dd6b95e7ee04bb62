"""Shared by all benchmarks: the record of machine and versions, timing, and the writing of results."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from glem_augment import __version__
from glem_augment.io import atomic_write, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXIT_TIME_UP = 75  # in sysexits.h EX_TEMPFAIL: the same command goes on


class TimeUpError(Exception):
    """The minutes of a benchmark are over; the same command goes on."""


def machine() -> dict[str, Any]:
    """Processor, threads, accelerator and versions of the measured packages."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    packages = ("torch", "torchvision", "timm", "numpy")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"glem-augment": __version__, **{name: version(name) for name in packages}},
    }


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table (%(default)s)")
    result.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    return result


@cache
def student(freedom: int) -> float:
    """The 97.5 % point of Student's t."""
    return float(stats.t.ppf(0.975, freedom))


@dataclass(frozen=True)
class Interval:
    """Mean of a few seeds, and half the 95 % interval of that mean (Student's t; NaN for one seed)."""

    mean: float
    half: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval is above zero."""
        return self.mean - self.half > 0

    @property
    def chance(self) -> float:
        """Two-sided p value of the t-test against zero."""
        t = self.mean / self.half * student(self.seeds - 1)
        return 2 * float(stats.t.sf(abs(t), self.seeds - 1))

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Text such as "84.0 ± 0.9", with a note for a single seed."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return f"{mean} ± {self.half:.{digits}f}" if self.seeds > 1 else f"{mean} (one seed)"

    def __str__(self) -> str:
        return self.text(2)


def interval(values: Iterable[float]) -> Interval:
    """The ± of all tables: the 95 % t-interval of the mean over seeds."""
    values = list(values)
    count = len(values)
    if count == 1:
        return Interval(values[0], math.nan, 1)
    half = student(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.mean(values), half, count)


def holm(chances: list[float]) -> list[float]:
    """p values corrected for their number (Holm 1979)."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    result, largest = [0.0] * len(chances), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(chances) - rank) * chances[index])
        result[index] = min(1.0, largest)
    return result


def find_images(script: str, name: str, folder: str | None, otherwise: str | None = None) -> str:
    """The place of images: `folder` in $GLEM_DATA, or else `otherwise`, a folder or a bundled set.

    Raises:
        SystemExit: the images are not found; the message lists the places.
    """
    root = os.environ.get("GLEM_DATA")
    places = [str(Path(root) / folder)] if root and folder else []
    places += [otherwise] if otherwise else []
    for place in places:  # MNIST and its relatives lie in torchvision's layout
        for kind, name_of in (("FashionMNIST", "torch/fashion_mnist"), ("MNIST", "torch/mnist")):
            if Path(place, kind, "raw").is_dir():
                return f"{name_of}@{place}"
    found = next((p for p in places if p.startswith("bundled:") or Path(p).is_dir()), None)
    if found is None:
        raise SystemExit(
            f"{script}: no images of {name}: looked for {', '.join(places) or 'none'}. Set GLEM_DATA to a folder with "
            f"{folder}/train/<class>/* (of MNIST: MNIST/raw/*-ubyte), or leave out what needs them"
        )
    return found


def seconds(task: Callable[[], Any]) -> float:
    """Seconds of one call: CPU time with one thread, which other load hardly changes, otherwise wall-clock time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    task()
    return clock() - began


def descend(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    after: Callable[[int], object] = lambda step: None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Train a classifier by cross-entropy, a step for each batch of inputs and labels (hard or soft).

    `after`: called with the number of steps so far, for a schedule. Returns the losses of the steps.
    """
    losses = []
    for step, (x, y) in enumerate(batches, 1):
        loss = F.cross_entropy(network(x).float(), y, label_smoothing=label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(loss.detach())
    return torch.stack(losses)


def balanced_orders(n: int) -> Iterator[list[int]]:
    """Endless orders of `range(n)`. Over n rounds (2n for odd n), each number follows each other number equally often
    (Williams 1949)."""
    zigzag = [(k + 1) // 2 if k % 2 else (n - k // 2) % n for k in range(n)]
    while True:
        for shift in range(n):
            order = [(k + shift) % n for k in zigzag]
            yield order
            if n % 2:
                yield order[::-1]


def write_results(
    folder: Path,
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    tables: dict[str, list[dict[str, Any]]] | None = None,
    show: bool = True,
    record: Any = None,
    **facts: Any,
) -> None:
    """Write `name.json` and `name.md` (columns in the first row's order), and print the table.

    Args:
        folder: of the files.
        name: of the files, and of the script.
        title: heading.
        rows: the results.
        tables: further tables, by heading; in the JSON under the same headings.
        show: print the table too.
        record: the whole content of the JSON, in place of the default.
        facts: further entries of the JSON.
    """
    script = Path(sys.argv[0]).resolve()
    shown = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    whole = {"title": title, "command": "python " + shlex.join([shown, *sys.argv[1:]]), "machine": machine()}
    publish(folder, name, {**whole, **facts, "rows": rows, **(tables or {})}, record, show)


def usage(description: str) -> str:
    """The commands in a script's docstring, one a line."""
    lines = [line.strip().removeprefix("GLEM_DATA=... ") for line in description.splitlines()]
    return "\n".join(line for line in lines if line.startswith("python "))


class Rows:
    """The rows of a result. A stored row is not measured again, and other processes may add rows meanwhile.

    Args:
        path: of the JSON. part: where the rows stand in it; "" for a list of rows.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path, self.part = path, part

    def all(self) -> list[dict[str, Any]]:
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {self.part: []}
        return found[self.part] if isinstance(found, dict) else found

    def row(self, known: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with the columns `known`, measured and stored unless it is there."""
        for row in self.all():
            if known.items() <= row.items():
                return row
        row = known | measure() | {"processor": machine()["processor"], "torch": torch.__version__}
        rows = [*self.all(), row]
        write_json(self.path, {self.part: rows} if self.part else rows)
        print(*row.values(), flush=True)
        return row


def over_seeds(rows: list[dict[str, Any]], *columns: str, value: str = "accuracy") -> list[dict[str, Any]]:
    """A line for every combination of these columns: the number of seeds, and mean and half interval of `value`."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in columns), []).append(row[value])
    lines = []
    for key, values in found.items():
        mean = interval(values)
        half = mean.half if mean.seeds > 1 else None
        lines.append(dict(zip(columns, key, strict=True)) | {"seeds": mean.seeds, value: mean.mean, "+/-": half})
    return lines


def processors(rows: list[dict[str, Any]]) -> str:
    """The processors, and versions of torch, that measured these rows, as far as they are stored."""
    names = (
        row.get("processor", "a processor that is not stored") + (f" (torch {row['torch']})" if "torch" in row else "")
        for row in rows
    )
    return " and ".join(dict.fromkeys(names))


def publish(folder: Path, name: str, whole: dict[str, Any], record: Any = None, show: bool = True) -> None:
    """Write `record` (`whole` by default) to `name.json`, and `markdown(whole)` to `name.md`; print the latter."""
    write_json(folder / f"{name}.json", whole if record is None else record)
    with atomic_write(folder / f"{name}.md", "w") as file:
        file.write(markdown(whole))
    if show:
        print(markdown(whole))


def markdown(whole: dict[str, Any]) -> str:
    """A page of results: `title`, `command` (one a line), `machine` if known, facts, `rows`, and further tables."""
    known = ("title", "command", "machine")
    names = list(whole)
    facts, tables = (names[: names.index("rows")], names[names.index("rows") + 1 :])
    lines = [f"# {whole['title']}"]
    for line in whole["command"].splitlines():
        lines += ["", f"`{line}`"]
    lines += ["", *_table(whole["rows"]), ""]
    if info := whole.get("machine"):
        versions = ", ".join(f"{key} {value}" for key, value in info["versions"].items())
        lines.append(f"{info['processor']}, {info['cores']} cores, {info['threads']} threads; {versions}.")
    lines += [f"{name}: {whole[name]}" for name in facts if name not in known]
    for name in tables:
        lines += ["", f"## {name}", "", *_table(whole[name])]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["nothing"]
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]  # no curves
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- numbers of the documentation ------------------------------------------------------------------------------------

Named = Iterator[tuple[str, str]]  # name and text


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `head` has the columns, with | between them."""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * columns, *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n\n" + "\n".join(lines) + "\n\n"


def by_seed(rows: list[dict[str, Any]], *names: str) -> dict[tuple[str, ...], dict[int, Any]]:
    """Values by seed, for every combination of the values of these columns.

    Raises:
        ValueError: two rows have one combination and seed.
    """
    found: dict[tuple[str, ...], dict[int, Any]] = {}
    for row in rows:
        values = found.setdefault(key := tuple(row[name] for name in names), {})
        if row["seed"] in values:
            raise ValueError(f"two rows have {', '.join(map(str, key))} and seed {row['seed']}: remove one of them")
        values[row["seed"]] = row.get("value", row.get("accuracy"))
    return found
