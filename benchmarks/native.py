"""The C++ kernels against torch's operations.

Float32, both ways in one process in an order that changes: the transforms of the matrix-exponential and of the affine
coupling alone, forward and with gradients, at the sizes that flows of 28x28 and 32x32 pixels have; the exponentials of
a level's mixings; and whole flows with their networks: the bundled one, the levels of ``mef_cifar``, and the first of
``glow_tiny``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import write_results
from elementwise import arguments, compare
from speed import CASES, make_flow
from speed_measure import Side
from torch import Tensor
from tqdm import tqdm

from glem_augment import GLEM
from glem_augment.flows import affine_native, expm_native, generators
from glem_augment.flows.affine_coupling import affine_coupling
from glem_augment.flows.expm_coupling import expm_coupling
from glem_augment.flows.generators import exp_of_generators

# n: images and their side
SIZES = {2: (32, 14), 4: (32, 7), 6: (16, 16), 12: (16, 8), 24: (16, 4)}
BOUND = 1.0
MIXINGS = ((8, 4), (8, 12), (4, 24), (2, 48))  # steps and channels of a level


def plain(task: Callable[[], Any]) -> Callable[[], Any]:
    """``task`` with torch's operations."""

    def run() -> Any:
        with (
            mock.patch.object(expm_native, "serves", lambda *args: False),
            mock.patch.object(affine_native, "serves", lambda *args: False),
            mock.patch.object(generators, "_serves", lambda *args: False),
        ):
            return task()

    return run


def transform(n: int, gradients: bool, kind: str = "expm") -> Callable[[], Any]:
    """The transform of random vectors by random matrices ("expm") or scales ("affine")."""
    batch, side = SIZES[n]
    function, outputs = (expm_coupling, n * n + n) if kind == "expm" else (affine_coupling, 2 * n)
    x2 = torch.randn(n, batch, side, side, requires_grad=gradients)
    params = torch.randn(batch, outputs, side, side).contiguous(memory_format=torch.channels_last)
    params.requires_grad_(gradients)
    g, g_logdet = torch.randn_like(x2), torch.randn(batch)

    def run() -> None:
        for _ in range(10):
            result = function(x2, params, BOUND)
            if gradients:
                torch.autograd.grad(result, (x2, params), (g, g_logdet))

    return run


def exponentials(steps: int, channels: int) -> Callable[[], Any]:
    """Those of so many mixings, and their gradients."""
    noise = torch.randn(steps, channels, channels)
    a = ((noise - noise.mT) * (1.5 / channels**0.5)).requires_grad_()
    g = torch.randn_like(noise)

    def run() -> None:
        for _ in range(10):
            torch.autograd.grad(exp_of_generators(a, 1.0), a, g)

    return run


def whole(batch: int) -> dict[str, Side]:
    """name -> flow to be trained, and to encode and decode."""
    bundled = GLEM.from_pretrained("bundled:fashion-mnist")
    x: Tensor = bundled.flow.inverse(bundled.sample_latents(torch.arange(batch) % len(bundled.classes)))[0]
    sides = {"bundled flow": Side("ours", bundled.flow, x.detach())}
    for case in ("mef_cifar_0", "mef_cifar_1", "mef_cifar_2", "glow_tiny_0"):
        sides[case] = Side("ours", *make_flow(CASES[case], torch.device("cpu")))
    for side in sides.values():
        side.trained.requires_grad_()
    return sides


def main() -> None:
    args = arguments(__doc__)
    if not expm_native.has_kernel(2, BOUND):
        raise SystemExit("native: there is no kernel, because no C++ compiler was found or GLEM_NATIVE is 0")
    tasks: list[tuple[str, str, Callable[[], Any]]] = []
    for n, (batch, side) in SIZES.items():
        size = f"{batch} images of {side}x{side}, ten times"
        tasks.append((f"forward, n = {n}", size, transform(n, gradients=False)))
        tasks.append((f"forward + backward, n = {n}", size, transform(n, gradients=True)))
    for n, (batch, side) in SIZES.items():
        size = f"{batch} images of {side}x{side}, ten times"
        tasks.append((f"affine, forward, n = {n}", size, transform(n, gradients=False, kind="affine")))
        tasks.append((f"affine, forward + backward, n = {n}", size, transform(n, gradients=True, kind="affine")))
    for steps, channels in MIXINGS:
        tasks.append(
            (f"exponentials, {channels} channels", f"{steps} matrices, ten times", exponentials(steps, channels))
        )
    for name, flow in whole(args.batch).items():
        size = f"{len(flow.x)} images"
        tasks += [(f"{what}, {name}", size, getattr(flow, what)) for what in ("train", "encode", "decode")]
    rows = [
        compare(what, size, plain(task), task, args.rounds)
        for what, size, task in tqdm(tasks, desc="native", unit="pair")
    ]
    write_results(args.out, "native", "The C++ kernels", rows)


if __name__ == "__main__":
    main()
