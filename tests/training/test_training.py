"""Whole runs: what they learn, and that runs that are killed, resumed, poisoned and starved end as others do."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glem_augment import GLEM
from glem_augment.distributed import share
from glem_augment.errors import TrainingError
from glem_augment.evaluation import calibrate
from glem_augment.flows import create_flow
from glem_augment.images.dataset import ImageData
from glem_augment.model.files import CONFIG, WEIGHTS, weights_sha256
from glem_augment.training import TrainConfig, Trainer

# ---- whole runs ------------------------------------------------------------------------------------------------------


def toy_data(n: int = 120, k: int = 2, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> ImageData:
    """Classes that differ in which half is bright, with noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    c, h, w = shape
    x = rng.integers(0, 60, (n, c, h, w))
    for i in range(n):
        x[i, :, (h * y[i]) // k : (h * (y[i] + 1)) // k] += 120
    return ImageData.from_tensors(
        torch.from_numpy(x.astype(np.uint8)), y.astype(np.int64), [f"class{i}" for i in range(k)], name="toy"
    )


def tiny_config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = dict(
        preset="glow_tiny", flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[6, 6]), epochs=3, batch_size=24,
        warmup_steps=3, lr=5e-3, modes_rank=2, sample_every=0, seed=1, objective="glem",
    )  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def tiny_trainer(
    out: Path,
    data: ImageData | None = None,
    resume: bool = False,
    every_step: bool = False,
    **changes: Any,
) -> Trainer:
    trainer = Trainer(data or toy_data(), tiny_config(**changes), out, resume, device="cpu")
    trainer.checkpoint_seconds = 0.0 if every_step else math.inf
    return trainer


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


RUNS = {
    "glem": dict(augment=("crop", "jitter")),
    "mle": dict(schedule="cosine", epochs=2, objective="mle"),
    "hybrid": dict(
        preset="mef_tiny", flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[4, 4]), objective="hybrid", epochs=2,
        precision="bf16",
    ),
    "identity": dict(preset="identity", flow_options={}, m_steps=3),
}  # fmt: skip


def comparable(out: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows(out)]


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


class Dying(Trainer):
    checkpoint_seconds = 0.0  # after every step
    dies = ("E-step", 0)

    def fit(self) -> GLEM:
        e_step, m_step = self.e_step, self.m_step

        def dying_e_step(*batch: Any) -> tuple[float, float]:
            loss = e_step(*batch)  # the weights have moved, the step is not counted yet
            if self.dies == ("E-step", self.step + 1):
                raise Killed
            return loss

        def dying_m_step() -> None:
            m_step()
            if self.dies == ("M-step", self.m_done):
                raise Killed

        self.e_step, self.m_step = dying_e_step, dying_m_step
        return super().fit()


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    options, whole = RUNS[name], tmp_path / "whole"
    undisturbed = tiny_trainer(whole, **options)
    undisturbed.fit()
    ends = [("E-step", undisturbed.total_steps), ("M-step", 2)]
    for number, dies in enumerate(ends if undisturbed.m_total else ends[:1]):
        out = tmp_path / str(number)
        dying = Dying(toy_data(), tiny_config(**options), out, device="cpu")
        dying.dies = dies
        with pytest.raises(Killed):
            dying.fit()
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"kind": "step", "step": 1000000}\n{"kind": "ep')  # after the checkpoint, and half a line
        left_over = out / ".model.safetensors.123-0123abcd.tmp"
        left_over.write_bytes(b"half")
        torch.manual_seed(999)
        resumed = tiny_trainer(out, resume=True, **options)
        assert resumed.step < resumed.total_steps
        resumed.fit()
        assert not left_over.exists()
        for file in (WEIGHTS, CONFIG):
            assert (out / file).read_bytes() == (whole / file).read_bytes()
        assert comparable(out) == comparable(whole)


def test_training_improves_bits_and_finds_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = toy_data(300)
    trainer = tiny_trainer(tmp_path / "run", data, epochs=5, objective="hybrid", val_fraction=0.2)
    before = trainer.measure()
    model = trainer.fit()
    told = re.findall(r"epoch (\d)/5: [0-9.]+ bits/dim, accuracy [0-9.]+ %", capsys.readouterr().out)
    assert told == list("12345")
    history = [row for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert history[-1]["val_bits_per_dim"] < before["val_bits_per_dim"] - 0.1
    assert history[-1]["val_accuracy"] > 0.98
    fresh = toy_data(100, seed=7)
    x, y = fresh.tensor(), torch.as_tensor(fresh.targets)
    assert (model.predict(x) == y).float().mean() > 0.95
    loaded = GLEM.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded.log_prob(x, y), model.log_prob(x, y))
    assert loaded.modes.rank == 2 and loaded.config.training["images"] == 300
    assert loaded.check_invertibility(x)["within_half_step"] == 1
    assert loaded.config.training["config"] == trainer.config.to_dict()


@pytest.mark.parametrize("held_out", [0.3, 0.0])
def test_the_temperature_is_that_of_the_images_held_out(tmp_path: Path, held_out: float) -> None:
    data = toy_data(200)
    wrong = np.random.default_rng(0).random(200) < 0.2  # or nothing would be wrong about being sure
    data = data.with_targets(data.targets ^ wrong, data.classes)
    options = dict(preset="identity", flow_options={}, epochs=1, val_fraction=held_out)
    trainer = tiny_trainer(tmp_path / "run", data, **options)
    trainer.fit()
    model = GLEM.from_pretrained(tmp_path / "run")
    found = model.latent_classes.temperature
    assert found == (calibrate(model, data.subset(trainer.batches.split.val)) if held_out else 1.0)
    assert held_out == 0.0 or found > 1.5


def test_e_steps_leave_the_gaussians_and_m_steps_the_flow_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", **RUNS["glem"])
    gaussians, flow = trainer.model.gaussians, trainer.model.flow
    x, y = next(iter(trainer.batches.data.batches(trainer.batches.split.nf, 24)))
    e_step = partial(trainer.e_step, x, y, share(len(x)))
    for step, moves in ((e_step, flow), (trainer.m_step, gaussians)):
        before = {module: copy.deepcopy(module.state_dict()) for module in (gaussians, flow)}
        step()
        for module, state in before.items():
            same = all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())
            assert same == (module is not moves)


