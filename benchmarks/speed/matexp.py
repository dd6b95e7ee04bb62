"""The matrix-exponential coupling's bijective part against forming exp(S), forward + backward, interleaved.

Opponents, on the same S and v: ``torch.matrix_exp`` followed by a matrix-vector product, and a Taylor series with
scaling and squaring for the whole batch at once (the way of the published code: the scale follows the largest norm in
the batch, terms are added until they vanish), followed by the same product.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment.flows import expm_apply


def by_matrix_exp(s: Tensor, v: Tensor) -> Tensor:
    """torch.matrix_exp on [B,H,W,n,n], then the product."""
    e = torch.matrix_exp(s.permute(0, 3, 4, 1, 2).contiguous())
    return (e @ v.permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2)


def by_scale_and_square(s: Tensor, v: Tensor) -> Tensor:
    """Batch-wide scaling, Taylor terms until the largest entry falls below 1e-8 (at most 20), repeated squaring."""
    m = s.permute(0, 3, 4, 1, 2).contiguous()
    norm = float(m.detach().abs().sum(-1).max())
    squarings = max(0, math.ceil(math.log2(max(norm, 1e-12))) + 1)
    x = m / 2.0**squarings
    result = torch.eye(m.shape[-1]) + x
    term, k = x, 2
    while k < 20 and float(term.detach().abs().max()) > 1e-8:
        term = term @ x / k
        result = result + term
        k += 1
    for _ in range(squarings):
        result = result @ result
    return (result @ v.permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2)


def once(function: Callable[[Tensor, Tensor], Tensor], s: Tensor, v: Tensor) -> float:
    """Seconds of one forward + backward."""
    s, v = s.clone().requires_grad_(), v.clone().requires_grad_()
    began = time.perf_counter()
    function(s, v).square().sum().backward()
    return time.perf_counter() - began


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--n", type=int, default=6, help="size of S")
    args.add_argument("--side", type=int, default=16, help="height and width")
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--rounds", type=int, default=15)
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    s = torch.randn(args.batch, args.n, args.n, args.side, args.side)
    s = s / s.abs().sum(2, keepdim=True)  # every row sum at the bound r = 1
    v = torch.randn(args.batch, args.n, args.side, args.side)
    exact = by_matrix_exp(s.double(), v.double())
    ways = {
        "glem-augment": expm_apply,
        "torch.matrix_exp": by_matrix_exp,
        "scale and square": by_scale_and_square,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 2):
        for name, function in ways.items():
            seconds = once(function, s, v)
            if number >= 2:
                times[name].append(seconds)
    rows = []
    for name, function in ways.items():
        error = (function(s, v).double() - exact).norm(dim=1) / exact.norm(dim=1)
        ratios = [other / ours for other, ours in zip(times[name], times["glem-augment"], strict=True)]
        rows.append(
            {
                "way": name,
                "median ms": statistics.median(times[name]) * 1e3,
                "median ratio": statistics.median(ratios),
                "largest relative error": float(error.max()),
            }
        )
    write_results(
        args.out,
        "matexp",
        "exp(S) v per pixel, forward + backward",
        rows,
        shape=f"n = {args.n}, {args.side}x{args.side}, batch {args.batch}, float32, {args.rounds} interleaved rounds",
    )


if __name__ == "__main__":
    main()
