"""Measure the tables of Enescu & Sahbi, ACCV 2024.

    python benchmarks/paper/paper.py TABLE [TABLE ...] --scale cpu|gpu|paper [--seeds N] [--max-minutes M]

TABLE is 1 to 8, or "all" for all eight. "claims" gives verdicts on the paper's claims from the stored tables. "figures"
draws the paper's Figures 2 and 4. "pareto" compares NF accuracy and bits/dim of all methods, including this library's
methods, at a fixed budget.

Results are <out>/table<N>.<scale>.json and <out>/claims.json. A table is a list of rows (table, method, data, setting,
metric, seed, value, SHA-256 of the flow's weights, key, processor). A Markdown file shows the rows beside the paper's
numbers. --data main=SPEC and second=SPEC replace CIFAR-100 and CIFAR-10 by other images.

Numbers in <out>, and flows, oracles and measurements in --work, are not measured again. So the same command resumes a
stopped run, and writes the tables of the results in the repository at once. To check these results, measure rows again
(the results stay unchanged):

    python benchmarks/paper/paper.py 3 --check --only "lambda_0 = 10"

--max-minutes ends a run at the next step, with exit status 75 if there is more to do:

    until python benchmarks/paper/paper.py all --scale gpu --max-minutes 9; do [ $? = 75 ] || break; done
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import EXIT_TIME_UP, RESULTS, TimeUpError, parser
from benchmarks.paper.claims import write_claims
from benchmarks.paper.figures import run_figures
from benchmarks.paper.lab import Lab, describe
from benchmarks.paper.pareto import run_pareto
from benchmarks.paper.report import numbers_of, oracle_row, page, row, write_rows
from benchmarks.paper.scales import SCALES, Scale
from benchmarks.paper.tables import TITLES, cells_of

_TABLES = [str(n) for n in TITLES]
# Metrics that need the oracle.
_ORACLES = {"FID", "Cov", "L-R", "rho-distance"}
_OTHERS = ("claims", "figures", "pareto")


def run_table(
    table: int, scale: Scale, name: str, lab: Lab, seeds: int, out: Path, command: Callable[[str, int], str]
) -> None:
    """Measure missing numbers, and write the table when it is complete. Until then, an earlier table stays.

    Args:
        seeds: the least number of seeds; further seeds are included if all their numbers are known.
    """
    cells = cells_of(table, scale.sizes)
    lab.learn(numbers_of(out, name, f"table{table}"))
    while all(lab.knows(cell, seeds) for cell in cells):
        seeds += 1
    rows = []
    for seed in range(seeds):
        for cell in cells:
            data, new = lab.spec(cell.data).name, not lab.knows(cell, seed)
            numbers = lab.measure(cell, seed)
            rows += [row(table, cell, data, seed, number) for number in numbers]
            if new:
                label = f"{data}, {cell.label} ({cell.setting})"
                print(f"table {table}, seed {seed}, {label}: {describe(numbers)}", flush=True)
    for role in dict.fromkeys(cell.data for cell in cells if _ORACLES & set(cell.metrics)):
        rows.append(oracle_row(table, role, lab.spec(role).name, lab.oracle_accuracy(role)))
    path = out / f"table{table}.{name}.json"
    write_rows(path, f"table{table}", scale, rows, command(str(table), seeds))
    print(f"table {table}: {path.with_suffix('.md')}")


def check_tables(tables: list[int], scale: Scale, lab: Lab, results: Lab, seeds: int, only: list[str]) -> None:
    """Measure rows of the tables in a new lab, and print them below the stored rows.

    Args:
        only: labels of the rows; empty: all rows.

    Raises:
        SystemExit: no such row.
    """
    cells = [(table, cell) for table in tables for cell in cells_of(table, scale.sizes)]
    chosen = [(table, cell) for table, cell in cells if not only or cell.label in only]
    if not chosen:
        labels = ", ".join(repr(label) for label in dict.fromkeys(cell.label for _, cell in cells))
        raise SystemExit(f"paper: there is no row {' or '.join(map(repr, only))} in these tables; there are {labels}")
    for seed in range(seeds):
        for table, cell in chosen:
            print(f"table {table}, seed {seed}, {lab.spec(cell.data).name}, {cell.label} ({cell.setting})")
            stored = describe(results.measure(cell, seed)) if results.knows(cell, seed) else "nothing"
            print(f"  results: {stored}", flush=True)
            print(f"  now:     {describe(lab.measure(cell, seed))}", flush=True)


def _short(spec: str) -> str:
    """A data set's name for titles and files: the last part of its path or name."""
    return re.sub(r"[^\w.]+", "_", spec.rstrip("/").rsplit("/", 1)[-1]) or "data"


