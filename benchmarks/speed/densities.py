"""All-class log-densities against the two matrix products that they cannot do without, z (mu/var)^T and z^2 (1/var)^T.

    python benchmarks/speed/densities.py [--classes K] [--dim D] [--batch B] [--rounds N] [--threads N]

The products have their operands ready and are not even added up: the terms from mu and s, the squares, the constants
and (for `GLEM.log_prob_per_class` of an identity flow) the dequantisation all count against the library. Backward adds
two products for z and two for the parameters. Both sides of a row take turns; the ratio is the median over rounds.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, seconds, write_results
from glem_augment import GLEM

LIMIT = 1.3
Task = Callable[[], Any]


def products(z: Tensor, scaled: Tensor, inverse: Tensor, grad: Tensor | None = None) -> Task:
    """The two products on ready operands, and with `grad` their backward to all operands."""
    operands = [operand.detach().requires_grad_(grad is not None) for operand in (z, z * z, scaled, inverse)]

    def task() -> None:
        results = [operands[0] @ operands[2].T, operands[1] @ operands[3].T]
        if grad is not None:
            torch.autograd.backward(results, [grad, grad])
            for operand in operands:
                operand.grad = None

    return task


def pairs(classes: int, dim: int, batch: int) -> dict[str, tuple[Task, Task]]:
    """By name: what the library does, and its products alone."""
    torch.manual_seed(0)
    side = math.isqrt(dim // 3)
    shape = (3, side, side) if 3 * side * side == dim else (1, 1, dim)
    model = GLEM.create("identity", shape, [f"class {i}" for i in range(classes)]).eval()
    gaussians = model.gaussians
    with torch.no_grad():
        gaussians.mu.normal_()
        gaussians.s.normal_()
        inverse = 1 / gaussians.variance()
        scaled = gaussians.mu * inverse
    z, grad = torch.randn(batch, dim), torch.randn(batch, classes)
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8)
    free = z.clone().requires_grad_()

    def backward() -> None:
        gaussians.log_prob(free).backward(grad)
        free.grad = gaussians.mu.grad = gaussians.s.grad = None

    no_grad, alone = torch.no_grad(), products(z, scaled, inverse)
    return {
        "forward": (no_grad(lambda: gaussians.log_prob(z)), alone),
        "forward, log_prob_per_class of images": (no_grad(lambda: model.log_prob_per_class(images)), alone),
        "forward + backward to z, mu, s": (backward, products(z, scaled, inverse, grad)),
    }


def measure(classes: int, dim: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row per pair."""
    rows = []
    for name, (ours, floor) in pairs(classes, dim, batch).items():
        ours(), floor()
        times = [(seconds(ours), seconds(floor)) for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in times)
        mine, alone = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
        rows.append(
            {
                "what": name, "median ms": mine, "products ms": alone, "ratio": ratio, "limit": LIMIT,
                "met": ratio <= LIMIT,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--classes", type=int, default=1000)
    args.add_argument("--dim", type=int, default=12288)
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--rounds", type=int, default=20)
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(args.classes, args.dim, args.batch, args.rounds)
    shape = f"K = {args.classes}, d = {args.dim}, batch {args.batch}, float32, {args.rounds} interleaved rounds"
    write_results(args.out, "densities", "All-class log-densities against their two matrix products", rows, shape=shape)


if __name__ == "__main__":
    main()
