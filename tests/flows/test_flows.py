"""The flow: exact log-determinants, exact inverses, bounds, start, and independence of ambient precision."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from glem_augment.flows import (
    ActNorm,
    AffineCoupling,
    Bijection,
    MatExpCoupling,
    Mixing1x1,
    Sequence,
    Squeeze,
    create_flow,
)
from glem_augment.flows.coupling import row_bounded
from glem_augment.flows.subnets import ConvSubnet

SMALL = {
    "mef_tiny": dict(depth=[2, 1], blocks=[1, 1], width=[6, 6]),
    "mef_cifar": dict(depth=[1, 1], blocks=[1, 1], width=[6, 6]),
    "glow_tiny": dict(depth=[2, 1], blocks=[1, 1], width=[6, 6]),
    "identity": {},
}


def subnet(n_in: int, n_out: int) -> ConvSubnet:
    return ConvSubnet(n_in, n_out, 5, 1)


def perturbed(module: Bijection, scale: float = 0.2) -> Bijection:
    """Every parameter moved at random, so that nothing is zero or symmetric any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return module


def jacobian_logdet(module: Bijection, x: Tensor, inverse: bool = False) -> Tensor:
    """log|det| of the autograd Jacobian of one example [1, ...]."""

    def flat(v: Tensor) -> Tensor:
        return (module.inverse if inverse else module)(v.reshape(x.shape))[0].flatten()

    return torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, x.flatten()))[1]


def check_bijection(module: Bijection, x: Tensor, places: float = 1e-9) -> None:
    """Log-determinant against slogdet both ways, round trip, and cancellation, in float64."""
    assert x.dtype == torch.float64
    z, logdet = module(x)
    back, back_logdet = module.inverse(z)
    assert logdet.shape == back_logdet.shape == (len(x),)
    assert z.dtype == back.dtype == logdet.dtype == torch.float64
    torch.testing.assert_close(back, x, rtol=0, atol=places)
    torch.testing.assert_close(logdet + back_logdet, torch.zeros_like(logdet), rtol=0, atol=places)
    for i in range(len(x)):
        torch.testing.assert_close(logdet[i], jacobian_logdet(module, x[i : i + 1]), rtol=0, atol=places)
        torch.testing.assert_close(
            back_logdet[i], jacobian_logdet(module, z[i : i + 1].detach(), inverse=True), rtol=0, atol=places
        )


LAYERS = {
    "actnorm-element": lambda: ActNorm(4, 4, 2, "element"),
    "actnorm-channel": lambda: ActNorm(4, 4, 2, "channel"),
    "mixing": lambda: Mixing1x1(4),
    "squeeze": Squeeze,
    "affine": lambda: AffineCoupling(4, subnet, 2.0),
    "matexp-1": lambda: MatExpCoupling(4, subnet, 1.0),
    "matexp-2": lambda: MatExpCoupling(4, subnet, 2.0),
    "sequence": lambda: Sequence([Mixing1x1(4), Squeeze(), ActNorm(16, 2, 1), MatExpCoupling(16, subnet, 1.5)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_logdet_and_inverse(name: str) -> None:
    check_bijection(perturbed(LAYERS[name]().double()), torch.randn(2, 4, 4, 2, dtype=torch.float64))


@pytest.mark.parametrize("half", [24, 25])
def test_wide_coupling_logdet_and_inverse(half: int) -> None:
    """24 is the last full matrix, 25 the first low-rank one."""
    layer = perturbed(MatExpCoupling(2 * half, subnet, 2.0, rank=3).double())
    assert layer.low_rank == (half > 24)
    check_bijection(layer, torch.randn(1, 2 * half, 1, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("preset", "shape"),
    [("mef_tiny", (1, 4, 8)), ("mef_cifar", (5, 4, 4)), ("glow_tiny", (3, 8, 4)), ("identity", (3, 3, 5))],
)
def test_whole_flow_logdet_and_inverse(preset: str, shape: tuple[int, int, int]) -> None:
    flow = perturbed(create_flow(preset, shape, **SMALL[preset]).double(), 0.15)
    x = torch.rand(2, *shape, dtype=torch.float64) - 0.5
    check_bijection(flow, x, 1e-8)
    assert flow(x)[0].shape == (2, math.prod(shape))


@pytest.mark.parametrize("per", ["element", "channel"])
def test_actnorm_starts_from_the_data(per: str) -> None:
    layer = ActNorm(3, 4, 6, per)
    scale = torch.tensor([0.1, 1.0, 20.0])[:, None, None]
    x = torch.randn(500, 3, 4, 6) * scale + 5
    layer.initialise(x)
    z, logdet = layer(x)
    dims = (0,) if per == "element" else (0, 2, 3)
    torch.testing.assert_close(z.mean(dims), torch.zeros_like(z.mean(dims)), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dims, unbiased=False), torch.ones_like(z.std(dims)), rtol=1e-4, atol=0)
    assert logdet[0].item() == pytest.approx(-24 * math.log(2.0), rel=0.05)  # product of 0.1, 1 and 20


@pytest.mark.parametrize("per", ["element", "channel"])
def test_dead_channels_get_a_finite_scale(per: str) -> None:
    x = torch.randn(64, 3, 4, 4)
    x[:, 0] = 0.25  # a dead channel
    x[:, 1, 0, 0] = -0.5  # a dead element of a live channel
    layer = ActNorm(3, 4, 4, per)
    layer.initialise(x)
    z, logdet = layer(torch.rand(8, 3, 4, 4) - 0.5)
    assert z.isfinite().all() and logdet.isfinite().all()
    assert z.abs().max() < 1e3
    assert layer.log_scale[1].max() < math.log(1 / 0.09)  # no more than ten times its channel's scale


def test_initialisation_happens_once_and_is_stored() -> None:
    flow = create_flow("mef_tiny", (2, 4, 4), **SMALL["mef_tiny"])
    norms = [m for m in flow.modules() if isinstance(m, ActNorm)]
    assert len(norms) == 3 and not any(n.initialised for n in norms)
    x = torch.rand(32, 2, 4, 4) - 0.5
    flow.initialise(x)
    assert all(n.initialised for n in norms)
    for layer in flow.levels[0].layers:  # each ActNorm sees what the layers before it give
        x, _ = layer(x)
        if isinstance(layer, ActNorm):
            torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]), rtol=0, atol=1e-4)
            torch.testing.assert_close(x.std(0, unbiased=False), torch.ones_like(x[0]), rtol=1e-2, atol=0)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    loaded = create_flow("mef_tiny", (2, 4, 4), **SMALL["mef_tiny"])
    loaded.load_state_dict(before)
    for done in (flow, loaded):
        done.initialise(torch.rand(32, 2, 4, 4) * 100)
        assert all(torch.equal(v, before[k]) for k, v in done.state_dict().items())


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 3e37])
@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
def test_row_sums_stay_below_the_bound(bound: float, magnitude: float) -> None:
    raw = torch.randn(4, 6, 6, 3, 3) * magnitude
    s, denominators = row_bounded(raw, bound, 2)
    assert s.isfinite().all() and torch.equal(denominators, 1 + raw.abs().sum(2, keepdim=True))
    assert float(s.abs().sum(2).max()) <= bound * (1 + 1e-6)
    diagonal = -1e6 * torch.eye(5)[None]  # a single entry may use the whole row
    torch.testing.assert_close(row_bounded(diagonal, bound, 2)[0], -bound * torch.eye(5)[None])


