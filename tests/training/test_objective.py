"""The losses of the E-step and the M-step against their definitions, by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment import GLEM
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.distributed import share
from glem_augment.training import TrainConfig
from glem_augment.training.objective import (
    LatentStatistics,
    e_step_loss,
    encode,
    m_learning_rates,
    m_step_loss,
    saturating_kld,
)

# ---- the E-step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(("objective", "beta"), [("mle", 0.0), ("hybrid", 0.7), ("ib", 0.0), ("ib", 0.7)])
def test_e_step_losses_equal_their_definitions(learns: bool, objective: str, beta: float) -> None:
    g = torch.Generator().manual_seed(0)
    gaussians = ClassGaussians(4, 6)
    with torch.no_grad():
        gaussians.mu.normal_(generator=g)
        gaussians.s.normal_(generator=g)
    gaussians.requires_grad_(learns)
    z, logdet, y = torch.randn(9, 6, generator=g, requires_grad=True), torch.randn(9, generator=g), torch.arange(9) % 4
    config = TrainConfig(objective=objective, beta=beta, joint=False, label_smoothing=0.1, ce_scale=0.5)
    loss, nll = e_step_loss(gaussians, z, logdet, y, config)
    mu, std = gaussians.mu, gaussians.variance().sqrt()
    scores = torch.distributions.Normal(mu, std).log_prob(z[:, None]).sum(2)
    own = scores.logsumexp(1) - math.log(4) if objective == "ib" else scores[torch.arange(9), y]
    expected = -(own + logdet).mean() / 6
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=0)
    if beta:
        target = torch.full((9, 4), 0.1 / 4)
        target[torch.arange(9), y] += 0.9
        expected = expected + beta * -(target * F.log_softmax(0.5 * scores, 1)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parameters = [z, gaussians.mu, gaussians.s] if learns else [z]
    wanted = torch.autograd.grad(expected, parameters)
    for got, want in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gaussian_dequantisation_has_its_spread_and_keeps_the_units() -> None:
    model = GLEM.create("identity", (1, 8, 8), ["a", "b"])
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (60, 1, 8, 8), generator=g, dtype=torch.uint8)
    noisy, volume = encode(model, x, TrainConfig(objective="ib"), g, share(len(x)))
    middle, same = model.encode(x)
    assert float((noisy - middle).std()) == pytest.approx(0.5 / 256, rel=0.05) and torch.allclose(volume, same)
    uniform, _ = encode(model, x, TrainConfig(), g, share(len(x)))
    assert 0.4 / 256 < float((uniform - middle).abs().max()) <= 0.5 / 256 + 1e-7


# ---- the M-step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "m_steps, e_steps, moved", [(100, 8800, 1.45), (333, 10**5, 1.45), (5, 10**5, 0.5), (20, 88, 0.1)]
)
def test_m_learning_rates_move_the_means_no_faster_than_the_authors(m_steps: int, e_steps: int, moved: float) -> None:
    rates = torch.tensor(m_learning_rates(m_steps, 5, e_steps), dtype=torch.float64).view(m_steps, 5)
    moves = rates.sum(1)
    assert sum(moves) == pytest.approx(moved) and torch.allclose(rates, rates[:, :1])
    assert float(moves.max()) < 1e-9 + min(0.1, e_steps / m_steps / 880)
    assert (moves.diff() < 1e-9).all() and float(moves.min()) > 0
    if m_steps == 100:
        assert moves[:10].tolist() == pytest.approx([0.1] * 10) and moves[-1] == pytest.approx(moves[10] / 10)


def unbalanced(k: int = 3, d: int = 5) -> tuple[ClassGaussians, Tensor, Tensor, LatentStatistics]:
    gaussians = ClassGaussians(k, d).double()
    with torch.no_grad():
        gaussians.mu.normal_()
        gaussians.s.normal_(std=3)
    y = torch.arange(k).repeat_interleave(torch.arange(1, k + 1) * 4)
    z = torch.randn(len(y), d, dtype=torch.float64) + y[:, None]
    statistics = LatentStatistics(k, d)
    nll = -gaussians.log_prob_of(z, y).detach() + 7
    for part in torch.arange(len(y)).split(5):
        statistics.add(z[part], y[part], nll[part])
    return gaussians, z, y, statistics


def balanced(gaussians: ClassGaussians, z: Tensor, y: Tensor) -> Tensor:
    nll = -gaussians.log_prob_of(z, y)
    return torch.stack([nll[y == k].mean() for k in y.unique()]).mean()


@pytest.mark.parametrize("means", [True, False])
def test_the_most_likely_variance_is_about_the_mean_that_stays(means: bool) -> None:
    gaussians, z, y, statistics = unbalanced()
    free = ClassGaussians(*gaussians.mu.shape, psi=None).double()
    with torch.no_grad():
        free.mu.copy_(gaussians.mu)
    statistics.most_likely(free, means=means)
    for k in y.unique().tolist():
        own = z[y == k]
        mean = own.mean(0) if means else gaussians.mu[k]
        torch.testing.assert_close(free.mu[k], mean.detach())
        torch.testing.assert_close(free.variance()[k], (own - mean).square().mean(0).clamp_min(0.03).detach())


def brute_force(
    gaussians: ClassGaussians, z: Tensor, y: Tensor, config: TrainConfig, weight: float, nll: Tensor
) -> Tensor:
    """The M-step's loss from its definition in ``TrainConfig``, with double loops over classes."""
    k, d = gaussians.mu.shape
    var = gaussians.variance()

    def kl(a: int, b: int) -> Tensor:
        difference = gaussians.mu[a] - gaussians.mu[b]
        return 0.5 * (torch.log(var[b] / var[a]) + (var[a] + difference**2) / var[b] - 1).sum()

    pairs = [(a, b) for a in range(k) for b in range(k) if a != b]
    loss = balanced(gaussians, z, y)

    def spread(values: Tensor) -> float:
        high, low = float(values.max()), float(values.min())
        return high - low + 0.2 * (abs(high) + abs(low))

    if config.objective == "glem":
        class_means = torch.stack([sum(kl(a, b) for b in range(k) if b != a) / (k - 1) for a in range(k)]).detach()
        return loss / spread(nll) - weight * sum(kl(a, b) for a, b in pairs) / (k * d) / spread(class_means)
    loss = loss / d
    if config.objective == "saturating":
        t = 0.05 * d
        loss = loss - weight * sum(t * (1 - torch.exp(-kl(a, b) / t)) for a, b in pairs) / len(pairs) / d
    return loss


