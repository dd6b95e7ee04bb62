"""Sum of all pairwise Kullback-Leibler divergences of K Gaussians: time, and memory beyond the parameters.

    python benchmarks/speed/kld.py [--classes K] [--dim D] [--rounds N]

Peak memory is the process's high-water mark, read in a fresh process per row.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, seconds, write_results
from glem_augment.latent.gaussians import ClassGaussians


def measure(classes: int, dim: int, backward: bool, rounds: int, threads: int | None) -> tuple[float, float]:
    """(median seconds, peak extra memory in multiples of mu)."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    gaussians = ClassGaussians(classes, dim)
    gaussians.mu.data.normal_()
    gaussians.s.data.normal_()
    ClassGaussians(4, 64).kld_class_sums().sum().backward()  # first-call allocations of torch itself

    def task() -> None:
        gaussians.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            total = gaussians.kld_class_sums().sum()
        if backward:
            total.backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    median = statistics.median(seconds(task) for _ in range(rounds))
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return median, extra / (classes * dim * 4)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--classes", type=int, default=1000)
    args.add_argument("--dim", type=int, default=12288)
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    rows = []
    for name, backward in (("forward", False), ("forward + backward", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            median, extra = pool.apply(measure, (args.classes, args.dim, backward, args.rounds, args.threads))
        row = {"pass": name, "K": args.classes, "d": args.dim, "median s": median, "peak extra memory / mu": extra}
        rows.append(row)
    write_results(args.out, "kld", "Pair sum of the Kullback-Leibler divergences", rows)


if __name__ == "__main__":
    main()
