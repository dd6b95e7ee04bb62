"""What the benchmarks compute, against references; and that every script says how it is run."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from benchmarks.common import holm, interval
from benchmarks.paper.continuum import mantel
from benchmarks.paper.rfcm import ThinCovariances, fit_covariances

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p for p in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in p.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_can_be_imported_and_says_how_it_is_run(script: Path) -> None:
    place = script.relative_to(ROOT)
    assert f"python {place.as_posix()}" in importlib.import_module(".".join(place.with_suffix("").parts)).__doc__


def test_intervals_are_students_and_corrected_for_the_number_of_rows() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds, found.clear) == (2.0, 3, False)
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert found.text() == "2.0 ± 2.5" and found.text(0, sign=True) == "+2 ± 2"
    assert found.chance == pytest.approx(0.0742, abs=1e-4)
    assert interval([1.0]).text() == "1.0 (one seed)" and not interval([1.0]).clear
    words = [interval(values).verdict for values in ([1.0, 1.1], [-1.0, -1.1], [1.0, -1.0], [1.0])]
    assert words == ["clearly better", "clearly worse", "no difference found", "one seed: no verdict"]
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_correlation_is_that_of_torchmetrics() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(12, 3, generator=g, dtype=torch.float64)
    near = torch.cdist(points, points)
    noisy = (near + 0.5 * torch.rand(12, 12, generator=g)).triu(1)
    noisy, pairs = noisy + noisy.T, torch.ones(12, 12).triu(1) > 0
    value, p = mantel(near, noisy)
    assert value == pytest.approx(float(spearman_corrcoef(near[pairs], noisy[pairs])), abs=1e-6)
    assert value > 0.8 and p == 0.001 and mantel(near, -noisy) == (pytest.approx(-value), 0.001)


# ---- full covariances ------------------------------------------------------------------------------------------------


def dense(thin: ThinCovariances, y: int) -> Tensor:
    rows = thin.factors[y].double()
    return rows.T @ rows + torch.diag(thin.diagonal[y].double())


@pytest.mark.parametrize(("count", "ridge"), [(6, 1e-4), (50, 0.0)])  # fewer and more than dimensions
def test_thin_covariances_are_the_dense_ones(count: int, ridge: float) -> None:
    latents = [torch.randn(n, 15).double() @ torch.randn(15, 15).double() + torch.randn(15) for n in (count, 20)]
    thin = fit_covariances(latents.__getitem__, 2, ridge)
    z = torch.cat([latents[0][:4], latents[1][:4], torch.randn(4, 15, dtype=torch.float64) * 5])
    scores = thin.log_prob(z)
    for y, own in enumerate(latents):
        covariance = torch.cov(own.T)
        more = ridge * covariance.diagonal().mean() * torch.eye(15).double()
        torch.testing.assert_close(thin.mean[y].double(), own.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(dense(thin, y), covariance + more, atol=1e-6 * float(covariance.max()), rtol=0)
        if ridge or len(own) > 15:
            expected = torch.distributions.MultivariateNormal(thin.mean[y].double(), dense(thin, y)).log_prob(z)
            torch.testing.assert_close(scores[:, y], expected, rtol=1e-7, atol=1e-6)
