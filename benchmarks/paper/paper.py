"""Measure the tables of Enescu & Sahbi, ACCV 2024.

    python benchmarks/paper/paper.py TABLE [TABLE ...] --scale cpu|paper [--seeds N]

TABLE is 1 to 8, or "all". Rows have the table and the data's role as setting, and the scale as split. Stored numbers,
and flows and oracles in --work, are not measured again. So the same command resumes a stopped run. To check stored
numbers, give another folder: `--out runs/check`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, parser
from benchmarks.paper.lab import Lab, Number
from benchmarks.paper.methods import CODED
from benchmarks.paper.scales import SCALES
from benchmarks.paper.tables import TITLES, cells_of

# Metrics that need the oracle, whose accuracy then is a row.
_ORACLES = {"FID", "Cov", "L-R", "rho-distance"}


def run_table(table: int, scale: str, lab: Lab, seeds: int, rows: Rows) -> None:
    """Measure the numbers of a table that are not stored, and store each at once."""
    stored = {tuple(row[name] for name in ("setting", "arm", "seed", "split", "metric")) for row in rows.all}

    def put(role: str, arm: str, seed: int, numbers: list[Number]) -> None:
        for number in numbers:
            where = f"table {table}, {role}", arm, seed, scale
            if (*map(str, where), number.metric) not in stored:
                more = {"key": number.key, "weights": number.weights} | ({"run": number.run} if number.run else {})
                rows.add(*where, {number.metric: number.value}, **more)

    cells = cells_of(table, SCALES[scale].sizes)
    for seed in range(seeds):
        for cell in cells:
            if cell.method in CODED and not lab.knows(cell, seed):
                print(f"paper: without {cell.arm}: commit 309e287 has the code of class codes", file=sys.stderr)
                continue
            put(cell.data, cell.arm, seed, lab.measure(cell, seed))
    for role in dict.fromkeys(cell.data for cell in cells if _ORACLES & set(cell.metrics)):
        put(role, "oracle", 0, [lab.oracle_accuracy(role)])


def main() -> None:
    args = parser(__doc__)
    args.add_argument("tables", nargs="+", choices=[*map(str, TITLES), "all"], metavar="TABLE")
    args.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="how much is trained (%(default)s)")
    args.add_argument("--seeds", type=int, help="runs of everything (default: the scale's)")
    args.add_argument("--work", type=Path, default=Path("runs/paper"), help="folder for flows (%(default)s)")
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows, scale = Rows("paper", args.out), SCALES[args.scale]
    own = (row for row in rows.all if row["split"] == args.scale)
    known = [Number(r["metric"], float(r["value"]), r["weights"], r["key"], r["run"]) for r in own]
    lab = Lab(scale, args.scale, args.work, args.device, known)
    for table in TITLES if "all" in args.tables else map(int, args.tables):
        run_table(table, args.scale, lab, args.seeds or scale.seeds, rows)


if __name__ == "__main__":
    main()
