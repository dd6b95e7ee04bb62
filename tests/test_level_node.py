"""The steps of an affine level at once, with a graph as one node and without one: the numbers of the steps one by one,
and only where nothing else is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glem_augment import create_flow
from glem_augment.flows import affine_joint_native, affine_level
from glem_augment.flows.coupling import AffineCoupling
from glem_augment.flows.level import Level
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.subnets import CONV_SUBNETS, ConvSubnet

pytestmark = pytest.mark.skipif(not affine_joint_native.has_kernel(2), reason="no C++ compiler here")


def flow_and_images(shape: tuple[int, int, int] = (1, 12, 20), batch: int = 5, **options: object):
    """Networks that do something, and ActNorms and mixings away from where they start."""
    torch.manual_seed(0)
    options = {"depth": [3, 2], "blocks": [1, 1], "width": [8, 8], **options}
    flow = create_flow("glow_tiny", shape, **options)
    flow.initialise(torch.rand(64, *shape) - 0.5)
    for p in flow.parameters():
        if p.ndim == 4:
            nn.init.normal_(p, std=0.1)
    return flow, torch.rand(batch, *shape) - 0.5


def is_node(level: Level, x: Tensor) -> bool:
    return type(level(x.transpose(0, 1))[0].grad_fn).__name__ == "_StepsBackward"


def outcome(flow: MultiscaleFlow, x: Tensor, wanted: list[Tensor] | None = None) -> list[Tensor]:
    """What the flow makes of x, and the gradients of all that has one, and of x."""
    x = x.detach().requires_grad_()
    y, logdet = flow(x)
    wanted = [x, *(p for p in flow.parameters() if p.requires_grad)] if wanted is None else wanted
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in (y, logdet)]
    return [y.detach(), logdet.detach(), *torch.autograd.grad((y, logdet), wanted, weights)]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither at once nor joined."""
    monkeypatch.setattr(Level, "_run_as_node", lambda *args: None)
    monkeypatch.setattr(Level, "_has_joints", lambda *args: False)
    return monkeypatch


def close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for result, want in zip(got, wanted, strict=True):
        assert result.shape == want.shape
        if result.numel():
            error = float((result.double() - want.double()).abs().max())
            assert error <= tolerance * max(1.0, float(want.abs().max())), error


@pytest.mark.parametrize("kind", CONV_SUBNETS)
@pytest.mark.parametrize(
    ("shape", "batch", "patch"),
    [((1, 12, 20), 5, 2), ((3, 8, 8), 40, 2), ((3, 4, 12), 1, 2), ((2, 24, 8), 3, 4), ((1, 12, 18), 2, 6)],
)
def test_a_node_has_the_numbers_and_gradients_of_the_steps(
    kind: str, shape: tuple[int, int, int], batch: int, patch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(subnet=kind, patch=patch)
    if patch > 2:
        options.update(depth=[2], blocks=[1], width=[8])
    flow, x = flow_and_images(shape, batch, **options)
    assert is_node(flow.levels[0], x) == (shape[0] * patch**2 % 4 == 0)
    got, exact = outcome(flow, x), outcome(copy.deepcopy(flow).double(), x.double())
    wanted = outcome(flow, x) if one_by_one(monkeypatch) else []
    for result, other, true in zip(got, wanted, exact, strict=True):
        scale = 1e-5 * max(1.0, float(true.abs().max()))
        assert float((result - true).abs().max()) <= scale >= float((other - true).abs().max())


def test_images_in_any_layout_and_gradients_that_are_expanded() -> None:
    flow, x = flow_and_images((2, 8, 12))
    wanted = outcome(flow, x)
    other = x.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (x.contiguous(memory_format=torch.channels_last), other, torch.cat([x, x], 2)[:, :, : x.shape[2]]):
        for a, b in zip(outcome(flow, given), wanted, strict=True):
            assert torch.equal(a, b)
    x.requires_grad_()
    y, logdet = flow(x)
    leaves = [x, *flow.parameters()]
    simple = torch.autograd.grad(y.sum() + logdet.sum(), leaves, retain_graph=True)
    full = torch.autograd.grad((y, logdet), leaves, (torch.ones_like(y), torch.ones_like(logdet)))
    for a, b in zip(simple, full, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("part", ["networks", "norms", "mixings", "one bias", "images"])
def test_gradients_where_some_are_not_wanted(part: str) -> None:
    flow, x = flow_and_images()
    everything = dict(zip(["x", *flow.parameters()], outcome(flow, x)[2:], strict=True))
    level = flow.levels[0]
    if part == "networks":
        for coupling in level.couplings:
            coupling.requires_grad_(False)
    elif part == "one bias":
        level.norms[1].bias.requires_grad_(False)
    elif part != "images":
        for layer in getattr(level, part):
            layer.requires_grad_(False)
    assert is_node(level, x)
    wanted = [p for p in flow.parameters() if p.requires_grad]
    y, logdet = flow(x.requires_grad_(part != "images"))
    weights = [torch.linspace(-1, 2, t.numel()).view(t.shape) for t in (y, logdet)]
    for p, g in zip(wanted, torch.autograd.grad((y, logdet), wanted, weights), strict=True):
        assert torch.equal(g, everything[p])


def test_only_log_det_or_only_the_image_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = flow_and_images()

    def each() -> list[Tensor]:
        leaves = list(flow.parameters())
        made = (flow(x)[0].square().sum(), flow(x)[1].sum())
        return [g for t in made for g in torch.autograd.grad(t, leaves, allow_unused=True, materialize_grads=True)]

    got = each()
    close(got, each() if one_by_one(monkeypatch) else [], 1e-5)


def test_it_can_be_differentiated_again_in_batches_and_twice() -> None:
    flow, x = flow_and_images((1, 8, 8), batch=2, depth=[2], blocks=[1], width=[4])

    def second(flow: MultiscaleFlow, x: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(), *flow.parameters()]
        y, logdet = flow(x)
        first = torch.autograd.grad(y.pow(3).mean() + logdet.square().sum() / 1e3, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in first), leaves))

    close(second(flow, x), second(copy.deepcopy(flow).double(), x.detach().double()), 1e-4)
    leaves = [x, *flow.parameters()]
    y, logdet = flow(x)
    found = [torch.autograd.grad((y, logdet), leaves, (y.detach(), logdet.detach()), retain_graph=True) for _ in "12"]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    rows = torch.eye(3, y.numel()).view(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, rows, is_grads_batched=True, retain_graph=True)
    for index, row in enumerate(rows):
        close([t[index] for t in batched], list(torch.autograd.grad(y, leaves, row, retain_graph=True)), 1e-5)


