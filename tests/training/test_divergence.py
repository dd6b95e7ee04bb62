"""Steps that are not finite are skipped; a run that diverges stops, and its last good checkpoint stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import rows, tiny_trainer
from torch import Tensor

from glem_augment.distributed import share
from glem_augment.errors import TrainingError
from glem_augment.training import Trainer
from glem_augment.training import trainer as trainer_module
from glem_augment.training.checkpoint import load_checkpoint
from glem_augment.training.initialisation import independent_pixels


def change_latents(trainer: Trainer, change: Callable[[Tensor, Tensor], Any], steps: set[int]) -> None:
    """Change the latents and log-determinants of these E-steps."""
    real = trainer.model.encode_numbers

    def encode(h: Tensor) -> Any:
        found = real(h)
        return change(*found) if trainer.step in steps and torch.is_grad_enabled() else found

    trainer.model.encode_numbers = encode


def with_a_bad_gradient(z: Tensor) -> Tensor:
    same = z.clone()
    same.register_hook(lambda gradient: gradient * math.inf)
    return same


BAD = {
    "nan in the loss": lambda z, logdet: (z * math.nan, logdet),
    "infinity in the loss": lambda z, logdet: (z, logdet - math.inf),
    "nan in the gradient": lambda z, logdet: (with_a_bad_gradient(z), logdet),
}


@pytest.mark.parametrize("what", BAD)
def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, what: str) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    x, y = next(iter(trainer.batches.data.batches(trainer.batches.split.nf, 24)))

    def step() -> float:
        return trainer.e_step(x, y, share(len(x)))[0]

    step()
    before = copy.deepcopy({**trainer.model.state_dict(), **trainer.ema.state_dict()})
    change_latents(trainer, BAD[what], {0})
    assert math.isnan(step())
    after = {**trainer.model.state_dict(), **trainer.ema.state_dict()}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    trainer.step = 1
    assert math.isfinite(step())


def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    change_latents(trainer, BAD["nan in the loss"], {3, 5, 6})
    model = trainer.fit()
    assert model.config.training["bad_steps"] == 3 and trainer.away == 0
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3]


FAR_AWAY = {"not finite": BAD["nan in the loss"], "far": lambda z, logdet: (z + 1e3, logdet)}


@pytest.mark.parametrize("what", FAR_AWAY)
def test_a_run_that_diverges_stops_and_goes_on_at_a_lower_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(trainer_module, "PATIENCE", 3)
    monkeypatch.setattr(trainer_module, "NOT_FINITE", 1)
    trainer = tiny_trainer(tmp_path, every_step=True)
    change_latents(trainer, FAR_AWAY[what], set(range(6, 100)))
    with pytest.raises(TrainingError, match=r"step 9 .* step 6 .*--resume.* 0\.005"):
        trainer.fit()
    assert load_checkpoint(tmp_path)["step"] == 6
    resumed = tiny_trainer(tmp_path, resume=True, lr=1e-3)
    assert resumed.step == 6 and resumed.optimizer.param_groups[0]["lr"] < 2e-3
    assert resumed.fit().config.training["bad_steps"] == 0


def test_spikes_and_a_bad_start_are_no_divergence(tmp_path: Path) -> None:
    """The limit is behind the first step; it takes many steps in a row."""
    trainer = tiny_trainer(tmp_path)
    for step in range(2000):
        trainer._stop_if_diverged(math.nan if step % 9 == 4 else 1e6 if step % 50 == 7 else 20.0)
    trainer._stop_if_diverged(trainer.limit + 0.1)
    assert trainer.away == 1 and trainer.bad_steps == 222


def test_an_m_step_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    real = trainer.objective.m_loss
    trainer.objective.m_loss = lambda *args: real(*args) * math.nan
    with pytest.raises(TrainingError, match="M-step"):
        trainer.m_step()


def test_independent_pixels_cost_the_entropy_of_their_histogram() -> None:
    x = torch.zeros(4, 2, 2, 2, dtype=torch.uint8)
    x[:2, 0] = 255  # one bit in the first channel
    x[:, 1] = torch.tensor([[0, 1], [64, 128]])  # two bits in the second
    assert independent_pixels(x, 8) == pytest.approx(1.5)
    assert independent_pixels(x, 2) == pytest.approx((1 + 1.5) / 2)  # 0 and 1 are one level


def test_precision_reaches_the_flow_that_is_trained(tmp_path: Path) -> None:
    seen = list[Any]()
    trainer = tiny_trainer(tmp_path, epochs=1, precision="bf16")
    subnet = trainer.model.flow.levels[0].couplings[0].net

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (seen.append(subnet.autocast), real(*args))[1]

    trainer.e_step, trainer.measure = noting(trainer.e_step), noting(trainer.measure)
    trainer.fit()
    # The last one measures.
    assert seen == [*[torch.bfloat16] * 4, None]
