"""Shared by all benchmarks: the store of rows, intervals, the record of machine and versions, and timing."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
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
from torch import Tensor

from glem_augment import __version__
from glem_augment.io import atomic_write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("setting", "arm", "seed", "split", "metric", "value", "run")
KEY = COLUMNS[:5]  # unique in a study
RUN = ("command", "code", "processor", "versions", "date")  # code: the commit that has it, if this tree has not


def machine() -> dict[str, str]:
    """Accelerator or processor, with threads, and versions of the measured packages."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    packages = {"glem-augment": __version__} | {name: version(name) for name in ("torch", "torchvision", "timm")}
    threads = torch.get_num_threads()
    return {
        "processor": processor + f", {threads} threads" * (threads > 1),
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
    }


# ---- the store -------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(text.getvalue())


def run_id(facts: dict[str, str]) -> str:
    """The name of a run in runs.csv: six hex digits of its facts."""
    return hashlib.sha256("\n".join(facts[name] for name in RUN).encode()).hexdigest()[:6]


def this_run() -> dict[str, str]:
    """Facts of this process for runs.csv, without folders of this machine."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    folders = ("--out", "--work", "--flows")
    words = [
        word for last, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False) if not {last, word} & {*folders}
    ]
    command = "python " + shlex.join([shown, *words])
    return {"command": command, "code": "", **machine(), "date": time.strftime("%Y-%m-%d")}


class Rows:
    """The stored rows of a study, `folder/STUDY.csv`, in their order; `runs.csv` beside it has commands and machines.

    A row is unique for its setting, arm, seed, split and metric. Other processes may add rows meanwhile.
    """

    def __init__(self, study: str, folder: Path = RESULTS) -> None:
        self.study, self.path, self.runs = study, folder / f"{study}.csv", folder / "runs.csv"
        self.read()

    def read(self) -> None:
        self.all = read_csv(self.path)
        self._by_seed: dict[tuple[str, ...], dict[str, float]] = {}
        for row in self.all:
            values = self._by_seed.setdefault((row["setting"], row["arm"], row["split"], row["metric"]), {})
            if row["seed"] in values:
                raise ValueError(f"{self.path.name}: two rows have {[row[name] for name in KEY]}: remove one of them")
            values[row["seed"]] = float(row["value"])

    def values(self, setting: str, arm: str, metric: str = "accuracy", split: str = "test") -> dict[str, float]:
        """Values by seed; empty if nothing was measured."""
        return self._by_seed.get((setting, arm, split, metric), {})

    def arms(self, setting: str | None = None) -> Iterator[tuple[str, str, str, dict[str, float]]]:
        """Arm, split, metric and values by seed, in the order of the rows; the setting in place of None comes first."""
        for (where, *rest), values in self._by_seed.items():
            if where == setting:
                yield (*rest, values)  # type: ignore[misc]

    def settings(self) -> list[str]:
        return list(dict.fromkeys(row["setting"] for row in self.all))

    def add(
        self, setting: str, arm: str, seed: int | str, split: str, found: dict[str, float], **more: str
    ) -> dict[str, float]:
        """Append a row for each metric, and this run; rows of the same key are replaced. Returns `found`.

        more: further columns of the rows.
        """
        facts = this_run()
        runs = read_csv(self.runs)
        if all(row["run"] != run_id(facts) for row in runs):
            _write_csv(self.runs, ("run", *RUN), [*runs, {"run": run_id(facts), **facts}])
        key = dict(zip(KEY, (setting, arm, str(seed), split), strict=False))
        new = [{**key, "metric": m, "value": repr(v), "run": run_id(facts), **more} for m, v in found.items()]
        self.read()
        replaced = {tuple(row[name] for name in KEY) for row in new}
        kept = [row for row in self.all if tuple(row[name] for name in KEY) not in replaced]
        columns = dict.fromkeys((*COLUMNS, *(name for row in [*kept, *new] for name in row)))
        _write_csv(self.path, columns, [*kept, *new])
        self.read()
        print(
            setting, arm, seed, split, *(f"{name} {value:.4g}" for name, value in found.items()), sep=" | ", flush=True
        )
        return found

    def once(
        self, setting: str, arm: str, seed: int | str, split: str, measure: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """The stored metrics of this key, measured and added if there are none."""
        self.read()
        known = {m: v[str(seed)] for a, s, m, v in self.arms(setting) if (a, s) == (arm, split) and str(seed) in v}
        return known or self.add(setting, arm, seed, split, measure())


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of the stored rows (%(default)s)")
    result.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return result


# ---- intervals -------------------------------------------------------------------------------------------------------


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
    def verdict(self) -> str:
        """The interval of a difference in words."""
        if self.seeds == 1:
            return "one seed: no verdict"
        below = self.mean + self.half < 0
        return "clearly better" if self.clear else "clearly worse" if below else "no difference found"

    @property
    def chance(self) -> float:
        """Two-sided p value of the t-test against zero."""
        t = self.mean / self.half * student(self.seeds - 1)
        return 2 * float(stats.t.sf(abs(t), self.seeds - 1))

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Text such as "84.0 ± 0.9", with a note for a single seed."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return f"{mean} ± {self.half:.{digits}f}" if self.seeds > 1 else f"{mean} (one seed)"


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


def paired(ours: dict[str, float], other: dict[str, float]) -> Interval | None:
    """Difference of two arms over their common seeds; None without one."""
    seeds = [seed for seed in ours if seed in other]
    return interval(ours[seed] - other[seed] for seed in seeds) if seeds else None


# ---- images, timing and training -------------------------------------------------------------------------------------


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
    network: Callable[[Tensor], Tensor],
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