@pytest.mark.parametrize("bound", [0.7, 2.0])
def test_the_affine_coupling_is_its_formula(bound: float) -> None:
    layer = AffineCoupling(2, subnet, bound).double()
    raw = torch.linspace(-30, 30, 1001, dtype=torch.float64).requires_grad_()
    params = torch.stack([raw, raw.cos()])[:, None, None].transpose(0, 1)  # [B = 1, 2, H = 1, W = 1001]
    x2 = torch.linspace(-1, 2, 1001, dtype=torch.float64).view(1, 1, 1, -1)
    log_scale = bound * torch.tanh(raw / bound)
    for inverse in (False, True):
        y2, logdet = layer.transform(x2, params, inverse)
        want = (x2 - raw.cos()) / log_scale.exp() if inverse else log_scale.exp() * x2 + raw.cos()
        torch.testing.assert_close(y2, want, rtol=0, atol=1e-13)
        torch.testing.assert_close(logdet[0], -log_scale.sum() if inverse else log_scale.sum(), rtol=0, atol=1e-10)
        slopes = [torch.autograd.grad(v.sum(), raw, retain_graph=True)[0] for v in (y2, want)]
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


def test_what_is_kept_of_frozen_weights_follows_every_change() -> None:
    flow = perturbed(create_flow("mef_tiny", (1, 8, 8), **SMALL["mef_tiny"]), 0.1)
    x = torch.rand(2, 1, 8, 8) - 0.5
    weights = flow.levels[0].mixing_weights()

    def check(target: Bijection = flow) -> Tensor:
        """Frozen, twice, as an inference loop uses it, against a copy that has kept nothing."""
        fresh = copy.deepcopy(target)
        assert not any(level._cache for level in fresh.levels)
        want = fresh.requires_grad_(True)(x)[0].detach()
        target.requires_grad_(False)
        for _ in range(2):
            z, logdet = target(x)
            back, back_logdet = target.inverse(z)
            assert torch.equal(z, want)
            torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
            torch.testing.assert_close(back_logdet, -logdet, rtol=1e-5, atol=1e-4)
        assert all(level._cache for level in target.levels)
        target.requires_grad_(True)
        return want

    seen = [check()]
    for optimizer in (torch.optim.SGD(weights, lr=0.01), torch.optim.Adam(weights, lr=0.01, fused=True)):
        optimizer.zero_grad()
        flow(x)[0].square().sum().backward()
        optimizer.step()  # A fused step leaves the version of the weights as it was.
        seen.append(check())
    ema = ModelEmaV3(flow, decay=0.5)
    check(ema.module)
    with torch.no_grad():
        weights[2].mul_(1.1)
    seen.append(check())
    ema.update(flow)
    seen.append(check(ema.module))
    flow.load_state_dict(perturbed(copy.deepcopy(flow), 0.1).state_dict())
    seen.append(check())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_a_cache_filled_under_inference_mode_does_not_break_later_gradients() -> None:
    """timm validates under inference_mode; the adversarial policy then differentiates through decode."""
    flow = create_flow("mef_tiny", (1, 4, 4), **SMALL["mef_tiny"]).eval().requires_grad_(False)
    with torch.inference_mode():
        flow.inverse(flow(torch.zeros(1, 1, 4, 4))[0])
    z = torch.zeros(1, 16, requires_grad=True)
    flow.inverse(z)[0].sum().backward()
    assert z.grad.abs().max() > 0