def _place(text: str) -> str:
    """Part of a file's name for ROLE=SPEC: the role, and the data in this role."""
    role, _, spec = text.partition("=")
    return f"{role}-{_short(spec)}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"


def command_of(what: str, scale: str, seeds: int, data: Sequence[str] = ()) -> str:
    """The command in a result file, without folders of this machine and interruptions of the run."""
    more = "".join(f" --data {text}" for text in data)
    return f"python benchmarks/paper/paper.py {what} --scale {scale} --seeds {seeds}{more}"


def stored_page(folder: Path, name: str, scale: str = "cpu") -> dict[str, Any]:
    """The page of table1 to table8, or pareto, from the stored rows of the default images."""
    rows = json.loads((folder / f"{name}.{scale}.json").read_text(encoding="utf-8"))
    command = command_of(name.removeprefix("table"), scale, 1 + max(row["seed"] for row in rows))
    return page(name, SCALES[scale], rows, command)


def main() -> int:
    args = parser(__doc__)
    args.set_defaults(out=RESULTS / "paper")
    args.add_argument("tables", nargs="+", choices=[*_TABLES, "all", *_OTHERS], metavar="TABLE")
    args.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="how much is trained (%(default)s)")
    args.add_argument("--seeds", type=int, help="runs of everything (default: the scale's; 1 for --check)")
    args.add_argument("--work", type=Path, default=Path("runs/paper"), help="folder for flows (%(default)s)")
    args.add_argument("--data", action="append", default=[], metavar="ROLE=SPEC", help="main=... or second=...")
    args.add_argument(
        "--check", action="store_true", help="measure rows of the tables anew, and print them below the results'"
    )
    args.add_argument("--only", action="append", default=[], metavar="ROW", help="of --check: rows with this label")
    args.add_argument("--max-minutes", type=float, help="stop after that long, with exit status 75")
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    scale = SCALES[args.scale]
    for text in args.data:
        role, equals, spec = text.partition("=")
        if role not in ("main", "second") or not equals:
            raise SystemExit(f"--data takes main=SPEC or second=SPEC, got {text!r}")
        scale = replace(scale, **{role: replace(getattr(scale, role), spec=spec, name=_short(spec))})
    if scale.main.name == scale.second.name:
        scale = replace(scale, second=replace(scale.second, name=f"{scale.second.name} (second)"))
    # Other images get separate files.
    name = "-".join([args.scale, *(_place(text) for text in args.data)])
    until = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    lab = Lab(scale, args.scale, args.work, args.device, until, numbers_of(args.out, name))
    tables = _TABLES if "all" in args.tables else [t for t in args.tables if t in _TABLES]
    seeds = args.seeds or scale.seeds
    if args.only and not args.check:
        raise SystemExit("paper: --only goes with --check")

    def command(what: str, seeds: int) -> str:
        return command_of(what, args.scale, seeds, args.data)

    try:
        if args.check:
            # A check uses no stored results. Its folder only resumes the same check.
            anew = Lab(scale, args.scale, args.work / "check", args.device, until)
            check_tables([int(t) for t in tables], scale, anew, lab, args.seeds or 1, args.only)
            return 0
        for table in tables:
            run_table(int(table), scale, name, lab, seeds, args.out, command)
        if "pareto" in args.tables:
            run_pareto(lab, name, args.out, seeds, command)
        if "figures" in args.tables:
            run_figures(lab, name, args.out)
    except TimeUpError as stop:
        print(f"paper: {stop}", file=sys.stderr)
        return EXIT_TIME_UP
    if "claims" in args.tables or "all" in args.tables:
        write_claims(args.out, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