def test_a_weight_or_an_image_that_changes_before_the_backward_is_an_error() -> None:
    for change in ("network", "norm", "image"):
        flow, x = flow_and_images()
        y, _ = flow(x)
        level = flow.levels[0]
        where = {"network": level.couplings[0].net.head.weight, "norm": level.norms[0].log_scale, "image": x}[change]
        with torch.no_grad():
            where.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_step_keeps_no_more_than_the_steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = flow_and_images((3, 16, 16), batch=8)
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}

    def kept() -> int:
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made = flow(x)
        assert made[0].requires_grad
        return sum(held.values())

    node = kept()
    assert node <= 1.01 * (kept() if one_by_one(monkeypatch) else 0)


def test_memory_of_a_node_is_free_as_soon_as_it_is_used() -> None:
    flow, x = flow_and_images(depth=[4], blocks=[1], width=[8])
    order: list[int] = []

    class Kept:
        def __init__(self, index: int, tensor: Tensor) -> None:
            self.index, self.tensor = index, tensor

        def __del__(self) -> None:
            order.append(self.index)

    count = [0]

    def pack(t: Tensor) -> Kept:
        count[0] += 1
        return Kept(count[0], t)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        y, _ = flow(x)
    seen: list[int] = []
    handle = flow.levels[0].couplings[0].net.head.weight.register_hook(lambda g: seen.append(len(order)))
    y.sum().backward()
    handle.remove()
    assert count[0] > 20 and seen == [count[0]] == [len(order)]


