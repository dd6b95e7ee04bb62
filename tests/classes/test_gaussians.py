"""Class Gaussians and their densities, against torch.distributions and float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from glem_augment.classes.fit import fit_temperature
from glem_augment.classes.gaussians import ClassGaussians

Psi = tuple[float, float, float] | None
PAPER: Psi = (0.5, 0.2, 0.05)
PSIS: list[Psi] = [PAPER, (5.0, 0.2, 0.05), (0.1, 3.0, 2.0), None]


def random_gaussians(k: int, d: int, psi: Psi = PAPER, dtype: torch.dtype = torch.float64) -> ClassGaussians:
    """Means and variances all over the place; without psi some parameters lie below the lower bound."""
    gaussians = ClassGaussians(k, d, psi).to(dtype)
    with torch.no_grad():
        gaussians.mu.copy_(torch.randn(k, d))
        gaussians.s.copy_(torch.randn(k, d) * 4 if psi is not None else 0.3 + 0.3 * torch.randn(k, d))
    return gaussians


def reference(gaussians: ClassGaussians, z: Tensor) -> Tensor:
    """log N(z; mu_y, sigma_y^2) [B, K], with the variances written out."""
    s = gaussians.s
    a, b, c = gaussians.psi or PAPER
    variance = s.clamp_min(0.03) if gaussians.psi is None else a / (1 + torch.exp(-b * s)) + c
    classes = [Independent(Normal(m, v.sqrt()), 1) for m, v in zip(gaussians.mu, variance, strict=True)]
    return torch.stack([each.log_prob(z) for each in classes], 1)


@pytest.mark.parametrize("psi", PSIS)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (5, 40)])
def test_densities_and_their_gradients_are_those_of_torch_distributions(k: int, d: int, psi: Psi) -> None:
    """Eq. 2."""
    gaussians, z = random_gaussians(k, d, psi), torch.randn(9, d, dtype=torch.float64, requires_grad=True)
    leaves, weights, y = (z, gaussians.mu, gaussians.s), torch.randn(9, k, dtype=torch.float64), torch.arange(9) % k
    want = reference(gaussians, z)
    for found, wanted, weight in (
        (gaussians.log_prob(z), want, weights),
        (gaussians.log_prob_of(z, y), want[torch.arange(9), y], weights[:, 0]),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-10)
        gradients = torch.autograd.grad((found * weight).sum(), leaves)
        expected = torch.autograd.grad((wanted * weight).sum(), leaves, retain_graph=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-8)


def test_densities_in_float32_at_a_real_size() -> None:
    """d = 3072: the two products cancel large numbers, and the difference must stay far below a nat."""
    gaussians = random_gaussians(10, 3072, dtype=torch.float32)
    y = torch.arange(20) % 10
    z = gaussians.sample(y, 1.0, torch.Generator().manual_seed(1))
    want = copy.deepcopy(gaussians).double().log_prob(z.double())
    own = want[torch.arange(20), y]
    assert (gaussians.log_prob(z) - want).abs().max() < 2e-6 * want.abs().max()
    assert (gaussians.log_prob_of(z, y) - own).abs().max() < 1e-2
    assert (gaussians.log_prob(z)[torch.arange(20), y] - own).abs().max() < 2e-2
    assert torch.equal(gaussians.log_prob(z).argmax(1), y)


def test_the_temperature_is_the_likeliest_of_all_from_one_on() -> None:
    """Against a grid, on scores that are too sure, about right, not sure enough, useless, and of one class."""
    g = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(400, 5, generator=g)
    y = torch.multinomial(truth.softmax(1), 1, generator=g)[:, 0]
    grid = torch.logspace(0, 4, 401, dtype=torch.float64)
    for factor in (0.1, 1.0, 3.0, 70.0, -1.0):
        scores = factor * truth - 1e4  # a constant per image says nothing of its class
        nll = torch.stack([-(scores.double() / t).log_softmax(1)[torch.arange(400), y].mean() for t in grid])
        found = fit_temperature(scores, y)
        assert found == pytest.approx(float(grid[nll.argmin()]), rel=0.02)
        unseen = torch.cat([scores, torch.full((1, 5), math.nan)])  # an image that the flow can't encode
        assert fit_temperature(unseen, torch.cat([y, y[:1]])) == pytest.approx(found)
        assert found == 1.0 or factor < 0 or found == pytest.approx(factor, rel=0.2)
    assert fit_temperature(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)) == 1.0
    assert fit_temperature(torch.eye(3), torch.arange(3)) == 1.0  # the likeliest T is 0


@pytest.mark.parametrize("psi", PSIS[:3])
def test_psi_keeps_variances_in_range_at_any_s(psi: tuple[float, float, float]) -> None:
    """Eq. 6."""
    a, b, c = psi
    gaussians = ClassGaussians(1, 8, psi)
    torch.testing.assert_close(gaussians.variance(), torch.full((1, 8), a / 2 + c))
    gaussians.s.data[0] = torch.tensor([-math.inf, -1e6, -300.0, -1.0, 0.0, 1.0, 300.0, math.inf])
    variance = gaussians.variance()
    assert variance.min() >= c and variance.max() <= a + c and (variance.diff() >= 0).all()


def test_without_psi_variances_stay_above_a_tenth_of_their_start() -> None:
    gaussians = ClassGaussians(2, 3, None, initial_variance=0.4)
    torch.testing.assert_close(gaussians.variance(), torch.full((2, 3), 0.4))
    s = torch.tensor([[-1.0, 0.039, 0.041], [0.0, 3.0, 100.0]])
    gaussians.s.data.copy_(s)
    torch.testing.assert_close(gaussians.variance().detach(), s.clamp_min(0.04))
    gaussians.project()
    torch.testing.assert_close(gaussians.s.data, s.clamp_min(0.04))


@pytest.mark.parametrize("psi", [PSIS[0], PSIS[1], None])
def test_set_variance_hits_what_is_allowed_and_clamps_the_rest(psi: Psi) -> None:
    gaussians = ClassGaussians(3, 4, psi)
    wanted = torch.tensor([0.07, 0.2, 0.3, 0.5]).repeat(3, 1) * (9 if psi == PSIS[1] else 1)
    given = wanted.clone()
    given[1, 0], given[1, 2] = 1e-9, 1e9
    gaussians.set_variance(given)
    a, _, c = psi or (math.inf, 0, 0.03)
    wanted[1, 0], wanted[1, 2] = (c + 0.01 * a, c + 0.99 * a) if psi else (c, 1e9)  # nearer to the ends s runs away
    torch.testing.assert_close(gaussians.variance().detach(), wanted, rtol=1e-4, atol=0)


def test_samples_are_their_formula() -> None:
    gaussians, y = random_gaussians(3, 4, dtype=torch.float32), torch.tensor([2, 0, 2])
    drawn = gaussians.sample(y, 0.7, torch.Generator().manual_seed(1))
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(drawn, gaussians.mu[y] + 0.7 * gaussians.variance()[y].sqrt() * noise)
    assert not drawn.requires_grad
    assert torch.equal(gaussians.sample(y, 0.0), gaussians.mu[y])
    assert gaussians.sample(y[:0]).shape == (0, 4)
