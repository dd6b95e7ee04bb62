"""Pieces of the EM procedure by their definitions: the start, the learning rates, the averages, the measurements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import tiny_config, tiny_trainer, toy_data

from glem_augment.distributed import Share
from glem_augment.errors import DataError, TrainingError
from glem_augment.training import Trainer
from glem_augment.training.objective import Objective
from glem_augment.training.steps import latent_pass


def latents(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and labels of D_g with the noise of the pass that starts a run."""
    model, objective, seen = trainer.model, trainer.objective, []
    statistics = objective.statistics(model.num_classes, model.dim, model.device)
    statistics.add = lambda z, y, _: seen.append((z, y))
    objective.statistics = lambda *_: statistics
    latent_pass(model, trainer.batches, objective, trainer.batches.split.g, -1)
    return tuple(torch.cat(each) for each in zip(*seen, strict=True))


def test_means_start_at_shrunk_class_means_at_the_scale_of_the_gaussians(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", toy_data(200))
    z, y = latents(trainer)
    assert float(z.std()) == pytest.approx(1, abs=0.25)  # of ActNorm
    means = torch.stack([z[y == k].double().sum(0) / (int((y == k).sum()) + 10) for k in range(2)])
    want = means.clamp(-2, 2) * math.sqrt(0.5 / 2 + 0.05)
    torch.testing.assert_close(trainer.model.gaussians.mu.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.model.gaussians.variance(), torch.full((2, 64), 0.3))


def test_other_classes_of_a_trained_flow_start_at_shrunk_maximum_likelihood(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path / "first", epochs=1, objective="hybrid").fit()
    data, config = toy_data(90, k=3, seed=4), tiny_config(epochs=1)
    with pytest.raises(DataError, match="class2"):
        tiny_trainer(tmp_path / "few", data.subset([0, 1, 2, 3, 4]))
    with pytest.raises(DataError, match=r"\(1, 8, 8\)"):
        Trainer(toy_data(shape=(1, 4, 8)), config, tmp_path / "second", init_model=first)
    trainer = Trainer(data, config, tmp_path / "second", init_model=first, device="cpu")
    flow = trainer.model.flow.state_dict()
    assert all(torch.equal(value, flow[name]) for name, value in first.flow.state_dict().items())
    z, y = (part.double() if part.is_floating_point() else part for part in latents(trainer))
    gaussians = trainer.model.gaussians
    own = torch.stack([z[y == k].var(0, correction=0) for k in range(3)])
    counts = y.bincount()[:, None].double()
    pooled = (counts * own).sum(0) / counts.sum()
    torch.testing.assert_close(gaussians.mu[1].double(), z[y == 1].mean(0), rtol=1e-4, atol=1e-5)
    want = ((counts * own + 10 * pooled) / (counts + 10)).clamp_min(0.03)
    torch.testing.assert_close(gaussians.variance().double(), want, rtol=1e-4, atol=1e-5)


def test_jointly_learned_gaussians_follow_the_flows_schedule(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", objective="hybrid")
    trainer.e_step(*next(iter(trainer.batches.read(trainer.batches.split.nf, 24))))
    rate = trainer.gaussian_optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(1e-2 * trainer.optimizer.param_groups[0]["lr"] / 5e-3) and rate < 1e-2


def test_an_epoch_of_a_joint_run_has_all_images(tmp_path: Path) -> None:
    """6 are held out, and M-steps would have 12 of the other images."""
    options = dict(batch_size=19, epochs=2, modes_rank=0)
    new, em = tiny_trainer(tmp_path / "new", objective="hybrid", **options), tiny_trainer(tmp_path / "em", **options)
    assert (new.steps_per_epoch, em.steps_per_epoch) == (6, 5)
    seen: list[torch.Tensor] = []
    new.e_step = lambda x, *_: (seen.append(x), (0.0, 0.0))[1]
    new.fit()
    assert len(torch.cat(seen[:6]).unique(dim=0)) == 114


def test_the_moments_of_the_first_m_step_are_forgotten(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", m_steps=2, epochs=3)
    for _ in range(3):
        trainer.m_step()
        assert bool(trainer.gaussian_optimizer.state) == (trainer.m_done > 1)


@pytest.mark.parametrize("val_fraction", [0.2, 0.0])
def test_what_is_measured(tmp_path: Path, val_fraction: float) -> None:
    trainer = tiny_trainer(tmp_path / "run", toy_data(120, k=3), val_fraction=val_fraction)
    trainer.m_step()
    model = trainer.model
    split = trainer.batches.split
    x, y, _ = next(iter(trainer.batches.read(split.val if val_fraction else split.g, 256)))
    found = trainer.measure()
    scores = torch.cat([model.log_prob_per_class(part).detach() for part in x.split(5)])  # whatever the batches
    own = scores.gather(1, y[:, None])
    want = {
        "val_images": len(y),
        "val_accuracy": float((scores.argmax(1) == y).double().mean()),
        "val_bits_per_dim": -float(own.mean()) / (64 * math.log(2)),
    }
    assert found == pytest.approx(want, rel=1e-5)


def test_a_run_takes_the_users_objective_and_augmentation(tmp_path: Path) -> None:
    """Its settings are recorded, and a resumed run must have the same."""

    class Scaled(Objective):
        factor = 2.0

        def settings(self) -> dict[str, Any]:
            return {"objective": "scaled", "factor": self.factor}

        def e_loss(self, *batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            loss, nll = super().e_loss(*batch)
            return self.factor * loss, nll

    seen: list[int] = []

    def augment(x: torch.Tensor, _: torch.Generator, share: Share) -> torch.Tensor:
        seen.append(share.total)
        return 255 - x

    options: dict[str, Any] = dict(device="cpu", augment=augment)
    data, config = toy_data(), tiny_config(objective="mle", epochs=1, modes_rank=0)
    trainer = Trainer(data, config, tmp_path / "run", objective=Scaled(), **options)
    loss, bits = trainer.e_step(*next(iter(trainer.batches.read(trainer.batches.split.nf, 24))))
    assert loss == pytest.approx(2 * bits * math.log(2)) and seen == [24]
    trainer = Trainer(data, config, tmp_path / "whole", objective=Scaled(), **options)
    record = trainer.fit().config.training["config"]
    assert record["objective"] == "scaled" and record["factor"] == 2.0 and record["epochs"] == 1
    other = Scaled()
    other.factor = 3.0
    with pytest.raises(TrainingError, match="factor: 2.0 then, 3.0 now"):
        Trainer(data, config, tmp_path / "whole", resume=True, objective=other, **options)


def test_a_run_keeps_the_variances_function_of_its_start_model(tmp_path: Path) -> None:
    data = toy_data()
    first = tiny_trainer(tmp_path / "first", data, epochs=1).fit()
    assert first.config.psi == (0.5, 0.2, 0.05)
    config = tiny_config(epochs=1, objective="hybrid")
    trainer = Trainer(data, config, tmp_path / "second", init_model=first, device="cpu")
    assert torch.equal(trainer.model.gaussians.s, first.gaussians.s)
    assert trainer.fit().config.psi == first.config.psi
