"""Class Gaussians and their densities, against torch.distributions and float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from glem_augment.latent.gaussians import ClassGaussians, bounded_variance, log_densities

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
    if gaussians.psi is None:
        variance = torch.maximum(s, s.new_tensor(0.03))
    else:
        a, b, c = gaussians.psi
        variance = a / (1 + torch.exp(-b * s)) + c
    classes = [Independent(Normal(m, v.sqrt()), 1) for m, v in zip(gaussians.mu, variance, strict=True)]
    return torch.stack([each.log_prob(z) for each in classes], 1)


# ---- densities (Eq. 2) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", PSIS)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (2, 7), (5, 40)])
def test_densities_and_their_gradients_are_those_of_torch_distributions(k: int, d: int, psi: Psi) -> None:
    gaussians, z = random_gaussians(k, d, psi), torch.randn(9, d, dtype=torch.float64, requires_grad=True)
    leaves, weights, y = (z, gaussians.mu, gaussians.s), torch.randn(9, k, dtype=torch.float64), torch.arange(9) % k
    want = reference(gaussians, z)
    own = want[torch.arange(9), y]
    for found, wanted, weight in (
        (gaussians.log_prob(z), want, weights),
        (gaussians.log_prob_of(z, y), own, weights[:, 0]),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-10)
        gradients = torch.autograd.grad((found * weight).sum(), leaves)
        expected = torch.autograd.grad((wanted * weight).sum(), leaves, retain_graph=True)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


def test_densities_in_float32_at_a_real_size() -> None:
    """d = 3072: the two products cancel large numbers, and what is left must stay far below a nat."""
    gaussians = random_gaussians(10, 3072, dtype=torch.float32)
    y = torch.arange(20) % 10
    z = gaussians.sample(y, 1.0, torch.Generator().manual_seed(1))
    want = copy.deepcopy(gaussians).double().log_prob(z.double())
    own = want[torch.arange(20), y]
    assert (gaussians.log_prob(z) - want).abs().max() < 2e-6 * want.abs().max()
    assert (gaussians.log_prob_of(z, y) - own).abs().max() < 1e-2
    assert (gaussians.log_prob(z)[torch.arange(20), y] - own).abs().max() < 2e-2
    assert torch.equal(gaussians.log_prob(z).argmax(1), y)


def test_autocast_and_tf32_change_nothing() -> None:
    gaussians, z = random_gaussians(4, 300, dtype=torch.float32), torch.randn(6, 300)
    want = gaussians.log_prob(z)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gaussians.log_prob(z), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_densities_follow_every_change_of_the_parameters() -> None:
    """Fused optimizers write to parameters without telling autograd, and inference mode keeps no versions."""
    gaussians, z = random_gaussians(3, 5), torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(gaussians.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        torch.testing.assert_close(gaussians.log_prob(z), reference(gaussians, z), rtol=1e-10, atol=1e-9)
        gaussians.log_prob(z).sum().backward()
        optimizer.step()
    with torch.inference_mode():
        gaussians.mu += 1
        torch.testing.assert_close(gaussians.log_prob(z), reference(gaussians, z), rtol=1e-10, atol=1e-9)


def test_no_latents_give_no_densities_and_no_gradient() -> None:
    gaussians, none = random_gaussians(3, 5), torch.empty(0, 5, dtype=torch.float64, requires_grad=True)
    for found in (gaussians.log_prob(none), gaussians.log_prob_of(none, torch.empty(0, dtype=torch.int64))):
        assert len(found) == 0
        gradients = torch.autograd.grad(found.sum(), (none, gaussians.mu, gaussians.s))
        assert not any(gradient.any() for gradient in gradients)


def test_one_bad_number_spoils_its_own_class_only() -> None:
    gaussians = ClassGaussians(4, 40)
    with torch.no_grad():
        gaussians.s[0], gaussians.s[1] = -1e6, 1e6
        gaussians.s[2, 39], gaussians.mu[3, 3] = math.nan, math.nan
    z = torch.randn(3, 40)
    found = gaussians.log_prob(z)
    for row, variance in enumerate((0.05, 0.55)):
        torch.testing.assert_close(found[:, row], Normal(0.0, variance**0.5).log_prob(z).sum(1))
    assert found[:, 2:].isnan().all()
    found.sum().backward()
    assert gaussians.s.grad[:2].abs().max() < 1e-9 and gaussians.s.grad[2, :39].isfinite().all()


# ---- variances (Eq. 6) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", PSIS[:3])
def test_psi_keeps_variances_in_range_at_any_s(psi: tuple[float, float, float]) -> None:
    a, b, c = psi
    torch.testing.assert_close(ClassGaussians(1, 3, psi).variance(), torch.full((1, 3), a / 2 + c))
    s = torch.tensor([-1e6, -300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0, 1e6], dtype=torch.float64, requires_grad=True)
    variance = bounded_variance(s, psi)
    assert variance.min() >= c and variance.max() <= a + c and (variance[1:] >= variance[:-1]).all()
    (gradient,) = torch.autograd.grad(variance.sum(), s)
    sigmoid = 1 / (1 + torch.exp(-b * s))
    torch.testing.assert_close(gradient, a * b * sigmoid * (1 - sigmoid), rtol=1e-9, atol=1e-20)
    for end in (-math.inf, math.inf):  # the variance is the end of the range, and has no slope there
        far = torch.full((2, 17), end, requires_grad=True)
        log_densities(torch.ones(3, 17), torch.zeros(2, 17), bounded_variance(far, psi)).sum().backward()
        assert not far.grad.any()


def test_without_psi_variances_stay_above_a_tenth_of_their_start() -> None:
    gaussians = ClassGaussians(2, 3, None, initial_variance=0.4)
    torch.testing.assert_close(gaussians.variance(), torch.full((2, 3), 0.4))
    s = torch.tensor([[-1.0, 0.039, 0.041], [0.0, 3.0, 100.0]])
    with torch.no_grad():
        gaussians.s.copy_(s)
    assert gaussians.lowest_variance == pytest.approx(0.04)
    torch.testing.assert_close(gaussians.variance().detach(), s.clamp_min(0.04))
    gaussians.log_prob(torch.ones(4, 3)).sum().backward()
    assert ((gaussians.s.grad == 0) == (s < 0.04)).all()
    gaussians.project()
    torch.testing.assert_close(gaussians.s.data, s.clamp_min(0.04))
    assert float(gaussians.saturated_share()) == pytest.approx(0.5)


@pytest.mark.parametrize("psi", [PSIS[0], PSIS[1], None])
def test_set_variance_hits_what_is_allowed_and_clamps_the_rest(psi: Psi) -> None:
    gaussians = ClassGaussians(3, 4, psi)
    low, high = (0.03, math.inf) if psi is None else (psi[2], psi[0] + psi[2])
    wanted = torch.tensor([0.07, 0.2, 0.3, 0.5]).repeat(3, 1) * (9 if psi == PSIS[1] else 1)
    gaussians.set_variance(wanted)
    torch.testing.assert_close(gaussians.variance().detach(), wanted, rtol=1e-4, atol=0)
    gaussians.project()  # has nothing to do here
    gaussians.set_variance(torch.tensor([1e-9, 0.2, 1e9, 0.3]), slice(1, 2))
    found = gaussians.variance().detach()
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=1e-4, atol=0)
    if psi is None:
        assert found[1].tolist() == pytest.approx([low, 0.2, 1e9, 0.3])
    else:  # a hundredth from either end, where s does not run away
        ends = torch.tensor([low + 0.01 * (high - low), high - 0.01 * (high - low)])
        torch.testing.assert_close(found[1, [0, 2]], ends, rtol=1e-4, atol=0)


def test_saturated_share_counts_both_ends() -> None:
    gaussians = ClassGaussians(1, 5)
    with torch.no_grad():  # sigmoid(0.2 s): 0.0025, 0.0148, 0.5, 0.9852, 0.9975
        gaussians.s.copy_(torch.tensor([[-30.0, -21.0, 0.0, 21.0, 30.0]]))
    assert gaussians.saturated_share().item() == pytest.approx(0.4)


def test_random_means_have_the_given_spread() -> None:
    gaussians = ClassGaussians(20, 1000)
    gaussians.randomise(2.0, torch.Generator().manual_seed(0))
    assert gaussians.mu.std().item() == pytest.approx(2.0, rel=0.02) and abs(gaussians.mu.mean().item()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "at least one"),
        ((3, 0), "at least one"),
        *(
            ((2, 2, psi), "three positive numbers")
            for psi in [(0.5, 0.2), (0.5, -0.2, 0.05), (0.5, 0.2, 0.0), (math.nan, 1, 1), (math.inf, 1, 1)]
        ),
        ((2, 2, None, 0.0), "initial_variance"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassGaussians(*arguments)


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_have_the_class_mean_and_the_scaled_standard_deviation(temperature: float) -> None:
    gaussians, n = random_gaussians(2, 5, dtype=torch.float32), 40_000
    z = gaussians.sample(torch.arange(2).repeat_interleave(n), temperature, torch.Generator().manual_seed(0))
    for y in range(2):
        part, std = z[y * n : (y + 1) * n], gaussians.variance()[y].detach().sqrt() * temperature
        assert ((part.mean(0) - gaussians.mu[y]).abs() < 5 * std / n**0.5).all()
        torch.testing.assert_close(part.std(0), std, rtol=0.02, atol=0)
        assert torch.corrcoef(part.T).fill_diagonal_(0).abs().max() < 0.03


def test_sampling_is_deterministic_and_temperature_zero_gives_the_means() -> None:
    gaussians, y = random_gaussians(3, 4, dtype=torch.float32), torch.tensor([2, 0, 2])
    draws = [gaussians.sample(y, 0.7, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(draws[0], gaussians.mu[y] + 0.7 * gaussians.variance()[y].sqrt() * noise)
    assert not draws[0].requires_grad
    assert torch.equal(gaussians.sample(y, 0.0), gaussians.mu[y])
    assert gaussians.sample(y[:0]).shape == (0, 4)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            gaussians.sample(y, bad)
