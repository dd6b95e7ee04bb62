"""Losses and gradients that are not finite or explode, runs in pieces, and how the flow is set for training."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from test_training import rows, tiny_trainer
from torch import Tensor

from glem_augment import GLEM
from glem_augment.distributed import share
from glem_augment.errors import TrainingError
from glem_augment.training import TimeUpError, Trainer, guard
from glem_augment.training import trainer as trainer_module
from glem_augment.training.guard import DivergenceError, LossGuard
from glem_augment.training.log import wandb


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 2)


def rollbacks(out: Path) -> list[tuple[int, float, int]]:
    return [(row["step"], row["lr_scale"], row["number"]) for row in rows(out) if row["kind"] == "rollback"]


# ---- the guard -------------------------------------------------------------------------------------------------------


def new_guard(pixels: float = 7.0) -> LossGuard:
    watch = LossGuard(8)
    watch.pixels = pixels
    return watch


def until_divergence(watch: LossGuard, losses: list[float], bits: list[float] | None = None) -> int | None:
    """After how many steps the guard has had enough; None if it never has. By default the loss is the likelihood."""
    for index, loss in enumerate(losses):
        try:
            watch.see(loss, loss / math.log(2) if bits is None else bits[index])
        except DivergenceError:
            return index + 1
    return None


def noise(n: int, level: float, spread: float, seed: int = 0) -> list[float]:
    return (level + spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))).tolist()


def test_the_guard_lets_ordinary_runs_pass() -> None:
    spikes = noise(3000, 2.0, 0.1)
    spikes[500::20] = [1e6] * len(spikes[500::20])
    spikes[1000] = math.nan
    for losses in (
        [6 * math.exp(-i / 300) + 2 for i in range(3000)],
        *(noise(3000, 2.0, spread) for spread in (0.01, 0.3, 3.0)),
        [2 + i / 2000 for i in range(3000)],  # a slow rise, as of a weight that is annealed
        noise(3000, -3.0, 0.1),
        spikes,
    ):
        assert until_divergence(new_guard(), losses) is None


@pytest.mark.parametrize("bad", [4.2, 1e8])
def test_the_guard_notices_losses_that_leave_for_good(bad: float) -> None:
    calm = noise(500, 2.0, 0.1)
    at = until_divergence(new_guard(math.inf), calm + [bad] * 300)
    assert at is not None and 0 < at - 500 - guard.PATIENCE <= guard.SPAN
    assert until_divergence(new_guard(math.inf), calm + [bad] * (guard.PATIENCE - 20) + calm) is None


def test_the_guard_notices_a_run_that_falls_back_behind_independent_pixels() -> None:
    """Halfway from them to uniform noise, 7 bits/dim here, it has left, whatever the loss does."""
    for before, after, noticed in ((4.0, 7.1, True), (4.0, 6.9, False), (6.5, 7.1, False)):
        at = until_divergence(new_guard(6.0), [3.0] * 800, [before] * 500 + [after] * 300)
        assert at in range(600, 626) if noticed else at is None


@pytest.mark.parametrize(("start", "limit"), [(7.5, 9.0), (8.5, 9.5)])
def test_the_guard_notices_a_run_that_only_gets_worse_than_untrained(start: float, limit: float) -> None:
    """With no better days to compare with: losses that fall, but bits/dim behind noise and the start."""
    losses = [12 - i / 1000 for i in range(400)]
    for later, noticed in ((limit - 0.1, False), (limit + 0.1, True)):
        watch = new_guard()
        at = until_divergence(watch, losses, [start] * 10 + [later] * 390)
        assert (at is not None and 0 <= at - 10 - guard.PATIENCE <= guard.SPAN) == noticed != watch.calm


def test_independent_pixels_cost_the_entropy_of_their_histogram() -> None:
    x = torch.zeros(4, 2, 2, 2, dtype=torch.uint8)
    x[:2, 0] = 255  # one bit in the first channel
    x[:, 1] = torch.tensor([[0, 1], [64, 128]])  # two bits in the second
    assert guard.independent_pixels(x, 8) == pytest.approx(1.5)
    assert guard.independent_pixels(x, 2) == pytest.approx((1 + 1.5) / 2)  # 0 and 1 are one level


def test_the_guard_goes_on_where_its_state_was_saved() -> None:
    losses = [*noise(300, 2.0, 0.1), math.nan, *noise(150, 50.0, 1.0)]
    for cut in (0, 3, 290, 301, 350, 390):
        first, second = new_guard(), LossGuard(8)
        assert until_divergence(first, losses[:cut]) is None
        facts, series = first.state()
        second.load(json.loads(json.dumps(facts)), series)
        assert second.calm == first.calm and second.limit() == first.limit()
        ends = [until_divergence(watch, losses[cut:]) for watch in (first, second)]
        assert ends[0] == ends[1] is not None


# ---- returns to the last good checkpoint -----------------------------------------------------------------------------


def until_returned(trainer: Trainer, encode: Callable[..., Any], steps: set[int], returns: int = 1) -> None:
    """Let ``encode`` take the place of the model's in these E-steps, until the run has returned so many times."""
    real = trainer.model.encode

    def faulty(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = real(x, generator)
        bad = trainer.step in steps and trainer.rollbacks < returns and torch.is_grad_enabled()
        return encode(z, logdet) if bad else (z, logdet)

    trainer.model.encode = faulty


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
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, what: str) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    x, y = next(iter(trainer.batches.data.batches(trainer.batches.split.nf, 24)))

    def step() -> float:
        return trainer.e_step.take(x, y, share(len(x)), trainer.so_far)[0]

    step()
    before = copy.deepcopy({**trainer.model.state_dict(), **trainer.e_step.ema.state_dict()})
    until_returned(trainer, BAD[what], {0})
    assert math.isnan(step())
    after = {**trainer.model.state_dict(), **trainer.e_step.ema.state_dict()}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    trainer.step = 1  # a good step again
    assert math.isfinite(step())


