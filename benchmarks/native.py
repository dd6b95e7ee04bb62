"""The C++ kernels against torch's operations.

Float32, both ways in one process in an order that changes: the transforms of the matrix-exponential and of the affine
coupling alone, and of the affine one with the mixing after it, forward and with gradients, at the sizes that flows of
28x28 and 32x32 pixels have; the exponentials of a level's mixings, alone and with its ActNorms; a network in training;
and whole flows with their networks: the bundled one, the levels of ``mef_cifar``, and the first of ``glow_tiny``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import write_results
from elementwise import arguments, compare
from speed import CASES, couplings, make_flow
from speed_measure import Side
from torch import Tensor
from tqdm import tqdm

from glem_augment import GLEM
from glem_augment.flows import affine_joint_native, affine_native, expm_native, fold_native, generators, subnets
from glem_augment.flows.affine_coupling import affine_coupling
from glem_augment.flows.affine_joint import joint
from glem_augment.flows.expm_coupling import expm_coupling
from glem_augment.flows.generators import exp_of_generators
from glem_augment.flows.layers import ActNorm, Mixing1x1
from glem_augment.flows.prepared import Weights, prepare

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
            mock.patch.object(affine_joint_native, "has_kernel", lambda n: False),
            mock.patch.object(fold_native, "serves", lambda *args: False),
            mock.patch.object(generators, "_serves", lambda *args: False),
            mock.patch.object(subnets, "run_as_node", lambda *args: None),
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


def between(n: int, gradients: bool) -> Callable[[], Any]:
    """The affine transform, and the mixing that follows it, of random images."""
    batch, side = SIZES[n]
    x = torch.randn(2 * n, batch, side, side, requires_grad=gradients)
    params = torch.randn(batch, 2 * n, side, side).contiguous(memory_format=torch.channels_last)
    matrix, shift = torch.randn(2 * n, 2 * n), torch.randn(2 * n, 1)
    tensors = [t.requires_grad_(gradients) for t in (x, params, matrix, shift)]
    g, g_images, g_logdet = torch.randn_like(x), torch.randn(batch, n, side, side), torch.randn(batch)
    g_images = g_images.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        for _ in range(10):
            result = joint(*tensors, BOUND)
            if gradients:
                torch.autograd.grad(result, tensors, (g, g_images, g_logdet))

    return run


def folded(steps: int, channels: int) -> Callable[[], Any]:
    """What the ActNorms per channel and mixings of so many steps amount to, and gradients."""
    norms = [ActNorm(channels, 8, 8, "channel") for _ in range(steps)]
    mixings = [Mixing1x1(channels) for _ in range(steps)]
    weights = Weights([a.bias for a in norms], [a.log_scale for a in norms], [m.weight for m in mixings])

    def run() -> None:
        for _ in range(10):
            made = prepare(weights, (64, 64), True, inverse=False)
            results = [*made.matrix, *made.shift, made.logdet]
            torch.autograd.grad(results, weights.all(), [torch.ones_like(t) for t in results])

    return run


def network(case: str) -> tuple[str, Callable[[], Any]]:
    """The size of the batch that one network of a flow sees, and a step of it."""
    flow, x = make_flow(CASES[case], torch.device("cpu"))
    net = couplings(flow)[0].net
    x = torch.randn(len(x), net.head.in_channels, flow.part_shapes[0][1], flow.part_shapes[0][2], requires_grad=True)
    leaves, g = [x, *net.parameters()], torch.randn_like(net(x).detach())
    return f"{len(x)} images of {x.shape[2]}x{x.shape[3]}", lambda: torch.autograd.grad(net(x), leaves, g)


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
    for n, (batch, side) in SIZES.items():
        size = f"{batch} images of {side}x{side}, ten times"
        if affine_joint_native.has_kernel(n):
            tasks.append((f"affine and mixing, forward, n = {n}", size, between(n, gradients=False)))
            tasks.append((f"affine and mixing, forward + backward, n = {n}", size, between(n, gradients=True)))
    for steps, channels in MIXINGS:
        size = f"{steps} matrices, ten times"
        tasks.append((f"exponentials, {channels} channels", size, exponentials(steps, channels)))
        tasks.append((f"exponentials and ActNorms, {channels} channels", size, folded(steps, channels)))
    for case in ("glow_tiny_0", "mef_cifar_1", "mef_cifar_2"):
        tasks.append((f"network of {case}, forward + backward", *network(case)))
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
