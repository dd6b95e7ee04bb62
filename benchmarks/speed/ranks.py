"""What a second rank brings: images per second of training and of generation, and the share of communication.

    python benchmarks/speed/ranks.py [--ranks 2] [--rounds 5] [--preset glow_fast] [--seconds 20]

Each rank has one thread and one core, to which it is bound; give the machine a quiet core for every rank. One rank and
several take turns, each time as processes of torchrun, whose start is not measured; a ratio is that of two neighbours,
and the table has the medians. Both sides train on the same batches, and write the same images. Communication includes
waiting for the slower ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment import GLEM, SyntheticDataset, distributed, open_data
from glem_augment.training import TrainConfig, Trainer

JOBS = ("train", "generate")


class Communication:
    """Counts the seconds that this process spends in the collectives of torch.distributed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_reduce", "all_gather_object"):
            setattr(torch.distributed, name, self._timed(getattr(torch.distributed, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def train(args: argparse.Namespace, folder: Path, spent: Communication) -> tuple[float, float]:
    """Images per second, and the share of communication, between the first and the last row of steps in the log."""
    data = open_data("bundled:fashion-mnist", progress=False)
    data = data.subset(np.tile(np.arange(len(data)), 8))  # so that what comes between epochs weighs little
    marks: list[tuple[int, float, float]] = []

    def mark(row: dict[str, Any]) -> None:
        if row["kind"] == "step":
            marks.append((row["step"], time.perf_counter(), spent.seconds))
            trainer.stop_requested = len(marks) > 1 and marks[-1][1] - marks[0][1] > args.seconds

    config = TrainConfig(preset=args.preset, batch_size=args.batch_size, epochs=1000, modes_rank=0, sample_every=0)
    trainer = Trainer(data, config, folder, device="cpu", progress=False, callbacks=[mark])
    try:
        trainer.fit()
    except KeyboardInterrupt:
        pass
    if not marks:  # the rows of a run's log are the first rank's
        return 0.0, 0.0
    steps, seconds, communication = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    return steps * args.batch_size / seconds, communication / seconds


def generate(args: argparse.Namespace, folder: Path, spent: Communication) -> tuple[float, float]:
    """Images per second, and the share of communication, of an export to an ImageFolder."""
    model = GLEM.create(args.preset, (1, 28, 28), [str(i) for i in range(10)])
    model.initialise(next(iter(open_data("bundled:fashion-mnist", progress=False).batches(range(256), 256)))[0])
    count = args.generate // 10
    SyntheticDataset(model, per_class=1).images(range(10))  # warms up
    data = SyntheticDataset(model, per_class=count)
    distributed.wait()
    began, before = time.perf_counter(), spent.seconds
    data.export(folder, progress=False, distributed=True)
    distributed.wait()
    seconds = time.perf_counter() - began
    return 10 * count / seconds, (spent.seconds - before) / seconds


def work(args: argparse.Namespace) -> None:
    """One measurement, in a process that torchrun started; the first rank prints it."""
    torch.set_num_threads(1)
    distributed.start("cpu")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[distributed.rank() % len(cores)]})
    rate, share = {"train": train, "generate": generate}[args.work](args, args.out, Communication())
    if distributed.is_primary():
        print(json.dumps([rate, share]))


def measure(args: argparse.Namespace, job: str, ranks: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        options = ["preset", "batch_size", "seconds", "generate"]
        own = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in options]
        script = [str(Path(__file__).resolve()), "--work", job, "--out", str(Path(folder) / "out"), *own]
        done = subprocess.run([*command, *script], check=True, stdout=subprocess.PIPE, text=True)
    rate, share = json.loads(done.stdout.splitlines()[-1])
    return rate, share


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--preset", default="glow_fast")
    options.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    options.add_argument("--seconds", type=float, default=20.0, help="of each training")
    options.add_argument("--generate", type=int, default=2000, help="images of each generation")
    options.add_argument("--work", choices=JOBS, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.work:
        work(args)
        return
    rows = []
    for job in JOBS:
        # One rank comes first in even rounds and second in odd ones.
        pairs = []
        for number in range(args.rounds):
            turns = (1, args.ranks)[:: 1 - 2 * (number % 2)]
            found = {ranks: measure(args, job, ranks) for ranks in turns}
            pairs.append((found[1], found[args.ranks]))
        row = {"job": job, "images/s, 1 rank": statistics.median(one[0] for one, _ in pairs)}
        row[f"images/s, {args.ranks} ranks"] = statistics.median(many[0] for _, many in pairs)
        row["ratio"] = statistics.median(many[0] / one[0] for one, many in pairs)
        row["share of communication"] = statistics.median(many[1] for _, many in pairs)
        row["ratios"] = [many[0] / one[0] for one, many in pairs]
        rows.append(row)
    write_results(args.out, "ranks", "Several ranks of one thread against one", rows, batch_size=args.batch_size)


if __name__ == "__main__":
    main()
