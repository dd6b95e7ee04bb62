"""All-class log-densities against the two matrix products that they cannot do without, z (mu/var)^T and z^2 (1/var)^T.

    python benchmarks/speed/densities.py [--classes K] [--dim D] [--batch B] [--rounds N] [--threads N]

The products have their operands ready and are not even added up: making the terms from mu and s, the squares, the
constants and (for ``GLEM.log_prob_per_class`` of an identity flow) the dequantisation all count against the library.
What is made from mu and s is kept until they change; in training they change in every pass.
Backward adds two products for z and two for the parameters. Both sides of a row run in turn, first one, then the other
first, in one process; the ratio is the median over the rounds.
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
from glem_augment.latent.gaussians import ClassGaussians

LIMIT = 1.3
Task = Callable[[], Any]


def products(z: Tensor, scaled: Tensor, inverse: Tensor, grad: Tensor | None = None) -> Task:
    """The two products on ready operands, and with ``grad`` their backward to every operand that requires it."""
    square = (z * z).detach().requires_grad_(z.requires_grad)

    def task() -> None:
        results = [z @ scaled.T, square @ inverse.T]
        if grad is not None:
            torch.autograd.backward(results, [grad, grad])
            for operand in (z, square, scaled, inverse):
                operand.grad = None

    return task


def densities(gaussians: ClassGaussians, z: Tensor, grad: Tensor | None = None, changing: bool = False) -> Task:
    """``log_prob``, and with ``grad`` its backward; ``changing``: of parameters that an optimizer has written to."""

    def task() -> None:
        if changing:
            with torch.no_grad():
                gaussians.mu[:1].add_(0.0)
        result = gaussians.log_prob(z)
        if grad is not None:
            result.backward(grad)
            for operand in (z, gaussians.mu, gaussians.s):
                operand.grad = None

    return task


def make_gaussians(classes: int, dim: int, trainable: bool) -> ClassGaussians:
    """Class Gaussians with means and variances that differ."""
    torch.manual_seed(0)
    gaussians = ClassGaussians(classes, dim)
    gaussians.mu.data.normal_()
    gaussians.s.data.normal_()
    return gaussians.requires_grad_(trainable)


def operands(gaussians: ClassGaussians) -> tuple[Tensor, Tensor]:
    """mu/var and 1/var [K, d], leaves that require a gradient where the parameters do."""
    with torch.no_grad():
        inverse = 1 / gaussians.variance()
        scaled = gaussians.mu * inverse
    trainable = gaussians.mu.requires_grad
    return scaled.requires_grad_(trainable), inverse.requires_grad_(trainable)


def image_shape(dim: int) -> tuple[int, int, int]:
    """(C, H, W) of ``dim`` numbers: colour and square where that is possible."""
    for channels in (3, 1):
        side = math.isqrt(dim // channels)
        if channels * side * side == dim:
            return channels, side, side
    return 1, 1, dim


def pairs(classes: int, dim: int, batch: int) -> dict[str, tuple[Task, Task]]:
    """By name: what the library does, and its products alone."""
    z = torch.randn(batch, dim)
    grad = torch.randn(batch, classes)
    free = z.clone().requires_grad_()
    # What one row leaves behind must not serve, or burden, another.
    frozen, trained, evaluated, changed = (make_gaussians(classes, dim, k > 0) for k in range(4))
    model = GLEM.create("identity", image_shape(dim), [f"class {i}" for i in range(classes)])
    model.gaussians.load_state_dict(frozen.state_dict())
    model.eval().requires_grad_(False)
    images = torch.randint(0, 256, (batch, *image_shape(dim)), dtype=torch.uint8)
    fixed, leaves = operands(frozen), operands(trained)
    return {
        "frozen, forward": (densities(frozen, z), products(z, *fixed)),
        "frozen, forward, log_prob_per_class of images": (
            lambda: model.log_prob_per_class(images),
            products(z, *fixed),
        ),
        "frozen, forward + backward to z": (densities(frozen, free, grad), products(free, *fixed, grad)),
        "trainable, forward without gradients": (
            torch.no_grad()(densities(evaluated, z)),
            torch.no_grad()(products(z, *leaves)),
        ),
        "trainable, forward": (densities(evaluated, z), products(z, *leaves)),
        "trainable, a new forward in every pass": (densities(changed, z, changing=True), products(z, *leaves)),
        "trainable, forward + backward to mu, s": (densities(trained, z, grad), products(z, *leaves, grad)),
        "trainable, forward + backward to z, mu, s": (densities(trained, free, grad), products(free, *leaves, grad)),
    }


def measure(classes: int, dim: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row per pair."""
    tasks = pairs(classes, dim, batch)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in tasks}
    for number in range(-1, rounds):
        for name, pair in tasks.items():
            order = (0, 1) if number % 2 else (1, 0)
            for side in order:
                taken = seconds(pair[side])
                if number >= 0:
                    times[name][side].append(taken)
    rows = []
    for name, (ours, floor) in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, floor, strict=True))
        rows.append(
            {
                "what": name,
                "median ms": 1e3 * statistics.median(ours),
                "products ms": 1e3 * statistics.median(floor),
                "ratio": ratio,
                "limit": LIMIT,
                "met": ratio <= LIMIT,
            }
        )
    return rows


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--classes", type=int, default=1000)
    args.add_argument("--dim", type=int, default=12288)
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--rounds", type=int, default=20)
    args = args.parse_args()
    if min(args.classes, args.dim, args.batch, args.rounds) < 1:
        raise SystemExit("--classes, --dim, --batch and --rounds must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(args.classes, args.dim, args.batch, args.rounds)
    write_results(
        args.out,
        "densities",
        "All-class log-densities against their two matrix products",
        rows,
        shape=f"K = {args.classes}, d = {args.dim}, batch {args.batch}, float32, {args.rounds} interleaved rounds",
        ratio="median over the rounds",
    )


if __name__ == "__main__":
    main()