def test_a_divergence_returns_to_the_last_good_checkpoint_at_half_the_rate(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=4)
    until_returned(trainer, BAD["nan in the loss"], set(range(9, 100)))
    with pytest.warns(UserWarning, match=r"step 10: 2 steps in a row were not.*Returned to step 8.*\(1 of at most"):
        model = trainer.fit()
    assert rollbacks(tmp_path) == [(8, 0.5, 1)]
    assert trainer.m_step.lr_scale == 0.5 and trainer.e_step.optimizer.param_groups[0]["lr_scale"] == 0.5
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert model.config.training["rollbacks"] == 1 and model.config.training["bad_steps"] == 2
    assert [row["epoch"] for row in rows(tmp_path) if row["kind"] == "epoch"] == [1, 2, 3, 4]


def test_a_resumed_run_that_returns_beyond_its_start_has_time_left(tmp_path: Path) -> None:
    for step in (0, 1):
        with pytest.raises(TimeUpError, match=f"step {step} of"):
            tiny_trainer(tmp_path, resume=step > 0, epochs=1, max_minutes=1e-9).fit()
    trainer = tiny_trainer(tmp_path, resume=True, epochs=1, progress=True)
    until_returned(trainer, BAD["nan in the loss"], {1, 2})
    with pytest.warns(UserWarning, match="Returned to step 0"):
        trainer.fit()
    assert trainer.bar.initial == 0 and trainer.bar.n == trainer.total_steps


def test_weights_and_biases_gets_the_rows_after_a_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores rows logged at a lower step than before, unless the step is a metric."""
    run = Mock()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    tell = wandb(tmp_path, 0)
    for step in (8, 4):
        tell({"kind": "step", "step": step, "loss": 0.5})
    run.define_metric.assert_called_once_with("*", step_metric="step")
    assert run.log.call_args_list == [call({"step/loss": 0.5, "step": step}) for step in (8, 4)]


def test_exploded_losses_return_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SPAN": 1, "START": 1, "PATIENCE": 2, "CALM": 2}.items():
        monkeypatch.setattr(guard, name, value)
    trainer = tiny_trainer(tmp_path, epochs=4)
    until_returned(trainer, lambda z, logdet: (z + 1e4, logdet), set(range(7, 100)))
    with pytest.warns(UserWarning, match=r"step 8: the loss stays high: .*Returned to step 4"):
        model = trainer.fit()
    # Step 8 ends an epoch, but not calmly: there is nothing to return to.
    assert rollbacks(tmp_path) == [(4, 0.5, 1)] and model.config.training["bad_steps"] == 0


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=3, every_step=True)
    real = trainer.e_step.take

    def e_step(*batch: Any) -> tuple[float, float]:
        loss = real(*batch)
        if trainer.step == 5 and trainer.rollbacks == 0:
            next(trainer.model.flow.parameters()).data.fill_(math.nan)
        return loss

    trainer.e_step.take = e_step
    with pytest.warns(UserWarning, match="weights are no longer finite.*Returned to step 4"):
        trainer.fit()
    assert GLEM.from_pretrained(tmp_path).num_classes == 2


def test_an_m_step_that_is_not_finite_is_a_divergence(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    real = trainer.objective.m_loss
    trainer.objective.m_loss = lambda *args: real(*args) * math.nan
    with pytest.raises(DivergenceError, match="the M-step's loss or its gradient is not finite"):
        trainer.m_step.take(trainer.so_far)


def test_returns_are_limited_also_over_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "MAX_ROLLBACKS", 2)
    trainer = tiny_trainer(tmp_path, epochs=3)
    until_returned(trainer, BAD["nan in the loss"], {5, 6}, returns=3)
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match="diverged again after 2 returns"):
        trainer.fit()
    assert [row[1] for row in rollbacks(tmp_path)] == [0.5, 0.25]
    monkeypatch.setattr(trainer_module, "MAX_ROLLBACKS", 3)
    trainer = tiny_trainer(tmp_path, resume=True, epochs=3)  # it remembers the rates that it had come to
    until_returned(trainer, BAD["nan in the loss"], {5, 6}, returns=3)
    with pytest.warns(UserWarning, match="at 0.125 times"):
        trainer.fit()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_precision_and_memory_reach_the_flow_that_is_trained(tmp_path: Path) -> None:
    seen = list[tuple[str, Any]]()
    trainer = tiny_trainer(tmp_path, epochs=1, memory="recomputed", precision="bf16")
    flow = trainer.model.flow

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (seen.append((flow.memory, flow.autocast)), real(*args))[1]

    trainer.e_step.take, trainer.measure = noting(trainer.e_step.take), noting(trainer.measure)
    trainer.fit()
    # The last one measures.
    assert seen == [*[("recomputed", torch.bfloat16)] * 4, ("stored", None)]
