"""All-class log-densities: kernels and torch's operations alike, against float64 by autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from glem_augment.latent import densities, densities_native
from glem_augment.latent.densities import Parametrisation, density_terms
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.latent.kld import kld_pair_sum

PSIS = [(0.5, 0.2, 0.05), (5.0, 0.2, 0.05), (0.1, 3.0, 2.0), None]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    probe = torch.zeros(1, 1)
    if not request.param:
        monkeypatch.setattr(densities_native, "serves", lambda *tensors: False)
    elif not densities_native.serves(probe, probe):
        pytest.skip("no C++ compiler here")
    return request.param


def some_gaussians(k: int, d: int, psi: tuple[float, float, float] | None) -> ClassGaussians:
    g = torch.Generator().manual_seed(k + d)
    gaussians = ClassGaussians(k, d, psi)
    with torch.no_grad():
        gaussians.mu.copy_(torch.randn(k, d, generator=g))
        spread = torch.randn(k, d, generator=g)
        gaussians.s.copy_(4 * spread if psi else 0.3 + 0.3 * spread)  # some below the lower bound
    return gaussians


def reference(gaussians: ClassGaussians, z: Tensor) -> Tensor:
    """Sums over dimensions in float64, of torch's operations and nothing else."""
    var = (
        gaussians.s.clamp_min(gaussians._lowest)
        if gaussians.psi is None
        else gaussians.psi[0] * torch.sigmoid(gaussians.psi[1] * gaussians.s) + gaussians.psi[2]
    )
    parts = (z[:, None] - gaussians.mu).square() / var + var.log() + math.log(2 * math.pi)
    return -0.5 * parts.sum(2)


