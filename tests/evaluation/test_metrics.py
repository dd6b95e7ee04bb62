"""Accuracy, bits/dim, calibration and round trip of a flow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from glem_augment import GLEM
from glem_augment.errors import DataError
from glem_augment.evaluation import calibrate, evaluate
from glem_augment.evaluation.metrics import calibration_error
from glem_augment.images.dataset import ImageData


@pytest.fixture(scope="module")
def toy() -> tuple[GLEM, ImageData]:
    """An identity flow with the Gaussians of seven classes of flat images, and images that it often gets wrong."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 7
    level = 80 + 6 * y[:, None, None, None] + 25 * torch.randn(150, 1, 1, 1, generator=g)
    x = (level + 10 * torch.randn(150, 1, 4, 4, generator=g)).clamp(0, 255).to(torch.uint8)
    model = GLEM.create("identity", (1, 4, 4), list("abcdefg"), psi=None).requires_grad_(False)
    z = model.encode(x, g)[0]
    for c in range(7):
        model.gaussians.mu[c] = z[y == c].mean(0)
        model.gaussians.s[c] = z[y == c].var(0)
    return model, ImageData.from_tensors(x, y, list("abcdefg"))


def test_the_numbers_are_those_of_the_model(toy: tuple[GLEM, ImageData]) -> None:
    model, data = toy
    x, y = data.tensor(), torch.from_numpy(data.targets)
    found = evaluate(model, data, batch_size=64, round_trip=20)
    posterior = model.posterior(x).double()
    ranked = posterior.argsort(1, descending=True)
    assert found["n"] == 150 and found["bits"] == 8
    assert found["accuracy"] == pytest.approx(float((ranked[:, 0] == y).double().mean()))
    assert found["top5"] == pytest.approx(float((ranked[:, :5] == y[:, None]).any(1).double().mean()))
    assert 1 / 7 < found["accuracy"] < found["top5"] < 1
    # Noise moves bits/dim by little, and by the same amount in every call.
    scores = model.log_prob_per_class(x).double()
    bits = -scores.gather(1, y[:, None]).mean() / (16 * math.log(2))
    marginal = -(scores.logsumexp(1) - math.log(7)).mean() / (16 * math.log(2))
    assert found["bits_per_dim"] == pytest.approx(float(bits), abs=0.01)
    assert found["bits_per_dim_marginal"] == pytest.approx(float(marginal), abs=0.01)
    assert found["bits_per_dim"] == evaluate(model, data, batch_size=64)["bits_per_dim"]
    own, right = posterior.max(1).values, ranked[:, 0] == y
    assert found["ece"] == pytest.approx(calibration_error(own, right), abs=1e-6)
    assert found["round_trip"] == {"images": 20, **model.check_invertibility(x[torch.arange(20) * 150 // 20])}
    assert found["round_trip"]["within_half_step"] == 1.0
    assert evaluate(model, data, round_trip=0)["round_trip"] is None
    with pytest.raises(DataError, match="no images"):
        evaluate(model, data.subset([]))


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    g = torch.Generator().manual_seed(1)
    probabilities = (3 * torch.randn(500, 4, generator=g)).softmax(1)
    y = torch.multinomial(probabilities, 1, generator=g)[:, 0]
    reference = MulticlassCalibrationError(4, n_bins=15, norm="l1")(probabilities, y)
    confidence, predicted = probabilities.max(1)
    assert calibration_error(confidence, predicted == y) == pytest.approx(float(reference), abs=1e-6)
    certain = torch.ones(3, dtype=torch.float64)
    assert calibration_error(certain, torch.tensor([True, True, False])) == pytest.approx(1 / 3)


def test_adapting_and_calibrating_make_the_posterior_honest(
    bundled_train: ImageData, bundled_test: ImageData, tmp_path: Path
) -> None:
    """Gaussians of 784 pixels are far too sure of a class."""
    GLEM.create("identity", (1, 28, 28), ["image"], psi=None).adapt(bundled_train, max_per_class=20).save(tmp_path)
    model, test = GLEM.from_pretrained(tmp_path), bundled_test.subset(range(0, 1000, 4))
    fitted, x = model.latent_classes.temperature, test.tensor()
    honest, densities = evaluate(model, test, round_trip=0), model.log_prob_per_class(x)
    wanted = (model.latent_classes.log_prob(model.encode(x)[0]) / fitted).softmax(1)
    torch.testing.assert_close(model.posterior(x), wanted)
    model.latent_classes.temperature = 1.0
    sure = evaluate(model, test, round_trip=0)
    assert honest["ece"] < 0.15 < 0.2 < sure["ece"]
    same = ("accuracy", "top5", "bits_per_dim", "bits_per_dim_marginal")
    assert all(honest[name] == sure[name] for name in same)
    assert torch.equal(model.log_prob_per_class(x), densities)
    # Images that were held out say the same, nearly, as those left out one by one.
    again = calibrate(model, test)
    assert again == model.latent_classes.temperature == pytest.approx(fitted, rel=0.5)
    assert evaluate(model, test, round_trip=0)["ece"] < 0.15
