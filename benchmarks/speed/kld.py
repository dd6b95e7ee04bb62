"""Sum of all pairwise Kullback-Leibler divergences of K Gaussians: time, and memory beyond the parameters.

Forward alone, and forward + backward. Peak memory is the process's high-water mark, read in a fresh process per row.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment.latent.gaussians import ClassGaussians


def measure(k: int, d: int, backward: bool, rounds: int) -> tuple[float, float]:
    """(median seconds, peak extra memory in multiples of mu)."""
    torch.manual_seed(0)
    gaussians = ClassGaussians(k, d)
    gaussians.mu.data.normal_()
    gaussians.s.data.normal_()
    small = ClassGaussians(4, 64)
    small.kld_sum().backward()  # first-call allocations of torch itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(rounds):
        gaussians.zero_grad(set_to_none=True)
        began = time.perf_counter()
        if backward:
            gaussians.kld_sum().backward()
        else:
            with torch.no_grad():
                gaussians.kld_sum()
        seconds.append(time.perf_counter() - began)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return statistics.median(seconds), extra / (k * d * 4)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--classes", type=int, default=1000)
    args.add_argument("--dim", type=int, default=12288)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--one", choices=["forward", "both"], help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one:
        print(*measure(args.classes, args.dim, args.one == "both", args.rounds))
        return
    rows = []
    for one in ("forward", "both"):
        options = ["--classes", str(args.classes), "--dim", str(args.dim), "--rounds", str(args.rounds)]
        options += ["--threads", str(args.threads)] if args.threads else []
        run = subprocess.run(
            [sys.executable, __file__, "--one", one, *options], capture_output=True, text=True, check=True
        )
        seconds, extra = map(float, run.stdout.split())
        rows.append(
            {
                "pass": "forward" if one == "forward" else "forward + backward",
                "K": args.classes,
                "d": args.dim,
                "median s": seconds,
                "peak extra memory / mu": extra,
            }
        )
    write_results(args.out, "kld", "Pair sum of the Kullback-Leibler divergences", rows)


if __name__ == "__main__":
    main()
