"""Convolutional networks in training as one node: the modules' numbers and gradients, and only where nothing else is
asked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from glem_augment.flows import elu_native
from glem_augment.flows.activations import Activation
from glem_augment.flows.subnets import CONV_SUBNETS, ConvSubnet, ResidualBlock, Subnet

pytestmark = pytest.mark.skipif(not elu_native.has_kernel(), reason="no C++ compiler here")


def network(kind: str = "residual", blocks: int = 2, activation: str = "elu") -> ConvSubnet:
    torch.manual_seed(0)
    net = ConvSubnet(4, 10, 8, blocks, kind, activation)
    nn.init.normal_(net.tail.weight)
    nn.init.normal_(net.tail.bias)
    return net


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 4, 7, 5))).requires_grad_()


def modules(net: ConvSubnet, x: Tensor) -> Tensor:
    """What the modules say."""
    return Subnet.forward(net, x)


def is_node(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_NetworkBackward"


def gradients(run: Callable[[ConvSubnet, Tensor], Tensor], net: ConvSubnet, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of all that has one."""
    y = run(net, x)
    wanted = [t for t in (x, *net.parameters()) if t.requires_grad]
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


def same(net: ConvSubnet, x: Tensor) -> None:
    got, wanted = gradients(lambda n, t: n(t), net, x), gradients(modules, net, x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("kind", CONV_SUBNETS)
@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (1, 4, 1, 1), (2, 4, 1, 6), (33, 4, 8, 8)])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_it_computes_what_the_modules_do(kind: str, shape: tuple[int, ...], blocks: int) -> None:
    net, x = network(kind, blocks), image(*shape)
    before = x.detach().clone()
    y = net(x)
    assert is_node(y) and y.is_contiguous(memory_format=torch.channels_last)
    same(net, x)
    assert torch.equal(x, before)
    same(net, before.contiguous(memory_format=torch.channels_last).requires_grad_())


def test_it_is_as_exact_as_the_modules() -> None:
    net, x = network(blocks=8), image(16, 4, 7, 5)
    got, wanted = gradients(lambda n, t: n(t), net, x), gradients(modules, net, x)
    exact = gradients(modules, net.double(), x.detach().double().requires_grad_())
    for a, b, c in zip(got, wanted, exact, strict=True):
        assert float((a - c).abs().max()) <= 3 * float((b - c).abs().max()) + 1e-7 * float(c.abs().max())


@pytest.mark.parametrize("part", ["images", "head", "blocks", "tail", "weights"])
def test_gradients_where_some_are_not_wanted(part: str) -> None:
    net, x = network(), image()
    if part == "images":
        x = x.detach()
    else:
        (net if part == "weights" else getattr(net, part)).requires_grad_(False)
    assert is_node(net(x))
    same(net, x)
    net.tail.bias = None
    same(net, x)


def test_nothing_to_differentiate_is_no_node() -> None:
    net = network().requires_grad_(False)
    assert net(image().detach()).grad_fn is None


@pytest.mark.parametrize("kind", CONV_SUBNETS)
def test_it_can_be_differentiated_again_and_in_batches(kind: str) -> None:
    net, x = network(kind), image()

    def second(run: Callable[[ConvSubnet, Tensor], Tensor]) -> list[Tensor]:
        leaves = [x, *net.parameters()]
        first = torch.autograd.grad(run(net, x).pow(3).mean(), leaves, create_graph=True)
        total = sum(t.square().sum() for t in first)
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

    for a, b in zip(second(lambda n, t: n(t)), second(modules), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))
    y, leaves = net(x), [x, *net.parameters()]
    assert is_node(y)
    rows = torch.eye(3, y.numel()).view(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, rows, is_grads_batched=True, retain_graph=True)
    for index, row in enumerate(rows):
        for a, b in zip(batched, torch.autograd.grad(y, leaves, row, retain_graph=True), strict=True):
            torch.testing.assert_close(a[index], b, rtol=1e-4, atol=1e-5)


def test_a_weight_that_changes_before_the_backward_is_an_error() -> None:
    net = network()
    y = net(image())
    with torch.no_grad():
        net.blocks[0].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_step_keeps_no_more_than_the_modules() -> None:
    def kept(run: Callable[[ConvSubnet, Tensor], Tensor]) -> int:
        net, x, held = network(blocks=4), image(8, 4, 16, 16), {}

        def pack(t: Tensor) -> Tensor:
            if not isinstance(t, nn.Parameter):
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = run(net, x)
        assert y.requires_grad
        return sum(held.values())

    assert kept(lambda net, x: net(x)) <= kept(modules)


def _weight_norm(net: ConvSubnet) -> None:
    parametrizations.weight_norm(net.head)


@pytest.mark.parametrize("passed", [False, True], ids=["new", "after a pass"])
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.double(),
        lambda net: setattr(net, "autocast", torch.bfloat16),
        lambda net: net.head.register_forward_hook(lambda *args: None),
        lambda net: net.blocks[0].register_forward_pre_hook(lambda *args: None),
        lambda net: net.blocks[0].conv1.register_full_backward_hook(lambda *args: None),
        lambda net: net.act.register_full_backward_hook(lambda *args: None),
        lambda net: net.blocks[1].act.register_forward_hook(lambda *args: None),
        lambda net: setattr(net.blocks[1], "act", Activation("relu")),
        lambda net: net.blocks.insert(0, nn.Identity()),
        lambda net: setattr(net.tail, "padding_mode", "circular"),
        _weight_norm,
    ],
    ids="float64 autocast hook pre-hook backward-hook act-hook inner-act-hook inner-act block padding norm".split(),
)
def test_what_the_modules_are_asked_for_is_done_by_them(change: Callable[[ConvSubnet], object], passed: bool) -> None:
    net = network()
    if passed:
        assert is_node(net(image()))
    change(net)
    x = image().detach().to(next(net.parameters()).dtype).requires_grad_()
    assert not is_node(net(x))
    same(net, x)


def test_what_is_exchanged_after_a_pass_is_what_runs() -> None:
    net, x = network(), image()
    assert is_node(net(x))
    for change in (
        lambda: setattr(net, "head", nn.Conv2d(4, 8, 3, padding=1)),
        lambda: setattr(net.blocks[0].conv2, "weight", nn.Parameter(torch.randn(8, 8, 1, 1))),
        lambda: setattr(net.tail, "bias", None),
        lambda: net.blocks.append(ResidualBlock(8, 8, (3, 1, 3))),
        lambda: (setattr(net.head, "dilation", (2, 2)), setattr(net.head, "padding", (2, 2))),
        lambda: net.load_state_dict({k: 0.5 * v for k, v in net.state_dict().items()}),
    ):
        change()
        assert is_node(net(x))
        same(net, x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert is_node(twin(x)) and not torch.equal(twin(x), net(x))
    same(twin, x)


def test_other_activations_and_surroundings_are_left_to_the_modules() -> None:
    x = image()
    assert not is_node(network(activation="silu")(x))
    net = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_node(net(x))
    with torch.no_grad():
        assert net(x).grad_fn is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_node(net(x))
    finally:
        handle.remove()
    assert not is_node(net(x[:0]))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_node(net(x))
    total = torch.func.grad(lambda t: net(t).sum())(x.detach())
    torch.testing.assert_close(total, torch.autograd.grad(modules(net, x).sum(), x)[0], rtol=1e-4, atol=1e-5)
