"""What lies between the networks of affine steps, and what is made once for all, by kernels: torch's numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from glem_augment import create_flow
from glem_augment.flows import affine_joint_native, expm_native, fold_native
from glem_augment.flows.affine_joint import joint
from glem_augment.flows.layers import ActNorm, Mixing1x1
from glem_augment.flows.level import Level
from glem_augment.flows.prepared import Prepared, Weights, prepare

pytestmark = pytest.mark.skipif(not expm_native.has_kernel(2, 1.0), reason="no C++ compiler here")

# Which of network and mixing there are: before the first network, between two, after the last.
PLACES = {"first": (False, True), "between": (True, True), "last": (True, False)}


def close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for result, want in zip(got, wanted, strict=True):
        assert result.shape == want.shape
        error = float((result.double() - want.double()).abs().max())
        assert error <= tolerance * float(want.abs().max().clamp_min(1)), error


def arguments(n: int, place: str, batch: int = 3, side: tuple[int, int] = (5, 7)) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(n)
    coupled, mixed = PLACES[place]
    x = torch.randn(2 * n, batch, *side, generator=g)
    params = torch.randn(batch, 2 * n, *side, generator=g).contiguous(memory_format=torch.channels_last)
    matrix, shift = torch.randn(2 * n, 2 * n, generator=g) / n**0.5, torch.randn(2 * n, 1, generator=g)
    made = [x, params if coupled else None, matrix if mixed else None, shift if mixed else None]
    return [None if t is None else t.requires_grad_() for t in made]


def results(tensors: list[Tensor | None], bound: float = 2.0, inverse: bool = False) -> list[Tensor]:
    """Of the joint, and of its gradients."""
    made = [t for t in joint(*tensors, bound, inverse) if t is not None]
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in made]
    return [t.detach() for t in made] + list(torch.autograd.grad(made, [t for t in tensors if t is not None], weights))


def again(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [2, 4, 6, 12, 24])
def test_the_kernel_computes_what_torch_does(n: int, place: str, inverse: bool) -> None:
    assert affine_joint_native.has_kernel(n)
    # Partial vectors of pixels; more images than one chunk of sums; more blocks than are summed at a time.
    for batch, side in ((3, (5, 7)), (1, (1, 1)), (40, (7, 8)), (2, (24, 32))):
        tensors = arguments(n, place, batch, side)
        got, wanted = results(tensors, inverse=inverse), results(again(tensors, torch.float64), inverse=inverse)
        close(got, wanted, 3e-6 * math.exp(2.0))
        if PLACES[place][1]:
            assert torch.equal(got[1], got[0][:n].transpose(0, 1))
            assert got[1].is_contiguous(memory_format=torch.channels_last)


def test_without_a_kernel_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not affine_joint_native.has_kernel(3) and not affine_joint_native.has_kernel(26)
    tensors = arguments(2, "between")
    got = results(tensors)
    monkeypatch.setattr(affine_joint_native, "has_kernel", lambda n: False)
    close(got, results(tensors), 1e-5)


def test_numbers_of_another_kind_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, params, matrix, shift = (t.detach() for t in arguments(2, "between"))
    monkeypatch.setattr(affine_joint_native, "joint", lambda *args: pytest.fail("the kernel was called"))
    y, images, logdet = joint(x, params.double(), matrix.double(), shift.double(), 2.0)
    assert y.dtype == images.dtype == logdet.dtype == torch.float64
    assert joint(x.to("meta"), params.to("meta"), matrix.to("meta"), shift.to("meta"), 2.0)[0].is_meta


def test_layouts_threads_shapes_and_no_images() -> None:
    tensors = arguments(4, "between", batch=64)
    wanted = results(tensors)
    other = [
        tensors[0].detach().transpose(2, 3).contiguous().transpose(2, 3),
        tensors[1].detach().contiguous(),
        tensors[2].detach().T.contiguous().T,
        tensors[3].detach(),
    ]
    before = torch.get_num_threads()
    try:
        for count, given in ((1, tensors), (2, tensors), (1, [t.requires_grad_() for t in other])):
            torch.set_num_threads(count)
            for got, want in zip(results(given), wanted, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)
    x, params, matrix, shift = (t.detach() for t in tensors)
    for wrong in (params[:, :-1], params[:2], params[..., :-1], params[None]):
        with pytest.raises(ValueError, match="are not those of x2"):
            joint(x, wrong, matrix, shift, 2.0)
    for wrong in ((matrix[:-1], shift), (matrix, shift[:-1]), (matrix, shift[:, 0])):
        with pytest.raises(ValueError, match="are not those of"):
            joint(x, params, *wrong, 2.0)
    g, g_images, g_logdet = torch.ones_like(x), torch.ones(64, 4, 5, 7), torch.ones(64)
    for wrong in ((g[:, 1:], g_images, g_logdet), (g, g_images, g_logdet[1:]), (g, g_images[1:], g_logdet)):
        with pytest.raises(ValueError, match="are not those of x"):
            affine_joint_native.joint_backward(wrong, (True,) * 4, x, params, matrix, shift, 2.0, False)
    with pytest.raises(ValueError, match="are not those of x"):
        affine_joint_native.joint_backward((g[1:], g_images, None), (True,) * 4, x, None, matrix, shift, 2.0, False)
    y, images, logdet = joint(torch.empty(4, 0, 5, 7), torch.empty(0, 4, 5, 7), torch.eye(4), torch.zeros(4, 1), 2.0)
    assert y.shape == (4, 0, 5, 7) and images.shape == (0, 2, 5, 7) and logdet.shape == (0,)


def test_gradients_of_a_frozen_flow_are_those_of_the_images_alone() -> None:
    tensors = arguments(4, "between")
    whole = results(tensors)
    frozen = [tensors[0], tensors[1], tensors[2].detach(), tensors[3].detach()]
    y = joint(*frozen, 2.0)
    weights = [torch.linspace(-1, 2, t.numel()).view(t.shape) for t in y]
    for got, want in zip(torch.autograd.grad(y, frozen[:2], weights), whole[3:5], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("inverse", [False, True])
def test_it_can_be_differentiated_again_and_in_batches(place: str, inverse: bool) -> None:
    def second(tensors: list[Tensor | None]) -> list[Tensor]:
        leaves = [t for t in tensors if t is not None]
        made = [t for t in joint(*tensors, 2.0, inverse) if t is not None]
        first = torch.autograd.grad(sum(t.pow(3).sum() for t in made), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in first), leaves))

    tensors = arguments(2, place)
    for got, want in zip(second(tensors), second(again(tensors, torch.float64)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    y = joint(*tensors, 2.0, inverse)[0]
    leaves = [t for t in tensors if t is not None]
    rows = torch.eye(4, y.numel()).view(4, *y.shape)
    batched = torch.autograd.grad(y, leaves, rows, is_grads_batched=True, retain_graph=True)
    for index, row in enumerate(rows):
        alone = torch.autograd.grad(y, leaves, row, retain_graph=True)
        close([t[index] for t in batched], list(alone), 1e-5)


# ---- what all images share -------------------------------------------------------------------------------------------


# That an entry of a log_scale stands for, and those of an image.
PIXELS = (15, 15)


def weights_of(steps: int, channels: int, dtype: torch.dtype = torch.float32) -> Weights:
    torch.manual_seed(channels)
    norms, mixings = (
        [ActNorm(channels, 3, 5, "channel") for _ in range(steps)],
        [Mixing1x1(channels) for _ in range(steps)],
    )
    for a in norms:
        nn.init.normal_(a.bias)
        nn.init.normal_(a.log_scale, std=0.5)
    for m in mixings:
        nn.init.normal_(m.weight, std=1 / channels**0.5)
    for layer in (*norms, *mixings):
        layer.to(dtype)
    return Weights([a.bias for a in norms], [a.log_scale for a in norms], [m.weight for m in mixings])


def of(prepared: Prepared, weights: list[Tensor]) -> list[Tensor]:
    """All that was prepared, and gradients."""
    assert prepared.scale is None
    made = [*prepared.matrix, *prepared.shift, prepared.logdet]
    upstream = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in made]
    return [t.detach() for t in made] + list(torch.autograd.grad(made, weights, upstream))


@pytest.mark.parametrize(("steps", "channels"), [(1, 4), (3, 12), (2, 48), (8, 4)])
def test_folding_computes_what_torch_does(steps: int, channels: int) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        weights = weights_of(steps, channels, dtype)
        assert fold_native.serves(*weights) == (dtype is torch.float32)
        found.append(of(prepare(weights, PIXELS, True, inverse=False), weights.all()))
    close(*found, 3e-6)


def test_folding_without_gradients_and_of_frozen_weights() -> None:
    weights = weights_of(2, 8)
    wanted = prepare(weights, PIXELS, True, inverse=False)
    with torch.no_grad():
        bare = prepare(weights, PIXELS, True, inverse=False)
    assert torch.equal(bare.matrix[1], wanted.matrix[1]) and not bare.matrix[1].requires_grad
    first, second = weights.biases
    first.requires_grad_(False)
    partly = prepare(weights, PIXELS, True, inverse=False)
    sum(t.sum() for t in (*partly.matrix, *partly.shift)).backward()
    assert first.grad is None and float(second.grad.abs().max()) > 0


def test_weights_of_another_kind_are_left_to_torch() -> None:
    biases, log_scales, (one, two) = weights_of(2, 8)
    assert fold_native.serves(biases, log_scales, [one, two])
    for wrong in (nn.Parameter(two.T), nn.Parameter(two.double()), two + 0, nn.Parameter(two.to("meta"))):
        assert not fold_native.serves(biases, log_scales, [one, wrong])
    assert not fold_native.serves([biases[0], nn.Parameter(torch.zeros(7))], log_scales, [one, two])


# ---- whole flows -----------------------------------------------------------------------------------------------------


def outcome(flow: nn.Module, x: Tensor) -> list[Tensor]:
    """There, back, and the gradients of both."""
    result = []
    for run in (flow, flow.inverse):
        x = x.detach().requires_grad_()
        y, logdet = run(x)
        weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in (y, logdet)]
        result += [y.detach(), logdet.detach(), *torch.autograd.grad((y, logdet), (x, *flow.parameters()), weights)]
        x = y
    return result


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8), (13, 8, 8)])
def test_a_flow_with_joints_is_the_flow_without(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    flow = create_flow("glow_tiny", shape, depth=[3, 1], width=[8, 8])
    x = torch.rand(6, *shape) - 0.5
    flow.initialise(x)
    for p in flow.parameters():
        if p.ndim == 4:
            nn.init.normal_(p, std=0.05)
    joined = flow.levels[0]._has_joints(torch.zeros(4 * shape[0], 1, 2, 2), 1, flow.levels[0].prepare(False), None)
    assert joined == (shape[0] < 13)
    monkeypatch.setattr(Level, "_run_as_node", lambda *args: None)
    got, exact = outcome(flow, x[:4]), outcome(copy.deepcopy(flow).double(), x[:4].double())
    monkeypatch.setattr(Level, "_has_joints", lambda *args: False)
    wanted = outcome(flow, x[:4])
    for result, other, want in zip(got, wanted, exact, strict=True):
        scale = 1e-5 * max(1.0, float(want.abs().max()))
        assert float((result - want).abs().max()) <= scale >= float((other - want).abs().max())


def test_flows_without_joints_stay_without() -> None:
    for kwargs in (dict(coupling="matexp"), dict(actnorm="element")):
        flow = create_flow("glow_tiny", (1, 8, 8), depth=[2], blocks=[1], width=[8], **kwargs)
        level = flow.levels[0]
        assert not level._has_joints(torch.zeros(4, 1, 4, 4), 1, level.prepare(False), None)