def test_an_m_step_comes_before_every_epoch_whose_loss_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=3, modes_rank=0)
    at, losses, m_step, e_step = [], [], trainer.m_step, trainer.e_step
    trainer.m_step = lambda: (at.append(trainer.step), m_step())
    trainer.e_step = lambda *batch: losses.append(e_step(*batch)) or losses[-1]
    trainer.fit()
    assert at == [0, 4, 8]
    found = [row["loss"] for row in rows(tmp_path) if row["kind"] == "epoch"]
    assert found == pytest.approx(np.reshape([loss for loss, _ in losses], (3, 4)).mean(1).tolist())


def test_lambda_falls_linearly(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", kld_weight=4.0, epochs=5)
    for trainer.m_done, weight in enumerate([4.0, 3.5, 3.0, 2.5, 2.0]):
        assert trainer.objective.weights(trainer.so_far) == pytest.approx({"kld_weight": weight})
    assert tiny_trainer(tmp_path / "hybrid", objective="hybrid").objective.weights(trainer.so_far) == {}


@pytest.mark.parametrize(("schedule", "shares"), [("multistep", [1, 0.5, 0.25]), ("cosine", [0.9, 0.5, 0.1])])
def test_learning_rates_warm_up_and_fall_to_their_floor(tmp_path: Path, schedule: str, shares: list[float]) -> None:
    trainer = tiny_trainer(tmp_path / "run", epochs=10, warmup_steps=8, lr=1e-2, schedule=schedule)
    rates = []
    for step in range(trainer.total_steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"] / 1e-2)
        trainer.scheduler.step_update(step + 1)
    assert len(rates) == 40 and rates[0] == pytest.approx(1 / 8) and rates[9] == pytest.approx(1, rel=0.01)
    assert (np.diff(rates[:9]) > 0).all() and (np.diff(rates[9:]) <= 1e-12).all()
    assert [rates[15], rates[25], rates[35]] == pytest.approx(shares, abs=0.06)
    assert rates[-1] >= 0.01
    if schedule == "multistep":  # halved after a half and three quarters of the steps
        assert [rates[i] for i in (18, 19, 28, 29)] == pytest.approx([1, 0.5, 0.5, 0.25])


def test_a_run_too_short_for_its_warm_up_has_a_lower_rate(tmp_path: Path) -> None:
    """A wide flow would jump: its first steps move every weight by as much as the rate, all in one direction."""
    trainer = tiny_trainer(tmp_path / "run", epochs=10, warmup_steps=1000, lr=1e-2)
    rates = []
    for step in range(trainer.total_steps):
        trainer.scheduler.step_update(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([1e-4, 1.95e-4, 2.9e-4]) and max(rates) == pytest.approx(20e-4, rel=0.05)
    assert trainer.lr == pytest.approx(20e-4)  # and the Gaussians' rate is relative to this
    longer = tiny_trainer(tmp_path / "longer", epochs=100, warmup_steps=1000, lr=1e-2)
    assert longer.lr == 1e-2  # its warm-up is cut short, too, but is slow enough


# ---- things that go wrong --------------------------------------------------------------------------------------------


def test_a_run_that_ends_badly_can_still_be_saved(tmp_path: Path) -> None:
    """Infinite held-out bits are no JSON."""
    trainer = tiny_trainer(tmp_path, epochs=1)
    trainer.measure = lambda: {"val_images": 1, "val_accuracy": 0.5, "val_bits_per_dim": math.inf}
    trainer.fit()
    assert GLEM.from_pretrained(tmp_path).config.training["worse_than_independent_pixels"] is True


@pytest.mark.parametrize(("setting", "method"), [("dropout", "set_dropout"), ("precision", "set_autocast")])
def test_settings_of_networks_are_refused_by_a_flow_without_networks(tmp_path: Path, setting: str, method: str) -> None:
    changes, seen = {setting: {"dropout": 0.1, "precision": "bf16"}[setting]}, list[Any]()
    with pytest.raises(ValueError, match=f"FlatIdentity can't be trained with {setting}.*{method}"):
        tiny_trainer(tmp_path, preset="identity", flow_options={}, **changes)
    flow = create_flow("identity", (1, 8, 8))
    flow.network = torch.nn.Identity()
    setattr(flow.network, method, seen.append)
    getattr(flow, method)(0.5)
    assert seen == [0.5]


def test_a_run_from_a_model_is_resumed_with_that_model(tmp_path: Path) -> None:
    first, data = tiny_trainer(tmp_path / "first", epochs=1).fit(), toy_data(90, k=3, seed=4)
    config = tiny_config(epochs=1, preset="mef_tiny", flow_options={})
    Trainer(data, config, tmp_path / "whole", init_model=first).fit()
    cut = Trainer(data, config, tmp_path / "cut", init_model=first)
    cut.stop_requested = True
    with pytest.raises(KeyboardInterrupt, match="step 1 of"):
        cut.fit()
    with pytest.raises(TrainingError, match="start model"):
        Trainer(data, config, tmp_path / "cut", resume=True)
    tuned = Trainer(data, config, tmp_path / "cut", True, first).fit()
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert tuned.config.training["init_from"]["weights_sha256"] == weights_sha256(first)
    assert not {"preset", "flow_options"} & tuned.config.training["config"].keys()  # of no effect there


def test_a_small_class_leaves_the_others_their_modes(tmp_path: Path) -> None:
    whole = toy_data(180, k=3)
    rows = np.concatenate([np.flatnonzero(whole.targets == k)[:n] for k, n in enumerate((60, 40, 3))])
    model = tiny_trainer(tmp_path, whole.subset(rows), epochs=1, modes_rank=8, val_fraction=0.0).fit()
    assert model.modes.rank == 8 and model.config.training["held_out"] == {}
    assert (model.modes.scales > 0).sum(1).tolist() == [8, 8, 2]


def test_images_of_five_channels_train_and_are_drawn(tmp_path: Path) -> None:
    data = toy_data(60, k=3, shape=(5, 8, 8))
    trainer = tiny_trainer(tmp_path, data, epochs=1, sample_every=1)
    assert trainer.fit().check_invertibility(data.tensor())["within_half_step"] == 1
    Image.open(tmp_path / "samples" / "epoch_0001.png").verify()


def test_callbacks_see_the_rows_of_the_log_and_may_stop_the_run(tmp_path: Path) -> None:
    trainer, seen = tiny_trainer(tmp_path), []

    def stop_after_the_second_epoch(row: dict[str, Any]) -> None:
        seen.append(row)
        trainer.stop_requested = row["kind"] == "epoch" and row["epoch"] == 2

    trainer.log.callbacks.append(stop_after_the_second_epoch)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        trainer.fit()
    assert [row["kind"] for row in seen] == ["epoch", "epoch"] and seen == rows(tmp_path)
