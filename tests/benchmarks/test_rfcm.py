"""Class covariances as a thin factor plus a diagonal, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.paper.rfcm import ThinCovariances, fit_covariances
from glem_augment.errors import DataError


def fit(latents: list[Tensor], ridge: float = 1e-4) -> ThinCovariances:
    return fit_covariances(latents.__getitem__, len(latents), ridge)


def make_latents(counts: list[int], dim: int) -> list[Tensor]:
    """Correlated latents with another mean for every class."""
    return [torch.randn(n, dim).double() @ torch.randn(dim, dim).double() + torch.randn(dim).double() for n in counts]


def dense(thin: ThinCovariances, y: int) -> Tensor:
    rows = thin.factors[y].double()
    return rows.T @ rows + torch.diag(thin.diagonal[y].double())


@pytest.mark.parametrize("count", [9, 24, 60])  # fewer, as many and more images than dimensions
def test_exact_factors_are_the_sample_covariance(count: int) -> None:
    latents = make_latents([count, 30], 24)
    thin = fit(latents, ridge=0.0)
    assert thin.factors[0].shape == (min(count, 24), 24) and thin.counts.tolist() == [count, 30]
    ridged = fit(latents, ridge=0.01)
    for y, z in enumerate(latents):
        cov = torch.cov(z.T)
        torch.testing.assert_close(thin.mean[y].double(), z.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(dense(thin, y), cov, atol=1e-6 * float(cov.max()), rtol=0)
        more = 0.01 * cov.diagonal().mean() * torch.eye(24).double()
        torch.testing.assert_close(dense(ridged, y), cov + more, atol=1e-6 * float(cov.max()), rtol=0)


def test_samples_are_their_formula() -> None:
    thin, y = fit(make_latents([5, 12, 9], 10)), torch.tensor([2, 0, 1, 2, 0])
    most = max(len(rows) for rows in thin.factors)
    along, rest = torch.randn(5, most + 10, generator=torch.Generator().manual_seed(3)).split([most, 10], 1)
    for temperature in (1.0, 0.5, 0.0):
        drawn = thin.sample(y, temperature, torch.Generator().manual_seed(3))
        for z, c, e, outside in zip(drawn, y.tolist(), along, rest, strict=True):
            spread = thin.factors[c].T @ e[: len(thin.factors[c])] + thin.diagonal[c].sqrt() * outside
            torch.testing.assert_close(z, thin.mean[c] + temperature * spread)
    for bad in (3, -1):
        with pytest.raises(ValueError, match="labels must lie in 0..2"):
            thin.sample(torch.tensor([bad]))
    with pytest.raises(ValueError, match="temperature"):
        thin.sample(y, float("nan"))


@pytest.mark.parametrize(("count", "ridge"), [(6, 1e-4), (50, 1e-2), (50, 0.0)])
def test_woodbury_scores_equal_the_dense_density(count: int, ridge: float) -> None:
    latents = make_latents([count, 20], 15)
    thin = fit(latents, ridge)
    z = torch.cat([latents[0][:4], latents[1][:4], torch.randn(4, 15, dtype=torch.float64) * 5])
    scores = thin.log_prob(z)
    for y in (0, 1):
        expected = torch.distributions.MultivariateNormal(thin.mean[y].double(), dense(thin, y)).log_prob(z)
        torch.testing.assert_close(scores[:, y], expected, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e6])
@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_rank_deficient_classes_can_be_sampled_and_scored(ridge: float, scale: float) -> None:
    """Two images, duplicates, and one image over and over."""
    pairs = torch.randn(12, 2, 30) * scale
    thin = fit([*pairs, pairs[0].repeat(20, 1), pairs[0, :1].repeat(5, 1)], ridge)
    z = thin.sample(torch.arange(14))
    assert z.isfinite().all() and thin.log_prob(z).isfinite().all()


def test_errors_name_the_class_or_the_value() -> None:
    with pytest.raises(DataError, match="class 1 has 1 images"):
        fit([torch.randn(4, 5), torch.randn(1, 5)])
    with pytest.raises(ValueError, match="ridge"):
        fit([torch.randn(4, 5)], -1.0)