@pytest.mark.parametrize("weight", [0.0, 0.7, 20.0])
@pytest.mark.parametrize("objective", ["glem", "saturating", "mle"])
def test_m_step_loss_and_gradient_equal_brute_force(objective: Any, weight: float) -> None:
    gaussians, z, y, statistics = unbalanced()
    config = TrainConfig(objective=objective)
    nll = (-gaussians.log_prob_of(z, y) + 7).detach()
    loss = m_step_loss(gaussians, statistics, config, weight)
    want = brute_force(gaussians, z, y, config, weight, nll)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)
    parameters = (gaussians.mu, gaussians.s)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_identical_gaussians_leave_the_step_to_the_likelihood() -> None:
    gaussians, z, y, statistics = unbalanced()
    with torch.no_grad():
        gaussians.mu.fill_(0.3)
        gaussians.s.zero_()
    loss = m_step_loss(gaussians, statistics, TrainConfig(objective="glem"), 5.0)
    got, want = (torch.autograd.grad(value, gaussians.mu)[0] for value in (loss, balanced(gaussians, z, y)))
    assert F.cosine_similarity(got.flatten(), want.flatten(), 0).item() == pytest.approx(1, abs=1e-9)


def test_saturating_repulsion_is_bounded_and_harmless_far_out() -> None:
    gaussians = ClassGaussians(4, 10).double()
    small = 1e-4 * torch.randn(4, 10)
    with torch.no_grad():
        gaussians.mu.copy_(small)
    mean = gaussians.kld_matrix().sum() / 12
    torch.testing.assert_close(saturating_kld(gaussians, 5.0), mean, rtol=1e-5, atol=0)  # slope one at the start
    with torch.no_grad():
        gaussians.mu.copy_(torch.arange(4)[:, None] * 1e4)
    value = saturating_kld(gaussians, 5.0)
    assert value.item() == pytest.approx(5.0)
    value.backward()
    assert gaussians.mu.grad.isfinite().all() and gaussians.mu.grad.abs().max() < 1e-12
    assert saturating_kld(ClassGaussians(1, 3), 5.0).item() == 0


def test_a_single_class_has_nothing_to_repel() -> None:
    gaussians, statistics = ClassGaussians(1, 3), LatentStatistics(1, 3)
    statistics.add(torch.randn(8, 3), torch.zeros(8, dtype=torch.long), torch.rand(8))
    for objective in ("glem", "saturating"):
        assert m_step_loss(gaussians, statistics, TrainConfig(objective=objective), 3.0).isfinite()
