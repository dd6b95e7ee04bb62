"""Pieces of the EM procedure by their definitions: the start, the learning rates, the averages, what is measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import tiny_config, tiny_trainer, toy_data

from glem_augment.training import Trainer


def latents(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and labels of D_g with the noise of the pass that starts a run."""
    statistics = trainer._latent_pass(-1, trainer.split.g, keep=True)
    return statistics.kept()


def test_means_start_at_shrunk_class_means_at_the_scale_of_the_gaussians(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", toy_data(200))
    z, y = latents(trainer)
    assert float(z.std()) == pytest.approx(1, abs=0.25)  # of ActNorm
    means = torch.stack([z[y == k].double().sum(0) / (int((y == k).sum()) + 10) for k in range(2)])
    want = means.clamp(-2, 2) * math.sqrt(0.5 / 2 + 0.05)
    torch.testing.assert_close(trainer.model.gaussians.mu.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.model.gaussians.variance(), torch.full((2, 64), 0.3))


def test_other_means_and_variances_at_the_start(tmp_path: Path) -> None:
    def gaussians(name: str, **settings: Any) -> Any:
        return tiny_trainer(tmp_path / name, toy_data(60, k=3), **settings).model.gaussians

    wide = gaussians("random", random_init=(0.5, 0.0), psi=None)
    assert float(wide.mu.std()) == pytest.approx(0.5, rel=0.2)
    torch.testing.assert_close(wide.variance(), torch.ones(3, 64))
    noisy = gaussians("noisy", random_init=(0.0, 2.0))
    assert float(noisy.mu.abs().max()) == 0 and float(noisy.s.std()) == pytest.approx(2.0, rel=0.2)


def test_other_classes_of_a_trained_flow_start_at_shrunk_maximum_likelihood(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path / "first", epochs=1, psi=None).fit()
    data, config = toy_data(90, k=3, seed=4), tiny_config(epochs=1, psi=None)
    trainer = Trainer(data, config, tmp_path / "second", init_model=first, device="cpu", progress=False)
    z, y = (part.double() if part.is_floating_point() else part for part in latents(trainer))
    gaussians = trainer.model.gaussians
    own = torch.stack([z[y == k].var(0, correction=0) for k in range(3)])
    counts = y.bincount()[:, None].double()
    pooled = (counts * own).sum(0) / counts.sum()
    torch.testing.assert_close(gaussians.mu[1].double(), z[y == 1].mean(0), rtol=1e-4, atol=1e-5)
    want = ((counts * own + 10 * pooled) / (counts + 10)).clamp_min(0.03)
    torch.testing.assert_close(gaussians.variance().double(), want, rtol=1e-4, atol=1e-5)


def test_jointly_learned_gaussians_follow_the_flows_schedule_and_see_all_images(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", objective="hybrid", joint=True, sigma_lr_scale=3.0)
    assert trainer.frozen_from == 0
    x, y = next(iter(trainer.images(trainer.split.nf, 24)))
    trainer.e_step(x, y)
    mu, s = (group["lr"] for group in trainer.m_optimizer.param_groups)
    assert mu == pytest.approx(1e-2 * trainer.flow_optimizer.param_groups[0]["lr"] / 5e-3) and mu < 1e-2
    assert s == pytest.approx(3 * mu)


def test_learning_rates_of_m_steps_halve_after_a_return(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", m_steps=2, sigma_lr_scale=3.0, epochs=5, freeze_gaussians_at=0.6)
    rates: list[list[float]] = []
    step = trainer.m_optimizer.step

    def noted() -> None:
        rates.append([group["lr"] for group in trainer.m_optimizer.param_groups])
        step()

    trainer.m_optimizer.step = noted  # type: ignore[method-assign]
    for scale in (1.0, 1.0, 0.5):
        trainer.set_lr_scale(scale)
        trainer.m_step()
        assert bool(trainer.m_optimizer.state) == (trainer.m_done > 1)  # the moments of the first are forgotten
    means, variances = zip(*rates, strict=True)
    assert means == pytest.approx([means[0]] * 4 + [means[0] / 2] * 2) and means[0] > 0
    assert variances == pytest.approx([3 * rate for rate in means])


@pytest.mark.parametrize("settings", [dict(objective="hybrid"), dict(objective="glem", kld_weight=10.0)])
def test_an_m_step_of_a_short_run_does_not_throw_the_scores_off(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = tiny_trainer(tmp_path / "run", toy_data(300, k=10), epochs=20, **settings)
    before = trainer.measure()
    trainer.m_step()
    after = trainer.measure()
    assert abs(after["val_bits_per_dim"] - before["val_bits_per_dim"]) < 0.05
    assert after["kld_mean"] < before["kld_mean"] + 0.1 * trainer.model.dim


@pytest.mark.parametrize("val_fraction", [0.2, 0.0])
def test_what_is_measured(tmp_path: Path, val_fraction: float) -> None:
    trainer = tiny_trainer(tmp_path / "run", toy_data(120, k=3), val_fraction=val_fraction)
    trainer.m_step()
    model, gaussians = trainer.model, trainer.model.gaussians
    x, y = next(iter(trainer.images(trainer.split.val if val_fraction else trainer.split.g, 256)))
    found = trainer.measure()
    scores = model.log_prob_per_class(x, trainer._generator(5))
    own = scores.gather(1, y[:, None])
    assert found["val_images"] == len(y)
    assert found["val_accuracy"] == pytest.approx(float((scores.argmax(1) == y).double().mean()))
    assert found["val_bits_per_dim"] == pytest.approx(-float(own.mean()) / (64 * math.log(2)), rel=1e-5)
    pairs = gaussians.kld_matrix()[~torch.eye(3, dtype=torch.bool)]
    assert found["kld_min"] == pytest.approx(float(pairs.min())) and found["kld_min"] < found["kld_mean"]
    assert found["kld_mean"] == pytest.approx(float(pairs.mean()))
    assert found["mu_max"] == pytest.approx(float(gaussians.mu.abs().max()))
