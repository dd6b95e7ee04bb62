"""The flow: exact log-determinants, exact inverses, bounds, start, and independence of ambient precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from glem_augment.errors import DataError
from glem_augment.flows import AffineCoupling, Flow, MatExpCoupling, create_flow
from glem_augment.flows.layers import ActNorm
from glem_augment.flows.linear import RIDGE, Whiten
from glem_augment.flows.matexp_coupling import row_bounded

TINY = dict(depth=[2, 1], blocks=[1, 1], width=[6, 6])


def perturbed(module: Flow, scale: float = 0.15) -> Flow:
    """Every parameter moved at random, so that nothing is zero or symmetric any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return module


def jacobian_logdet(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """log|det| of the autograd Jacobian at one example [1, ...]."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v.view_as(x))[0].flatten(), x.flatten())
    return torch.linalg.slogdet(jacobian)[1]


def one_step(channels: int, **options: Any) -> dict[str, Any]:
    """A level of one step, on pixels that the squeeze makes 4 x `channels` channels."""
    return dict(name="mef_tiny", image_shape=(channels, 2, 2), depth=[1], blocks=[1], width=[5], **options)


FLOWS: dict[str, dict[str, Any]] = {
    "actnorm per channel": dict(one_step(1, actnorm="channel"), image_shape=(1, 4, 2)),
    "affine": one_step(1, coupling="affine"),
    "matexp, bound 1": one_step(1, bound=1.0),
    "matexp, low rank": one_step(13),
    "mef_tiny": dict(name="mef_tiny", image_shape=(1, 4, 4), **TINY),
    "mef_cifar": dict(name="mef_cifar", image_shape=(3, 4, 4), **{**TINY, "depth": [1, 1]}),
    "glow_tiny": dict(name="glow_tiny", image_shape=(3, 8, 4), **TINY),
    "bottleneck": one_step(1, subnet="bottleneck"),
    "patches": dict(name="mef_tiny", image_shape=(1, 8, 8), patch=4, **{**TINY, "depth": [1, 1]}),
    "identity": dict(name="identity", image_shape=(3, 3, 5)),
    "latent": dict(name="latent", image_shape=(8, 2, 2), depth=[1, 1], blocks=[1, 1], width=[6, 6]),
}


@pytest.mark.parametrize("name", FLOWS)
def test_logdet_and_inverse(name: str) -> None:
    """Log-determinants against slogdet both ways, round trip, and cancellation, in float64."""
    module = perturbed(create_flow(**FLOWS[name]).double())
    x = torch.rand(2, *FLOWS[name]["image_shape"], dtype=torch.float64) - 0.5
    for layer in module.modules():
        if isinstance(layer, MatExpCoupling):
            assert layer.low_rank == (layer.n > 24)
    if name == "patches":  # the first level is coarser
        assert module.part_shapes[0] == (8, 2, 2)
    z, logdet = module(x)
    back, back_logdet = module.inverse(z)
    assert logdet.shape == back_logdet.shape == (len(x),)
    assert z.dtype == back.dtype == logdet.dtype == torch.float64
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(logdet + back_logdet, torch.zeros_like(logdet), rtol=0, atol=1e-8)
    # One image each way, which is enough since the two log-determinants of an image cancel.
    for function, start, found in ((module, x[:1], logdet[0]), (module.inverse, z.detach()[1:], back_logdet[1])):
        torch.testing.assert_close(found, jacobian_logdet(function, start), rtol=0, atol=1e-8)


@pytest.mark.parametrize("per", ["element", "channel"])
def test_actnorm_starts_from_the_data_and_dead_channels_get_a_finite_scale(per: str) -> None:
    layer, x = ActNorm(3, 4, 4, per), torch.randn(500, 3, 4, 4) * torch.tensor([0.1, 1.0, 20.0])[:, None, None] + 5
    layer.initialise(x)
    z = (x + layer.bias) * layer.log_scale.exp()
    dims = (0,) if per == "element" else (0, 2, 3)
    torch.testing.assert_close(z.mean(dims), torch.zeros_like(z.mean(dims)), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dims, unbiased=False), torch.ones_like(z.std(dims)), rtol=0.02, atol=0)
    x = torch.randn(64, 3, 4, 4)
    x[:, 0] = 0.25  # a dead channel
    x[:, 1, 0, 0] = -0.5  # a dead element of a live channel
    layer.initialise(x)
    assert layer.log_scale.max().item() == pytest.approx(math.log(1e3))
    assert layer.log_scale[1].max() < math.log(2)  # not far above its channel's
    layer.initialise(x[:4])
    assert ((x + layer.bias) * layer.log_scale.exp())[:, 2].std(0).max() < 2  # of images that it has not seen


def test_initialisation_happens_once_and_is_stored() -> None:
    flow = create_flow("mef_tiny", (2, 4, 4), **{**TINY, "depth": [1, 2]})
    assert not any(norm.initialised for level in flow.levels for norm in level.norms)
    x = torch.rand(32, 2, 4, 4) - 0.5
    flow.initialise(x)
    z, _ = flow(x)  # the couplings do nothing yet, and the mixings are rotations
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), rtol=0, atol=1e-4)
    last = z[:, -math.prod(flow.part_shapes[-1]) :]
    assert last.square().mean().item() == pytest.approx(1, rel=0.05)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    loaded = create_flow("mef_tiny", (2, 4, 4), **{**TINY, "depth": [1, 2]})
    loaded.load_state_dict(before)
    for done in (flow, loaded):
        done.initialise(torch.rand(32, 2, 4, 4) * 100)
        assert all(torch.equal(v, before[k]) for k, v in done.state_dict().items())


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 3e37])
def test_row_sums_stay_below_the_bound(magnitude: float, bound: float = 2.0) -> None:
    raw = torch.randn(4, 6, 6, 3, 3) * magnitude
    s = row_bounded(raw, bound, 2)
    assert s.isfinite().all()
    assert float(s.abs().sum(2).max()) <= bound * (1 + 1e-6)
    diagonal = -1e6 * torch.eye(5)[None]  # a single entry may use the whole row
    torch.testing.assert_close(row_bounded(diagonal, bound, 2), -bound * torch.eye(5)[None])


def test_the_affine_coupling_is_its_formula(bound: float = 0.7) -> None:
    layer = AffineCoupling(2, lambda n_in, n_out: nn.Identity(), bound).double()
    raw = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    params = torch.stack([raw, raw.cos()])[:, None, None].transpose(0, 1)  # [B = 1, 2, H = 1, W = 1001]
    x2 = torch.linspace(-1, 2, 1001, dtype=torch.float64).view(1, 1, 1, -1)
    log_scale = bound * torch.tanh(raw / bound)
    for inverse in (False, True):
        y2, logdet = layer.transform(x2, params, inverse)
        want = (x2 - raw.cos()) / log_scale.exp() if inverse else log_scale.exp() * x2 + raw.cos()
        torch.testing.assert_close(y2, want, rtol=0, atol=1e-13)
        torch.testing.assert_close(logdet[0], -log_scale.sum() if inverse else log_scale.sum(), rtol=0, atol=1e-10)


def test_what_is_kept_of_frozen_weights_follows_every_change() -> None:
    flow = perturbed(create_flow("mef_tiny", (1, 8, 8), **TINY), 0.1)
    x = torch.rand(2, 1, 8, 8) - 0.5
    first = flow.levels[0]
    weights = [w for layer in (*first.norms, *first.mixing_layers) for w in layer.parameters()]
    seen: list[Tensor] = []

    def check(target: Flow = flow) -> None:
        """Frozen, twice, as an inference loop uses it, against a copy that has kept nothing."""
        fresh = copy.deepcopy(target)
        assert not any(level._cache for level in fresh.levels)
        want = fresh.requires_grad_(True)(x)[0].detach()
        target.requires_grad_(False)
        for _ in range(2):
            z, logdet = target(x)
            back, back_logdet = target.inverse(z)
            assert torch.equal(z, want) and all(level._cache for level in target.levels)
            torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
            torch.testing.assert_close(back_logdet, -logdet, rtol=1e-5, atol=1e-4)
        target.requires_grad_(True)
        assert not any(torch.equal(want, other) for other in seen)
        seen.append(want)

    check()
    ema = ModelEmaV3(flow, decay=0.5)
    flow(x)[0].square().sum().backward()
    torch.optim.Adam(weights, lr=0.01, fused=True).step()  # It leaves the version of the weights as it was.
    check()
    ema.update(flow)
    check(ema.module)
    flow.load_state_dict(perturbed(copy.deepcopy(flow), 0.1).state_dict())
    check()


def test_a_cache_filled_under_inference_mode_does_not_break_later_gradients() -> None:
    """timm validates under inference_mode; the adversarial policy then differentiates through decode."""
    flow = create_flow("mef_tiny", (1, 4, 4), **TINY).eval().requires_grad_(False)
    with torch.inference_mode():
        flow.inverse(flow(torch.zeros(1, 1, 4, 4))[0])
    z = torch.zeros(1, 16, requires_grad=True)
    flow.inverse(z)[0].sum().backward()
    assert z.grad.abs().max() > 0


@pytest.mark.parametrize("rank", [4, 12])
def test_whiten_is_exact_and_makes_the_covariance_the_identity(rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    mixing, dim = torch.randn(12, 12, generator=g, dtype=torch.float64), 12
    if rank < dim:  # low rank and a diagonal
        covariance = mixing[:, :rank] @ mixing[:, :rank].T + torch.diag(torch.rand(dim, generator=g).double() + 0.1)
        rest = covariance.diagonal() - mixing[:, :rank].square().sum(1)
        _, scales, directions = torch.linalg.svd(mixing[:, :rank].T, full_matrices=False)
    else:
        covariance, rest = mixing @ mixing.T, torch.zeros(dim, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        scales, directions = values.sqrt(), vectors.T
    covariance = covariance + RIDGE * covariance.trace() / dim * torch.eye(dim, dtype=torch.float64)
    layer, mean = Whiten(dim, rank).double(), torch.randn(dim, generator=g, dtype=torch.float64)
    layer.fit(mean, directions, scales, rest)
    x = torch.randn(5, dim, generator=g, dtype=torch.float64)
    assert torch.allclose(layer.inverse(layer(x)), x, atol=1e-10)
    matrix = layer(torch.eye(dim, dtype=torch.float64)) - layer(torch.zeros(1, dim, dtype=torch.float64))
    assert torch.allclose(matrix.T @ covariance @ matrix, torch.eye(dim, dtype=torch.float64), atol=1e-8)
    assert float(layer.logdet()) == pytest.approx(float(torch.linalg.slogdet(matrix).logabsdet))
    assert torch.allclose(layer(mean[None]), torch.zeros(1, dim, dtype=torch.float64), atol=1e-10)


def test_equal_images_cannot_be_whitened() -> None:
    layer, nothing = Whiten(12, 12), torch.zeros(12, dtype=torch.float64)
    for directions in (torch.zeros(0, 12), torch.eye(12)):  # no variation, and rounding
        scales = torch.full((len(directions),), 1e-7).double()
        with pytest.raises(DataError, match="whiten"):
            layer.fit(nothing, directions.double(), scales, nothing)
