"""The matrix-exponential coupling's transform on a GPU: torch's operations, compiled, and the Triton kernel.

    python benchmarks/triton_kernel.py [--rounds N]

Float32, of random vectors by random matrices, forward and with gradients, at the sizes that the levels of ``mef_tiny``,
``mef_cifar`` and a flow of 64x64 pixels have. "compiled" is what ``flow.compile_steps()`` makes of it without the
kernel: for n = 2 the closed form in one fused loop, otherwise the operator, which compiles nothing inside. All sides
take turns in one process, in an order that changes; the ratio is the compiled form's time over the kernel's, median
over rounds: above 1 the kernel is faster. Ten calls are timed at once, the device's work included.

The kernel is the library's where GLEM_TRITON=1 is set; whole flows are then timed by ``speed.py --device cuda``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from common import parser, write_results
from speed_measure import balanced_orders, seconds
from torch import Tensor
from tqdm import tqdm

from glem_augment.flows import expm_triton
from glem_augment.flows.expm_coupling import expm_coupling
from glem_augment.flows.expm_op import expm_coupling_op

# n: images and their side.
SIZES = {2: (256, 14), 4: (256, 7), 6: (64, 32), 12: (64, 16), 24: (64, 8)}
BOUND = 1.0
CALLS = 10
TRITON = "Triton"
# Relative to the largest entry; a derivative lacks one term more than the series.
TOLERANCE = {"forward": 2e-6, "with gradients": 2e-5}

Transform = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


@contextmanager
def kernel(on: bool) -> Iterator[None]:
    """With the Triton kernel, or without."""
    with mock.patch.dict(os.environ, GLEM_TRITON="1" if on else "0"):
        expm_triton._programs.cache_clear()
        yield
    expm_triton._programs.cache_clear()


def task(function: Transform, n: int, gradients: bool, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Some calls; gives the last one's results."""
    batch, side = SIZES[n]
    made = torch.Generator().manual_seed(n)
    shapes = ((n, batch, side, side), (batch, n * n + n, side, side), (n, batch, side, side), (batch,))
    x2, params, *upstream = (torch.randn(shape, generator=made).to(device) for shape in shapes)
    params = params.contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_(gradients) for t in (x2, params)]

    def run() -> tuple[Tensor, ...]:
        for _ in range(CALLS):
            result = function(*leaves, BOUND, False)
            if gradients:
                result = torch.autograd.grad(result, leaves, upstream)
        return result

    return run


def measure(compiled: Transform, n: int, gradients: bool, rounds: int, device: torch.device) -> dict[str, object]:
    """A row. Results that differ are an error: times of wrong numbers are worth nothing."""
    what = "with gradients" if gradients else "forward"
    functions = {"torch": expm_coupling, "compiled": compiled, TRITON: expm_coupling}
    tasks = {name: task(function, n, gradients, device) for name, function in functions.items()}
    results = {}
    for name, run in tasks.items():  # the first calls, which compile
        with kernel(name == TRITON):
            results[name] = run()
    for name, found in results.items():
        for got, wanted in zip(found, results["torch"], strict=True):
            error = float((got - wanted).detach().abs().max() / wanted.detach().abs().max())
            if not error <= TOLERANCE[what]:
                raise SystemExit(f"n = {n}, {what}: {name} is off by {error:.2g} of the largest entry")
    times: dict[str, list[float]] = {name: [] for name in tasks}
    names, orders = list(tasks), balanced_orders(len(tasks))
    for _ in range(rounds):
        for index in next(orders):
            name = names[index]
            with kernel(name == TRITON):
                expm_triton.has_kernel(n, BOUND)  # looks at the environment, once
                times[name].append(seconds(tasks[name], device))
    batch, side = SIZES[n]
    ratios = [a / b for a, b in zip(times["compiled"], times[TRITON], strict=True)]
    medians = {f"{name} ms": 1e3 * statistics.median(taken) / CALLS for name, taken in times.items()}
    return {"n": n, "batch": batch, "side": side, "what": what, **medians, "ratio": statistics.median(ratios)}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=31, help="of every size (%(default)s)")
    args = args.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this compares kernels of a GPU, and there is none here: run it on a machine with CUDA")
    with kernel(True):
        if not expm_triton.has_kernel(2, BOUND):
            raise SystemExit("there is no Triton here: pip install triton")
    cases = [(n, gradients) for n in SIZES for gradients in (False, True)]
    # Every size has code of its own, with and without gradients.
    torch._dynamo.config.cache_size_limit = 2 * len(cases)
    compiled, device = torch.compile(expm_coupling_op, fullgraph=True, dynamic=False), torch.device("cuda")
    rows = [measure(compiled, n, gradients, args.rounds, device) for n, gradients in tqdm(cases, unit="size")]
    write_results(
        args.out,
        "triton_kernel",
        "The matrix-exponential coupling on a GPU: torch, compiled, Triton",
        rows,
        rounds=f"{args.rounds} rounds of {CALLS} calls, bound {BOUND}, float32",
    )


if __name__ == "__main__":
    main()