class _Own(ConvSubnet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


def _others_network(flow: MultiscaleFlow) -> None:
    coupling = flow.levels[0].couplings[0]
    coupling.net = _Own(coupling.half, 2 * coupling.half, 4, 1)


class _OwnCoupling(AffineCoupling):
    pass


def _others_coupling(flow: MultiscaleFlow) -> None:
    flow.levels[0].couplings[0].__class__ = _OwnCoupling


def _frozen_run(flow: MultiscaleFlow) -> None:
    """Weights in blocks are kept, and must be forgotten when an optimizer may write to them."""
    net = flow.levels[0].couplings[0].net.requires_grad_(False)
    with torch.no_grad():
        flow(torch.zeros(1, 1, 12, 20))
    net.requires_grad_(True)


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: flow.double(),
        lambda flow: flow.set_memory("reversible"),
        lambda flow: flow.set_autocast(torch.bfloat16),
        lambda flow: flow.levels[0].couplings[1].net.register_forward_hook(lambda *args: None),
        lambda flow: flow.levels[0].couplings[1].net.tail.register_full_backward_hook(lambda *args: None),
        lambda flow: [layer.requires_grad_(False) for layer in (*flow.levels[0].norms, *flow.levels[0].mixings)],
        lambda flow: flow.requires_grad_(False),
        _others_network,
        _others_coupling,
        _frozen_run,
    ],
    ids="float64 reversible autocast hook backward-hook frozen-mixings frozen subclass coupling packed".split(),
)
def test_what_else_is_asked_for_is_done(
    change: Callable[[MultiscaleFlow], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = flow_and_images()
    change(flow)
    x = x.to(next(flow.parameters()).dtype)
    assert not is_node(flow.levels[0], x)
    tolerance = 2e-2 if flow.autocast is not None else 1e-5
    close(outcome(flow, x), outcome(flow, x) if one_by_one(monkeypatch) else [], tolerance)


def test_flows_of_another_kind_and_surroundings_are_left_alone() -> None:
    for options in (dict(coupling="matexp"), dict(actnorm="element"), dict(subnet="transformer", width=[32, 32])):
        flow, x = flow_and_images(**options)
        assert not is_node(flow.levels[0], x)
    flow, x = flow_and_images()
    assert is_node(flow.levels[0], x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_node(flow.levels[0], x)
    assert not is_node(flow.levels[0], x[:0])


def test_compiled_steps_are_left_where_a_node_is_faster() -> None:
    flow, x = flow_and_images()
    flow.compile_steps(backend="eager")
    assert is_node(flow.levels[0], x)
    flow.levels[0].couplings[0].net.act.register_forward_hook(lambda *args: None)
    assert not is_node(flow.levels[0], x)


# ---- without a graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 12, 20), (3, 8, 8), (2, 4, 36)])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_there_and_back_without_a_graph(
    shape: tuple[int, int, int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = flow_and_images(shape, batch)
    before = x.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, logdet = flow(x)
            given = z.clone()
            back, undone = flow.inverse(z)
            assert torch.equal(z, given) and torch.equal(x, before)
    exact, flow = copy.deepcopy(flow).double(), flow.requires_grad_(False)
    with torch.no_grad():
        frozen = [*flow(x), *flow.inverse(z)]
        one_by_one(monkeypatch)
        for made in ([z, logdet, back, undone], frozen, [*flow(x), *flow.inverse(z)]):
            close(made, [*exact(x.double()), *exact.inverse(z.double())], 1e-5)
    close([back], [x], 1e-4)


def test_what_a_hook_has_seen_stays_as_it_was() -> None:
    flow, x = flow_and_images()
    flow.requires_grad_(False)
    seen: list[tuple[Tensor, Tensor]] = []
    for coupling in flow.levels[0].couplings:
        coupling.net.register_forward_hook(lambda net, args, out: seen.append((args[0], args[0].clone())))
    with torch.no_grad():
        flow.inverse(flow(x)[0])
    assert len(seen) == 6 and all(torch.equal(kept, copied) for kept, copied in seen)


class _Wrong(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(torch.cat([x, x], 1))


@pytest.mark.parametrize("change", [lambda p: p[:, :-1], lambda p: p[:1], lambda p: p[..., 1:], lambda p: p.double()])
def test_a_network_of_another_kind_is_an_error(change: Callable[[Tensor], Tensor]) -> None:
    flow, x = flow_and_images()
    flow.levels[0].couplings[1].net = _Wrong(change)
    with torch.no_grad(), pytest.raises(ValueError, match="a network makes float32"):
        flow(x)


def test_threads_make_no_difference() -> None:
    flow, x = flow_and_images((3, 16, 16), batch=33)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                z, logdet = flow(x)
                found.append([z, logdet, *flow.inverse(z)])
    finally:
        torch.set_num_threads(before)
    close(found[0], found[1], 1e-5)


def test_reversible_training_runs_the_same_steps() -> None:
    flow, x = flow_and_images()
    wanted = outcome(flow, x)
    flow.set_memory("reversible")
    close(outcome(flow, x), wanted, 1e-5)


def test_a_level_without_networks_results_kept_is_told_so() -> None:
    """The states of a pass without a trail are the place of its result."""
    flow, x = flow_and_images((1, 4, 4), depth=[2], blocks=[1], width=[4])
    level = flow.levels[0]
    with torch.no_grad():
        prepared = level.prepare(False)
        mixings = [(m.data_ptr(), s.data_ptr()) for m, s in zip(prepared.matrix, prepared.shift, strict=True)]
        nets = [coupling.net for coupling in level.couplings]
        runs = [
            affine_level.run_steps(x.transpose(0, 1), 2, mixings, [2.0, 2.0], nets, torch.zeros(5), kept=kept)
            for kept in (False, True)
        ]
    (y, trail), (kept_y, kept_trail) = runs
    assert torch.equal(y, kept_y) and trail.states.data_ptr() == y.data_ptr()
    assert kept_trail.states.shape == (2, 4, 5, 2, 2) and len(kept_trail.params) == 2
