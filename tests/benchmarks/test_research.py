"""Objectives and methods of the paper's tables: losses against their definitions, and what each method learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objective import FIRST, balanced, check_e_loss, unbalanced

from benchmarks.paper.methods import METHODS
from benchmarks.paper.research import (
    Research,
    ResearchObjective,
    ResearchTrainer,
    most_likely,
    split_settings,
)
from glem_augment import GLEM
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.distributed import share
from glem_augment.errors import TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig
from glem_augment.training.objective import Repulsion

# ---- the E-step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "beta"), [("mle", 0.0), ("hybrid", 0.7), ("ib", 0.7)])
def test_e_step_losses_equal_their_definitions(objective: str, beta: float) -> None:
    research = Research(objective=objective, beta=beta, joint=False, label_smoothing=0.1, ce_scale=0.5)
    check_e_loss(ResearchObjective(research), beta, 0.5, 0.1, marginal=objective == "ib")


def test_gaussian_dequantisation_has_its_spread() -> None:
    model = GLEM.create("identity", (1, 8, 8), ["a", "b"])
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (60, 1, 8, 8), generator=g, dtype=torch.uint8)
    noisy, middle = ResearchObjective(Research("ib")).numbers(model, x, g, share(len(x))), model.numbers(x)
    assert float((noisy - middle).std()) == pytest.approx(0.5 / 256, rel=0.05)
    uniform = ResearchObjective(Research()).numbers(model, x, g, share(len(x)))
    assert 0.4 / 256 < float((uniform - middle).abs().max()) <= 0.5 / 256 + 1e-7


# ---- the M-step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("means", [True, False])
def test_the_most_likely_variance_is_about_the_mean_that_stays(means: bool) -> None:
    gaussians, z, y, statistics = unbalanced()
    free = ClassGaussians(*gaussians.mu.shape, psi=None).double()
    with torch.no_grad():
        free.mu.copy_(gaussians.mu)
    most_likely(statistics, free, ("mu", "s") if means else ("s",))
    for k in y.unique().tolist():
        own = z[y == k]
        mean = own.mean(0) if means else gaussians.mu[k]
        torch.testing.assert_close(free.mu[k], mean.detach())
        torch.testing.assert_close(free.variance()[k], (own - mean).square().mean(0).clamp_min(0.03).detach())


def test_m_steps_repel_or_are_the_likelihood_of_balanced_classes() -> None:
    gaussians, z, y, statistics = unbalanced()
    for objective, want in (
        ("glem", Repulsion(0.7).m_loss(gaussians, statistics, FIRST)),  # whose test has its definition
        ("mle", balanced(gaussians, z, y) / z.shape[1]),
    ):
        loss = ResearchObjective(Research(objective, 0.7)).m_loss(gaussians, statistics, FIRST)
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)
        for a, b in zip(
            *(torch.autograd.grad(each, [gaussians.mu, gaussians.s]) for each in (loss, want)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# ---- methods ---------------------------------------------------------------------------------------------------------


def images(n: int = 120, k: int = 3) -> ImageData:
    """Classes that differ in which part is bright, with noise."""
    y = torch.arange(n) % k
    x = torch.randint(0, 60, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for i in range(n):
        x[i, :, 8 * int(y[i]) // k : 8 * (int(y[i]) + 1) // k] += 120
    return ImageData.from_tensors(x.to(torch.uint8), y.numpy(), [f"class{i}" for i in range(k)], name="toy")


def small_trainer(out: Path, name: str, resume: bool = False, **changes: Any) -> ResearchTrainer:
    settings: dict[str, Any] = dict(
        preset="glow_tiny", flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[6, 6]), epochs=1, batch_size=24,
        warmup_steps=3, lr=5e-3, modes_rank=0, sample_every=0, seed=1,
    )  # fmt: skip
    own, research = split_settings({**METHODS[name], **settings, **changes})
    return ResearchTrainer(images(), TrainConfig(**own), out, resume, device="cpu", research=research)


# The means and the variances; other methods learn both.
LEARNS = {
    "only-mu": (True, False), "only-sigma": (False, True), "random": (False, False), "flowgmm": (False, False),
    "ib-inn": (True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", ["glem", "lambda0", *LEARNS])
def test_every_method_trains_and_learns_what_it_says(name: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run", name, flow_options=dict(depth=[1], blocks=[1], width=[4]))
    mu, s = trainer.model.gaussians.mu.clone(), trainer.model.gaussians.s.clone()
    weights = [p.clone() for p in trainer.model.flow.parameters()]
    gaussians = trainer.fit().gaussians
    assert (not torch.equal(gaussians.mu, mu), not torch.equal(gaussians.s, s)) == LEARNS.get(name, (True, True))
    after = list(trainer.model.flow.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(weights[-2:], after[-2:], strict=True))
    if name in ("flowgmm", "ib-inn"):
        assert torch.equal(gaussians.variance(), torch.ones_like(gaussians.s))  # identity covariance
    if name == "flowgmm":
        assert float(mu.detach().std()) == pytest.approx(1.0, abs=0.15)  # N(0, I)
    if name == "random":
        assert float(gaussians.s.std()) == pytest.approx(5.0, abs=0.75)
    research = trainer.research
    assert trainer.m_done == (0 if research.joint or research.learn == "none" else 1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    refitted = name == "lambda0"
    assert (rows[-1]["kind"] == "final") == refitted


def test_a_recipe_with_m_steps_stops_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """The settings of the bundled flow's recipes, which the package does not have."""
    recipe = dict(
        objective="hybrid", joint=False, beta=0.8, beta_anneal=(0.41, 0.05), ce_scale=0.2, psi=(0.5, 0.2, 0.05),
        random_init=None, m_rounds=2, m_steps=5, sigma_lr_scale=5.0, freeze_gaussians_at=0.7, refit_beta=0.1, epochs=4,
    )  # fmt: skip
    whole = small_trainer(tmp_path / "whole", "hybrid-joint", **recipe)
    wanted = whole.fit()
    assert whole.m_done == whole.m_total == 6 and whole.epoch_rows(3).size > whole.epoch_rows(2).size
    for resume in (False, True, True):
        cut = small_trainer(tmp_path / "cut", "hybrid-joint", resume, **recipe)
        cut.stop_requested = True
        with pytest.raises(KeyboardInterrupt):
            cut.fit()
    found = small_trainer(tmp_path / "cut", "hybrid-joint", True, **recipe).fit()
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in wanted.state_dict().items())
    with pytest.raises(TrainingError, match="sigma_lr_scale: 5.0 then, 4.0 now"):
        small_trainer(tmp_path / "cut", "hybrid-joint", True, **{**recipe, "sigma_lr_scale": 4.0})
    # The record names the objective that trained the model, in place of the package's.
    assert wanted.config.training["config"]["beta"] == 0.8 and wanted.config.training["config"]["joint"] is False
