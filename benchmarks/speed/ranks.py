"""The gain of a second rank: images per second of training and of generation.

    python benchmarks/speed/ranks.py [--ranks 2] [--rounds 5] [--preset glow_fast] [--seconds 20]

Each rank has one thread and is bound to one core; every rank needs an idle core. One rank and several ranks take turns,
each time as processes of torchrun, whose start is not measured. A ratio compares two neighbouring runs; the other rows
have medians. Both sides train on the same batches, and write the same images. The stored shares of communication were
measured by the code of commit 309e287.
"""

from __future__ import annotations

import argparse
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

from benchmarks.common import Rows, parser
from glem_augment import GLEM, SyntheticDataset, distributed, open_data
from glem_augment.synthetic.export import export_set
from glem_augment.training import TrainConfig, Trainer


def train(args: argparse.Namespace, folder: Path) -> float:
    """Images per second between the first and the last row of steps in the log."""
    data = open_data("bundled:fashion-mnist")
    data = data.subset(np.tile(np.arange(len(data)), 8))  # so that the time between epochs weighs little
    marks: list[tuple[int, float]] = []

    def mark(row: dict[str, Any]) -> None:
        if row["kind"] == "step":
            marks.append((row["step"], time.perf_counter()))
            trainer.stop_requested = len(marks) > 1 and marks[-1][1] - marks[0][1] > args.seconds

    config = TrainConfig(preset=args.preset, batch_size=args.batch_size, epochs=1000, modes_rank=0, sample_every=0)
    trainer = Trainer(data, config, folder, device="cpu", callbacks=[mark])
    try:
        trainer.fit()
    except KeyboardInterrupt:
        pass
    if not marks:  # the rows of a run's log are the first rank's
        return 0.0
    steps, seconds = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    return steps * args.batch_size / seconds


def generate(args: argparse.Namespace, folder: Path) -> float:
    """Images per second of an export to an ImageFolder."""
    model = GLEM.create(args.preset, (1, 28, 28), [str(i) for i in range(10)])
    model.flow.initialise(model.numbers(next(iter(open_data("bundled:fashion-mnist").batches(range(256), 256)))[0]))
    count = args.generate // 10
    SyntheticDataset(model, per_class=1).images(range(10))  # warms up
    data = SyntheticDataset(model, per_class=count)
    distributed.wait()
    began = time.perf_counter()
    export_set(data.draws, folder, "imagefolder", shared=True)
    distributed.wait()
    return 10 * count / (time.perf_counter() - began)


JOBS = {"train": train, "generate": generate}


def work(args: argparse.Namespace) -> None:
    """One measurement, in a process that torchrun started; the first rank prints it."""
    torch.set_num_threads(1)
    distributed.start("cpu")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[distributed.rank() % len(cores)]})
    found = JOBS[args.work](args, args.out)
    if distributed.is_primary():
        print(found)


def measure(job: str, ranks: int) -> float:
    """One measurement with the options of this command."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [*torchrun, *sys.argv, "--work", job, "--out", str(Path(folder) / "out")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


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
    rows, many = Rows("speed", args.out), f"{args.ranks} ranks"
    for job in JOBS:
        found: dict[int, list[float]] = {1: [], args.ranks: []}
        for number in range(args.rounds):
            for ranks in (1, args.ranks) if number % 2 == 0 else (args.ranks, 1):
                found[ranks].append(measure(job, ranks))
            rows.add(job, f"{many} over 1", number, "ranks", {"ratio": found[args.ranks][-1] / found[1][-1]})
        for arm, rates in (("1 rank", found[1]), (many, found[args.ranks])):
            rows.add(job, arm, "", "ranks", {"images/s": statistics.median(rates)})


if __name__ == "__main__":
    main()
