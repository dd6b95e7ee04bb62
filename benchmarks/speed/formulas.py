"""Two formulas at their real size: the pair sum of KLDs, and exp(S) v per pixel.

    python benchmarks/speed/formulas.py

- kld: the sum of all pairwise Kullback-Leibler divergences of K Gaussians: time, and memory beyond the parameters. Peak
  memory is the process's high-water mark, read in a fresh process per row.
- matexp: exp(S) v, the bijective part of the matrix-exponential coupling, forward + backward, interleaved. One opponent
  on the same S and v is `torch.matrix_exp`, followed by a matrix-vector product. The other is the published code's
  Taylor series with scaling and squaring for the whole batch at once, followed by the same product.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, seconds, write_results
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.flows.matexp import expm_apply

CLASSES, DIM, KLD_ROUNDS = 1000, 12_288, 5
N, SIDE, BATCH = 6, 16, 32
OURS = "glem-augment"


def measure_kld(backward: bool, threads: int | None) -> tuple[float, float]:
    """(median seconds, peak extra memory in multiples of mu)."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    gaussians = ClassGaussians(CLASSES, DIM)
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
    median = statistics.median(seconds(task) for _ in range(KLD_ROUNDS))
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return median, extra / (CLASSES * DIM * 4)


def kld(out: Path, threads: int | None) -> None:
    rows = []
    for name, backward in (("forward", False), ("forward + backward", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            median, extra = pool.apply(measure_kld, (backward, threads))
        rows.append({"pass": name, "K": CLASSES, "d": DIM, "median s": median, "peak extra memory / mu": extra})
    write_results(out, "kld", "Pair sum of the Kullback-Leibler divergences", rows)


def scale_and_square(m: Tensor) -> Tensor:
    """exp of matrices [..., n, n] by one common scaling, a Taylor series and squaring (Xiao & Liu, Algorithm 1)."""

    def norm(m: Tensor) -> float:
        return float(torch.linalg.vector_norm(m.detach(), ord=1, dim=-1).max())

    squarings = max(0, math.ceil(math.log2(max(norm(m), 0.5))) + 1)
    m = term = m / 2.0**squarings
    total, k = torch.eye(m.shape[-1], dtype=m.dtype), 2
    while norm(term) > 1e-8:
        total, term, k = total + term, m @ term / k, k + 1
    for _ in range(squarings):
        total = total @ total
    return total


def formed(exponential: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """exp(S) v of S [B,n,n,H,W] and v [B,n,H,W] by an exponential of [..., n, n] matrices."""

    def apply(s: Tensor, v: Tensor) -> Tensor:
        e = exponential(s.permute(0, 3, 4, 1, 2).contiguous())
        return (e @ v.permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2)

    return apply


def matexp(out: Path, rounds: int) -> None:
    torch.manual_seed(0)
    s = torch.randn(BATCH, N, N, SIDE, SIDE)
    s = s / s.abs().sum(2, keepdim=True)  # every row sum at the bound r = 1
    v = torch.randn(BATCH, N, SIDE, SIDE)
    ways = {
        OURS: expm_apply,
        "torch.matrix_exp": formed(torch.matrix_exp),
        "scale and square": formed(scale_and_square),
    }

    def once(function: Callable[[Tensor, Tensor], Tensor]) -> float:
        a, b = s.clone().requires_grad_(), v.clone().requires_grad_()
        return seconds(lambda: function(a, b).square().sum().backward())

    times = [{name: once(function) for name, function in ways.items()} for _ in range(rounds + 1)][1:]
    exact = ways["torch.matrix_exp"](s.double(), v.double())
    rows = []
    for name, function in ways.items():
        error = (function(s, v).double() - exact).norm(dim=1) / exact.norm(dim=1)
        median = statistics.median(row[name] for row in times)
        ratio = statistics.median(row[name] / row[OURS] for row in times)
        rows.append({"way": name, "median ms": 1e3 * median, "median ratio": ratio})
        rows[-1]["largest relative error"] = float(error.max())
    shape = f"n = {N}, {SIDE}x{SIDE}, batch {BATCH}, float32, {rounds} interleaved rounds"
    write_results(out, "matexp", "exp(S) v per pixel, forward + backward", rows, shape=shape)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15, help="of exp(S) v (%(default)s)")
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    kld(args.out, args.threads)
    matexp(args.out, args.rounds)


if __name__ == "__main__":
    main()
