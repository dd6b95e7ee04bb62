"""Gradients of convolutions' weights by the kernel for few images: torch's numbers, and only where it is the faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from glem_augment.flows import conv_weight_native, create_flow, elu_native
from glem_augment.flows.conv_weight_native import conv_weight_gradient, serves
from glem_augment.flows.subnets import ConvSubnet, Subnet

LAST = torch.channels_last
SAME = {side: ((1, 1), (side // 2, side // 2), (1, 1), 1) for side in (1, 2, 3, 5)}


def images(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=LAST)


def has_kernel() -> bool:
    return serves(images(1, 16, 4, 4), images(4, 16, 3, 3), SAME[3])


# Not has_kernel(): a kernel that is no longer built is to be noticed.
needs_kernel = pytest.mark.skipif(
    not elu_native.has_kernel() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="no C++ compiler, or no AVX-512, here",
)


def reference(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """By autograd, in float64."""
    w = weight.double().requires_grad_()
    y = nn.functional.conv2d(x.double(), w, padding=weight.shape[2] // 2)
    return torch.autograd.grad(y, w, g.double())[0]


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize(
    ("batch", "channels", "out", "height", "width"),
    [
        (16, 128, 128, 4, 4),
        (16, 24, 128, 4, 4),
        (3, 48, 20, 7, 5),
        (1, 16, 1, 1, 1),
        (2, 17, 9, 1, 6),
        (2, 65, 7, 6, 1),
        (5, 112, 33, 2, 3),
        (8, 30, 12, 16, 16),
    ],
)
def test_it_is_that_of_autograd(
    batch: int, channels: int, out: int, height: int, width: int, side: int, threads: int
) -> None:
    torch.manual_seed(0)
    x, g = images(batch, channels, height, width), images(batch, out, height, width)
    weight = images(out, channels, side, side)
    assert serves(x, weight, SAME[side])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = conv_weight_gradient(g, x, weight)
    finally:
        torch.set_num_threads(before)
    assert made.is_contiguous(memory_format=LAST) and made.dtype is torch.float32
    # Roundings of sums of so many products.
    room = 1e-7 * (batch * height * width) ** 0.5 * reference(g.abs(), x.abs(), weight)
    assert bool(((made - reference(g, x, weight)).abs() <= room).all())
    again = conv_weight_gradient(g, x, weight)
    assert torch.equal(made, again)  # the number of threads changes nothing


@needs_kernel
def test_what_is_no_number_stays_where_it_is() -> None:
    torch.manual_seed(0)
    x, g, weight = images(2, 20, 4, 4), images(2, 10, 4, 4), images(10, 20, 3, 3)
    x[1, 17, 0, 3], g[0, 9, 2, 2] = float("nan"), float("inf")
    made, exact = conv_weight_gradient(g, x, weight), reference(g, x, weight)
    assert torch.equal(made.isnan(), exact.isnan()) and torch.equal(made.isinf(), exact.isinf())
    # In the upper right corner, nothing above or to the right of the output looks at it.
    assert made.isnan()[0].nonzero().tolist() == [[17, ky, kx] for ky in (0, 1) for kx in (1, 2)]


@needs_kernel
@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        ((1, 16, 46, 46), (4, 16, 3, 3), SAME[3]),  # many pixels
        ((1, 15, 4, 4), (4, 15, 3, 3), SAME[3]),  # few channels
        ((1, 16, 4, 4), (4, 16, 1, 1), SAME[1]),
        ((1, 16, 4, 4), (4, 16, 2, 2), SAME[2]),
        ((1, 16, 4, 4), (4, 16, 3, 1), SAME[3]),
        ((1, 16, 4, 4), (4, 16, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
        ((1, 16, 4, 4), (4, 16, 3, 3), ((1, 1), (0, 0), (1, 1), 1)),
        ((1, 16, 4, 4), (4, 16, 3, 3), ((1, 1), (1, 1), (2, 2), 1)),
        ((1, 16, 4, 4), (16, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 16)),
    ],
)
def test_other_convolutions_are_left_to_torch(x: tuple, weight: tuple, geometry: tuple) -> None:
    assert not serves(images(*x), images(*weight), geometry)


@needs_kernel
def test_weights_in_another_order_are_left_to_torch() -> None:
    assert not serves(images(1, 16, 4, 4), torch.randn(4, 16, 3, 3), SAME[3])


@needs_kernel
def test_without_avx512_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_kernel()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    conv_weight_native._kernel.cache_clear()
    try:
        assert not has_kernel()
    finally:
        conv_weight_native._kernel.cache_clear()


def network(kind: str) -> ConvSubnet:
    torch.manual_seed(0)
    net = ConvSubnet(16, 24, 32, 2, kind)
    nn.init.normal_(net.tail.weight, std=0.1)
    return net


@needs_kernel
@pytest.mark.parametrize(("kind", "runs"), [("residual", 6), ("bottleneck", 3), ("depthwise", 1)])
def test_networks_use_it(monkeypatch: pytest.MonkeyPatch, kind: str, runs: int) -> None:
    net, x, shapes = network(kind), images(5, 16, 4, 6).requires_grad_(), []

    def counted(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape))
        return conv_weight_gradient(g, x, weight)

    monkeypatch.setattr(conv_weight_native, "conv_weight_gradient", counted)
    leaves, g = [x, *net.parameters()], torch.randn(5, 24, 4, 6)  # contiguous, as a stranger's may be
    got = torch.autograd.grad(net(x), leaves, g)
    assert len(shapes) == runs and all(shape[2:] == (3, 3) for shape in shapes)
    for a, b in zip(got, torch.autograd.grad(Subnet.forward(net, x), leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1.0, float(b.abs().max())))
        assert a.stride() == b.stride()
    # Frozen weights, and images that need no gradient, cost nothing.
    shapes.clear()
    net.blocks.requires_grad_(False)
    net.tail.requires_grad_(False)
    x.requires_grad_(False)
    alone = torch.autograd.grad(net(x), [net.head.weight, net.head.bias], g)
    assert shapes == [(32, 16, 3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(alone, got[1:], strict=False))


@needs_kernel
@pytest.mark.parametrize("memory", ["stored", "reversible"])
@pytest.mark.parametrize("preset", ["glow_tiny", "mef_tiny"])
def test_flows_use_it(monkeypatch: pytest.MonkeyPatch, preset: str, memory: str) -> None:
    torch.manual_seed(0)
    flow = create_flow(preset, (3, 8, 8), depth=[2, 2], blocks=[1, 1], width=[16, 32])
    flow.initialise(torch.rand(64, 3, 8, 8) - 0.5)
    for p in flow.parameters():
        if p.ndim == 4:
            nn.init.normal_(p, std=0.1)
    x, used = torch.rand(6, 3, 8, 8) - 0.5, []

    def gradients(flow: nn.Module, x: Tensor, memory: str) -> list[Tensor]:
        flow.set_memory(memory)
        z, logdet = flow(x)
        weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in (z, logdet)]
        return list(torch.autograd.grad((z, logdet), list(flow.parameters()), weights))

    def counted(*args: Tensor) -> Tensor:
        used.append(1)
        return conv_weight_gradient(*args)

    monkeypatch.setattr(conv_weight_native, "conv_weight_gradient", counted)
    got = gradients(flow, x, memory)
    assert len(used) == 4 * 3  # of every network two in its block and the last; the first takes few channels
    for a, b in zip(got, gradients(copy.deepcopy(flow).double(), x.double(), "stored"), strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))