def assert_close(found: Tensor, want: Tensor, tolerance: float) -> None:
    assert found.shape == want.shape
    scale = float(want.detach().abs().max())
    assert float((found.detach().double() - want.detach()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("psi", PSIS)
@pytest.mark.parametrize(
    ("k", "d"), [(1, 1), (3, 15), (2, 16), (5, 17), (64, 30), (65, 511), (130, 33), (2, 3072), (201, 70)]
)
def test_values_and_gradients_are_those_of_float64(native: bool, k: int, d: int, psi) -> None:
    gaussians = some_gaussians(k, d, psi)
    z = torch.randn(7, d, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(7, k, generator=torch.Generator().manual_seed(1))
    exact, exact_z = copy.deepcopy(gaussians).double(), z.detach().double().requires_grad_()
    want = reference(exact, exact_z)
    wanted = torch.autograd.grad((want * weights).sum(), (exact_z, exact.mu, exact.s))
    found = gaussians.log_prob(z)
    assert_close(found, want, 2e-6)
    leaves = (z, gaussians.mu, gaussians.s)
    for gradient, exactly in zip(torch.autograd.grad((found * weights).sum(), leaves), wanted, strict=True):
        assert_close(gradient, exactly, 2e-5)
    with torch.no_grad():
        assert_close(gaussians.log_prob(z), want, 2e-6)


@pytest.mark.parametrize("psi", [*PSIS, (1e-4, 1.0, 1e-9), (1e25, 0.5, 1e-12)])
def test_terms_are_as_exact_as_float32_goes(native: bool, psi) -> None:
    gaussians = some_gaussians(3, 5000, psi)
    with torch.no_grad():
        terms = density_terms(gaussians.mu, gaussians.s, gaussians._how)
        exact = density_terms(gaussians.mu.double(), gaussians.s.double(), gaussians._how)
    for found, want in zip(terms, exact, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=3e-6, atol=0)


@pytest.fixture
def in_shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; of any number of classes each has a share then, in blocks of a line."""
    for name in ("_MANY", "_SHARE", "_BLOCK"):
        monkeypatch.setattr(densities, name, 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("k", "threads"), [(7, 1), (7, 2), (7, 5), (6, 2), (6, 3)])
def test_shares_change_nothing(
    native: bool, k: int, threads: int, batch: int, in_shares: Callable[[int], None], request: pytest.FixtureRequest
) -> None:
    """Of any size, in many blocks, where memory that is nobody's yet is full of what is no number."""
    gaussians, z = some_gaussians(k, 700, PSIS[0]), torch.randn(batch, 700).requires_grad_()
    exact, exact_z = copy.deepcopy(gaussians).double(), z.detach().double().requires_grad_()
    want = reference(exact, exact_z)
    wanted = torch.autograd.grad(want.square().sum(), (exact_z, exact.mu, exact.s))
    in_shares(threads)
    before = torch.are_deterministic_algorithms_enabled()
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(before))
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    shares = densities._Shares(gaussians.mu)
    assert shares._number == (threads if torch.backends.mkl.is_available() else 1)
    found = gaussians.log_prob(z)
    assert found.is_contiguous() and not found._is_view()
    gradients = torch.autograd.grad(found.square().sum(), (z, gaussians.mu, gaussians.s))
    if not batch:
        assert found.shape == (0, k) and not any(gradient.any() for gradient in gradients)
        return
    assert_close(found, want, 2e-6)
    for gradient, exactly in zip(gradients, wanted, strict=True):
        assert_close(gradient, exactly, 2e-5)
    # Laid out in another way, and all the same.
    upstream = torch.randn(k, batch).T
    for g in (upstream, torch.ones(1, 1).expand(batch, k)):
        one, other = (torch.autograd.grad(gaussians.log_prob(z), (z, gaussians.mu), h) for h in (g, g.contiguous()))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_what_is_no_number_stays_in_its_dimension_and_latent_with_shares(
    native: bool, in_shares: Callable[[int], None]
) -> None:
    """What is left in the room of classes that there are none of is multiplied with zero."""
    in_shares(2)
    gaussians, z = some_gaussians(7, 300, PSIS[0]), torch.randn(3, 300)
    z[0, 10] = math.nan
    z.requires_grad_()
    (found,) = torch.autograd.grad(gaussians.log_prob(z)[1:].sum(), z)
    assert found[1:].isfinite().all()
    _, d_mu, _ = torch.autograd.grad(gaussians.log_prob(z)[1:].sum(), (z, gaussians.mu, gaussians.s))
    assert d_mu.isnan().any(0).nonzero().flatten().tolist() == [10]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_any_part_of_the_gradients(native: bool, needed: tuple[int, ...]) -> None:
    gaussians, z = some_gaussians(70, 40, PSIS[0]), torch.randn(5, 40).requires_grad_()
    leaves = (z, gaussians.mu, gaussians.s)
    whole = torch.autograd.grad(gaussians.log_prob(z).square().sum(), leaves)
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number in needed)
    part = torch.autograd.grad(gaussians.log_prob(z).square().sum(), [leaves[n] for n in needed])
    for number, found in zip(needed, part, strict=True):
        assert_close(found, whole[number].double(), 2e-5)


def test_far_out_parameters_and_what_is_no_number(native: bool) -> None:
    """A saturated sigmoid keeps to psi's ends; one bad number spoils its own class and nothing else."""
    gaussians = ClassGaussians(4, 40)
    with torch.no_grad():
        gaussians.s[0], gaussians.s[1] = -1e6, 1e6
        gaussians.s[2, 39], gaussians.mu[3, 3] = math.nan, math.nan
    z = torch.randn(3, 40)
    found = gaussians.log_prob(z)
    for row, variance in enumerate((0.05, 0.55)):
        want = torch.distributions.Normal(0.0, variance**0.5).log_prob(z).sum(1)
        torch.testing.assert_close(found[:, row], want)
    assert found[:, 2:].isnan().all()
    found.sum().backward()
    assert gaussians.s.grad[:2].abs().max() < 1e-9 and gaussians.s.grad[2, :39].isfinite().all()


@pytest.mark.parametrize("s", [-math.inf, -1000.0, 1000.0, math.inf])
def test_gradients_at_the_ends_of_a_wide_psi(native: bool, s: float) -> None:
    gaussians = ClassGaussians(2, 17, (9e5, 0.5, 1e-9))
    with torch.no_grad():
        gaussians.s.fill_(s)
    gaussians.log_prob(torch.ones(3, 17)).sum().backward()
    variance = 1e-9 if s < 0 else 9e5
    torch.testing.assert_close(gaussians.mu.grad, torch.full((2, 17), 3 / variance))
    assert gaussians.s.grad.abs().max() < 1e-4  # of numbers up to 1e18


def test_whatever_fills_large_tensors_can_be_compiled_whole() -> None:
    gaussians = ClassGaussians(3, 5)

    def spread(gaussians: ClassGaussians) -> Tensor:
        return gaussians.variance().sum() + kld_pair_sum(gaussians.mu, gaussians.variance())

    want = torch.autograd.grad(spread(gaussians), gaussians.s)
    found = torch.autograd.grad(torch.compile(spread, backend="aot_eager", fullgraph=True)(gaussians), gaussians.s)
    torch.testing.assert_close(found, want)


def test_no_latents_at_all(native: bool) -> None:
    gaussians, none = some_gaussians(3, 5, PSIS[0]), torch.empty(0, 5, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64)
    for found in (gaussians.log_prob(none), gaussians.log_prob_of(none, labels)):
        assert len(found) == 0
        gradients = torch.autograd.grad(found.sum(), (none, gaussians.mu, gaussians.s))
        assert not any(g.any() for g in gradients)


def test_other_layouts_and_types_take_the_way_of_torch() -> None:
    straight = torch.randn(5, 6)
    for mu, s in ((straight.T, straight.T), (straight.double(), straight.double()), (straight, straight[:, :1])):
        assert not densities_native.serves(mu, s)
    gaussians = ClassGaussians(6, 5)
    gaussians.mu = torch.nn.Parameter(straight.T)
    found = gaussians.log_prob(torch.zeros(2, 5))
    torch.testing.assert_close(found, reference(gaussians, torch.zeros(2, 5)))
    found.sum().backward()
    assert gaussians.mu.grad is not None


def test_the_lower_bound_without_psi_lets_no_gradient_through(native: bool) -> None:
    mu, low = torch.zeros(2, 3, requires_grad=True), 0.1
    how = Parametrisation(None, low)
    s = torch.tensor([[0.05, 0.1, 0.5], [-3.0, 0.2, 100.0]])
    with torch.no_grad():
        inverse, scaled, _ = density_terms(mu, s, how)
    torch.testing.assert_close(inverse, 1 / s.clamp_min(low))
    assert not scaled.any()
    gaussians = ClassGaussians(2, 3, None, initial_variance=1.0)
    with torch.no_grad():
        gaussians.s.copy_(s)
    gaussians.log_prob(torch.ones(4, 3)).sum().backward()
    assert ((gaussians.s.grad == 0) == (s < low)).all()
