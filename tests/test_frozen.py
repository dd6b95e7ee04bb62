"""Frozen convolutional networks on a CPU: the modules' numbers, and only where nothing else is asked."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from glem_augment.flows import frozen
from glem_augment.flows.activations import ACTIVATIONS, Activation
from glem_augment.flows.subnets import CONV_SUBNETS, ConvSubnet, Subnet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:TF32 acceleration:UserWarning"),
    pytest.mark.skipif(not frozen._is_supported(), reason="this torch has no oneDNN convolutions"),
]


def network(kind: str = "residual", activation: str = "elu", blocks: int = 2) -> ConvSubnet:
    torch.manual_seed(0)
    net = ConvSubnet(4, 10, 8, blocks, kind, activation)
    nn.init.normal_(net.tail.weight)
    nn.init.normal_(net.tail.bias)
    return net.eval().requires_grad_(False)


def image(batch: int = 3, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 7, 5)


def plain(net: ConvSubnet, x: Tensor) -> Tensor:
    """What the modules say."""
    return Subnet.forward(net, x)


def close(got: Tensor, wanted: Tensor) -> None:
    # A small sum of large numbers is as exact as these are.
    most = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=max(1e-5, 2e-6 * most))


def ran(net: ConvSubnet) -> bool:
    """Whether the net holds packed weights."""
    return net._frozen._steps is not None


@torch.no_grad()
@pytest.mark.parametrize("kind", CONV_SUBNETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mkl", [False, True])
def test_it_computes_what_the_modules_do(
    kind: str, activation: str, mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "mkl_is_fast", lambda: mkl)
    for blocks in (0, 2):
        net = network(kind, activation, blocks)
        for batch in (0, 3, 1, 16):  # one packing serves all
            x = image(batch) * 3
            before = x.clone()
            got = net(x)
            close(got, plain(net, x))
            assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)
        assert ran(net)


@torch.no_grad()
def test_it_is_as_exact_as_the_modules() -> None:
    net, x = network(blocks=8), image(16)
    exact = plain(copy.deepcopy(net).double(), x.double())
    error = float((net(x) - exact).abs().max())
    assert ran(net) and error <= 3 * float((plain(net, x) - exact).abs().max())


@torch.no_grad()
def test_it_follows_its_weights() -> None:
    net, x = network(), image()

    def exchange() -> None:
        net.blocks[0].conv1 = copy.deepcopy(net.blocks[0].conv2)

    def bend_otherwise() -> None:
        for part in (net, *net.blocks):
            part.act = Activation("silu")

    for change in (
        lambda: None,
        lambda: net.head.weight.mul_(2),
        lambda: net.blocks[1].conv2.bias.add_(1),
        lambda: net.load_state_dict({k: 0.9 * v for k, v in net.state_dict().items()}),
        lambda: setattr(net.tail, "weight", nn.Parameter(torch.randn_like(net.tail.weight), requires_grad=False)),
        lambda: setattr(net.tail, "bias", None),
        exchange,
        bend_otherwise,
    ):
        change()
        kept = net._frozen._steps
        close(net(x), plain(net, x))
        assert ran(net)
        assert kept is None or net._frozen._steps is not kept
    kept = net._frozen._steps
    net(x)
    assert net._frozen._steps is kept  # made once


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("part", ["tail", "blocks"])
def test_training_in_between_makes_them_anew(compiled: bool, part: str) -> None:
    net, x = network(), image()
    with torch.no_grad():
        net(x)
    trained = getattr(net, part)
    trained.requires_grad_(True)
    step = torch.compile(net, backend="eager") if compiled else net
    step(x).mean().backward()
    assert not ran(net)
    # A fused optimizer writes without a new version of the weight.
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, fused=True)
    versions = [p._version for p in trained.parameters()]
    before = plain(net, x).detach()
    optimizer.step()
    net.requires_grad_(False)
    with torch.no_grad():
        assert float((plain(net, x) - before).abs().max()) > 1e-3
        close(net(x), plain(net, x))
    assert versions == [p._version for p in trained.parameters()], "this torch has versions for fused steps too"


def test_weights_that_train_are_never_packed() -> None:
    net, x = network(), image()
    net.tail.bias.requires_grad_(True)
    with torch.no_grad():
        close(net(x), plain(net, x))
    assert not ran(net)


def test_gradients_are_the_modules() -> None:
    net, x = network(), image().requires_grad_()
    with torch.no_grad():
        net(x)
    (got,) = torch.autograd.grad(net(x).sin().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(plain(net, x).sin().sum(), x)[0])


@torch.no_grad()
def test_tangents_are_the_modules() -> None:
    net, x, direction = network(activation="silu"), image(), image()
    net(x)
    _, wanted = torch.func.jvp(lambda t: plain(net, t), (x,), (direction,))
    assert wanted.any()
    torch.testing.assert_close(torch.func.jvp(net, (x,), (direction,))[1], wanted)
    with forward_ad.dual_level():
        y = net(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, wanted)


@torch.no_grad()
def test_operations_are_counted_faked_and_traced_as_the_modules() -> None:
    net, x = network(), image()
    net(x)
    with FlopCounterMode(display=False) as counter:
        net(x)
    weights = sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, nn.Conv2d))
    assert counter.get_total_flops() == 2 * x.shape[0] * 7 * 5 * weights
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert net(fake.from_tensor(x)).shape == (3, 10, 7, 5)
    assert "mkldnn" not in str(torch.jit.trace(net, x).graph)
    close(torch.compile(net, backend="eager", fullgraph=True)(x), plain(net, x))
    close(torch.export.export(net, (x,)).module()(x), plain(net, x))


@torch.no_grad()
def test_other_precisions_and_switches_are_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), image()
    net(x)
    monkeypatch.setattr(frozen, "_take_apart", lambda *args: pytest.fail("it was run"))
    net._frozen._steps = None
    assert net.double()(x.double()).dtype == torch.float64
    net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        close(net(x), plain(net, x))
    net.autocast = torch.bfloat16
    torch.testing.assert_close(net(x), plain(net, x))


@torch.no_grad()
def test_layers_with_more_to_them_are_the_modules() -> None:
    x, seen = image(), []
    hooked = network()
    hooked(x)
    hooked.blocks[1].conv3.register_forward_hook(lambda *args: seen.append(1))
    close(hooked(x), plain(hooked, x))
    assert len(seen) == 2
    for part in ("act", "blocks.0"):
        watched = network()
        watched.get_submodule(part).register_forward_pre_hook(lambda *args: seen.append(1))
        watched(x)
        assert len(seen) == (3 if part == "act" else 4)
    normed = network()
    nn.utils.parametrizations.weight_norm(normed.head)
    normed.requires_grad_(False)
    replaced = network()
    replaced.tail = nn.Sequential(replaced.tail, nn.Tanh())
    reflecting = network()
    reflecting.tail.padding_mode, reflecting.tail._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]
    other_block = network()
    other_block.blocks[0] = nn.Sequential(other_block.blocks[0], nn.Tanh())
    for net in (normed, replaced, reflecting, other_block):
        close(net(x), plain(net, x))
        assert not ran(net)


@torch.no_grad()
def test_copies_pickles_and_inference_mode() -> None:
    net, x = network(), image()
    with torch.inference_mode():
        net(x)
    assert ran(net) and not net._frozen._steps.head.weight.is_inference()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not ran(copied)
        close(copied(x), plain(net, x))
    with torch.inference_mode():
        made = network()  # weights without versions
        close(made(x), plain(made, x))
        assert not ran(made)


@torch.no_grad()
@pytest.mark.parametrize("first", [False, True])
def test_wrong_images_stay_the_modules_errors(first: bool) -> None:
    net = network()
    if not first:
        net(image())
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        net(image(channels=6))


@torch.no_grad()
def test_nothing_is_drawn_from_torchs_generator() -> None:
    net, x = network(), image()
    before = torch.get_rng_state()
    frozen._is_supported.cache_clear()
    net(x)
    assert ran(net) and torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_averaged_weights_are_followed() -> None:
    net, x = network(), image()
    for average in (ModelEmaV3(net, decay=0.5), AveragedModel(net)):
        for scale in (1.0, 1.5):
            for p in net.parameters():
                p.mul_(scale)
            step = average.update if isinstance(average, ModelEmaV3) else average.update_parameters
            step(net)
            averaged = average.module.requires_grad_(False)
            close(averaged(x), plain(averaged, x))
            assert ran(averaged)


def test_threads_may_meet_at_the_first_call() -> None:
    net, x, got = network(), image(), []
    wanted = plain(net, x)

    def work() -> None:
        with torch.no_grad():
            got.extend(net(x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    for y in got:
        close(y, wanted)


@torch.no_grad()
def test_a_torch_without_the_operations_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(frozen, "_pack", missing)
    frozen._is_supported.cache_clear()
    try:
        net, x = network(), image()
        close(net(x), plain(net, x))
        assert not ran(net) and not frozen._is_supported()
    finally:
        frozen._is_supported.cache_clear()
