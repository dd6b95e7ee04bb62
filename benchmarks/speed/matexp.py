"""exp(S) v per pixel, the bijective part of the matrix-exponential coupling, against forming exp(S).

    python benchmarks/speed/matexp.py [--n N] [--side PIXELS] [--batch B] [--rounds N]

Forward + backward, interleaved. Opponents, on the same S and v: `torch.matrix_exp` followed by a matrix-vector product,
and the published code's Taylor series with scaling and squaring for the whole batch at once, followed by the same
product.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, seconds, write_results
from benchmarks.speed.opponents import expm
from glem_augment.flows.matexp import expm_apply

OURS = "glem-augment"


def formed(exponential: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """exp(S) v of S [B,n,n,H,W] and v [B,n,H,W] by an exponential of [..., n, n] matrices."""

    def apply(s: Tensor, v: Tensor) -> Tensor:
        e = exponential(s.permute(0, 3, 4, 1, 2).contiguous())
        return (e @ v.permute(0, 2, 3, 1).unsqueeze(-1)).squeeze(-1).permute(0, 3, 1, 2)

    return apply


def once(function: Callable[[Tensor, Tensor], Tensor], s: Tensor, v: Tensor) -> float:
    """Seconds of one forward + backward."""
    s, v = s.clone().requires_grad_(), v.clone().requires_grad_()
    return seconds(lambda: function(s, v).square().sum().backward())


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
    ways = {OURS: expm_apply, "torch.matrix_exp": formed(torch.matrix_exp), "scale and square": formed(expm)}
    for function in ways.values():
        once(function, s, v)
    times = [{name: once(function, s, v) for name, function in ways.items()} for _ in range(args.rounds)]
    exact = ways["torch.matrix_exp"](s.double(), v.double())
    rows = []
    for name, function in ways.items():
        error = (function(s, v).double() - exact).norm(dim=1) / exact.norm(dim=1)
        rows.append(
            {
                "way": name,
                "median ms": statistics.median(row[name] for row in times) * 1e3,
                "median ratio": statistics.median(row[name] / row[OURS] for row in times),
                "largest relative error": float(error.max()),
            }
        )
    shape = f"n = {args.n}, {args.side}x{args.side}, batch {args.batch}, float32, {args.rounds} interleaved rounds"
    write_results(args.out, "matexp", "exp(S) v per pixel, forward + backward", rows, shape=shape)


if __name__ == "__main__":
    main()
