"""The losses of the E-step and the M-step against their definitions, by brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import CE_SCALE, LABEL_SMOOTHING, Hybrid, Objective, Progress, Repulsion
from glem_augment.training.steps import m_learning_rates

FIRST = Progress(0, 10, 0, 10)

# ---- the E-step ------------------------------------------------------------------------------------------------------


def check_e_loss(
    objective: Objective,
    beta: float | None,
    scale: float,
    smoothing: float,
    learns: bool = True,
    marginal: bool = False,
) -> None:
    """The E-step's loss and its gradients follow from their definitions; `marginal`: of p(x) in place of p(x|y)."""
    g = torch.Generator().manual_seed(0)
    gaussians = ClassGaussians(4, 6)
    with torch.no_grad():
        gaussians.mu.normal_(generator=g)
        gaussians.s.normal_(generator=g)
    gaussians.requires_grad_(learns)
    z, logdet, y = torch.randn(9, 6, generator=g, requires_grad=True), torch.randn(9, generator=g), torch.arange(9) % 4
    loss, nll = objective.e_loss(gaussians, z, logdet, y, FIRST)
    mu, std = gaussians.mu, gaussians.variance().sqrt()
    scores = torch.distributions.Normal(mu, std).log_prob(z[:, None]).sum(2)
    own = scores.logsumexp(1) - math.log(4) if marginal else scores[torch.arange(9), y]
    expected = -(own + logdet).mean() / 6
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=0)
    if beta:
        target = torch.full((9, 4), smoothing / 4)
        target[torch.arange(9), y] += 1 - smoothing
        expected = expected + beta * -(target * F.log_softmax(scale * scores, 1)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parameters = [z, gaussians.mu, gaussians.s] if learns else [z]
    wanted = torch.autograd.grad(expected, parameters)
    for got, want in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("beta", [None, 0.0, 0.7])
def test_e_step_losses_equal_their_definitions(learns: bool, beta: float | None) -> None:
    check_e_loss(Objective() if beta is None else Hybrid(beta), beta, CE_SCALE, LABEL_SMOOTHING, learns)


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


def brute_force(gaussians: ClassGaussians, z: Tensor, y: Tensor, weight: float, nll: Tensor) -> Tensor:
    """The M-step's loss from its definition in ``Repulsion``, with double loops over classes."""
    k, d = gaussians.mu.shape
    var = gaussians.variance()

    def kl(a: int, b: int) -> Tensor:
        difference = gaussians.mu[a] - gaussians.mu[b]
        return 0.5 * (torch.log(var[b] / var[a]) + (var[a] + difference**2) / var[b] - 1).sum()

    def spread(values: Tensor) -> float:
        high, low = float(values.max()), float(values.min())
        return high - low + 0.2 * (abs(high) + abs(low))

    pairs = [(a, b) for a in range(k) for b in range(k) if a != b]
    class_means = torch.stack([sum(kl(a, b) for b in range(k) if b != a) / (k - 1) for a in range(k)]).detach()
    repulsion = weight * sum(kl(a, b) for a, b in pairs) / (k * d) / spread(class_means)
    return balanced(gaussians, z, y) / spread(nll) - repulsion


@pytest.mark.parametrize("weight", [0.0, 0.7, 20.0])
def test_m_step_loss_and_gradient_equal_brute_force(weight: float) -> None:
    gaussians, z, y, statistics = unbalanced()
    nll = (-gaussians.log_prob_of(z, y) + 7).detach()
    loss = Repulsion(weight).m_loss(gaussians, statistics, FIRST)
    want = brute_force(gaussians, z, y, weight, nll)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)
    parameters = (gaussians.mu, gaussians.s)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_identical_gaussians_leave_the_step_to_the_likelihood() -> None:
    gaussians, z, y, statistics = unbalanced()
    with torch.no_grad():
        gaussians.mu.fill_(0.3)
        gaussians.s.zero_()
    loss = Repulsion(5.0).m_loss(gaussians, statistics, FIRST)
    got, want = (torch.autograd.grad(value, gaussians.mu)[0] for value in (loss, balanced(gaussians, z, y)))
    assert F.cosine_similarity(got.flatten(), want.flatten(), 0).item() == pytest.approx(1, abs=1e-9)


def test_a_single_class_has_nothing_to_repel() -> None:
    gaussians, statistics = ClassGaussians(1, 3), LatentStatistics(1, 3)
    statistics.add(torch.randn(8, 3), torch.zeros(8, dtype=torch.long), torch.rand(8))
    assert Repulsion(3.0).m_loss(gaussians, statistics, FIRST).isfinite()
