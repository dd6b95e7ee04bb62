"""Divergences between the classes (Eq. 4), against torch.distributions and explicit loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from glem_augment.classes.gaussians import ClassGaussians


def double_loop(mu: Tensor, var: Tensor) -> Tensor:
    classes = [Independent(Normal(m, v.sqrt()), 1) for m, v in zip(mu, var, strict=True)]
    return torch.stack([torch.stack([kl_divergence(p, q) for q in classes]) for p in classes])


@pytest.mark.parametrize(("k", "d"), [(1, 3), (3, 5), (5, 1100)])
def test_divergences_and_their_gradients_equal_the_double_loop(k: int, d: int) -> None:
    """1100 dimensions are more than one slice, the last of them incomplete."""
    gaussians = ClassGaussians(k, d, psi=None).double()
    torch.nn.init.normal_(gaussians.mu, 3)
    torch.nn.init.uniform_(gaussians.s, 0.05, 1.05)  # without psi these are the variances
    leaves = gaussians.mu, gaussians.s
    want = double_loop(*leaves)
    assert torch.equal(gaussians.kld_matrix().diagonal(), torch.zeros(k, dtype=torch.float64))
    expected = torch.autograd.grad(3 * want.sum(), leaves, retain_graph=True)
    for found, wanted in ((gaussians.kld_matrix(), want), (gaussians.kld_class_sums(), want.sum(1))):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-10)
        for a, b in zip(torch.autograd.grad(3 * found.sum(), leaves), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


def test_identical_gaussians_have_no_divergence_and_no_pull() -> None:
    single = ClassGaussians(1, 6)
    assert single.kld_class_sums().tolist() == [0]
    gaussians = ClassGaussians(7, 30)
    torch.nn.init.constant_(gaussians.mu, -7.3)
    loss = gaussians.kld_class_sums().sum()
    loss.backward()
    assert abs(loss.item()) < 1e-9 and gaussians.kld_matrix().abs().max() < 1e-9
    assert not gaussians.mu.grad.any() and gaussians.s.grad.abs().max() < 1e-12


def test_nearly_equal_gaussians_keep_their_digits() -> None:
    """The divergences are differences of large numbers, and float32 sums would lose all of these."""
    gaussians = ClassGaussians(3, 1000)
    torch.nn.init.normal_(gaussians.mu, 5, 1e-4)
    want = double_loop(gaussians.mu.double(), gaussians.variance().double())
    torch.testing.assert_close(gaussians.kld_class_sums(), want.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(gaussians.kld_matrix(), want, rtol=1e-4, atol=1e-9)


def test_the_sum_needs_no_pairs() -> None:
    """A tensor of 10,000 x 10,000 x 100 would take 40 GB."""
    gaussians = ClassGaussians(10_000, 100)
    torch.nn.init.normal_(gaussians.mu)
    gaussians.kld_class_sums().sum().backward()
    assert gaussians.mu.grad.isfinite().all()
