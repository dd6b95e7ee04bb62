"""The trainer: its pieces against brute force, and whole runs that are killed, resumed, poisoned and starved."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glem_augment import GLEM
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError, TrainingError
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.model.weights import weights_sha256
from glem_augment.training import TimeUpError, TrainConfig, Trainer
from glem_augment.training import checkpoint as statefile
from glem_augment.training import em as em_module
from glem_augment.training import trainer as trainer_module
from glem_augment.training.batches import augment_batch, epoch_order, some_of_each, stratified_split
from glem_augment.training.checkpoint import (
    GOOD,
    NEWEST,
    PREVIOUS,
    check_same_run,
    data_fingerprint,
    load_checkpoint,
)
from glem_augment.training.objective import LatentStatistics, m_learning_rates, m_step_loss, saturating_kld

# The networks here are too small for two, and equal bits need an equal number.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing them takes longer than the runs of these tests; one test looks at them."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(trainer_module, "plot_curves", lambda *args: None)


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_stratified_split_keeps_every_class_in_proportion() -> None:
    counts = [400, 200, 100, 20]
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(4), counts))
    split = stratified_split(targets, 4, 0.1, 0.05, 10_000, seed=3)
    everything = np.concatenate([split.nf, split.g, split.val])
    assert np.array_equal(np.sort(everything), np.arange(720))  # disjoint, and nothing lost
    for part in (split.nf, split.g, split.val):
        assert part.dtype == np.int64 and np.array_equal(part, np.sort(part))
    for k, n in enumerate(counts):
        assert np.sum(targets[split.val] == k) == round(0.05 * n)
        assert np.sum(targets[split.g] == k) == pytest.approx(0.1 * 0.95 * n, abs=0.51)
    again = stratified_split(targets, 4, 0.1, 0.05, 10_000, seed=3)
    assert all(np.array_equal(getattr(split, p), getattr(again, p)) for p in ("nf", "g", "val"))
    other = stratified_split(targets, 4, 0.1, 0.05, 10_000, seed=4)
    assert not np.array_equal(split.g, other.g)


@pytest.mark.parametrize("val_fraction", [0.0, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("g_fraction", [0.01, 0.1, 0.9])
def test_small_classes_keep_images_in_nf_and_g(g_fraction: float, val_fraction: float) -> None:
    targets = np.repeat(np.arange(6), [2, 3, 4, 5, 10, 40])
    split = stratified_split(targets, 6, g_fraction, val_fraction, 1000, 0)
    everything = np.concatenate([split.nf, split.g, split.val])
    assert np.array_equal(np.sort(everything), np.arange(len(targets)))
    for part in (split.nf, split.g):
        assert set(targets[part]) == set(range(6))
    assert set(targets[split.val]) == (set(range(1, 6)) if val_fraction else set())


def test_val_max_limits_the_held_out_images() -> None:
    targets = np.repeat(np.arange(5), 1000)
    assert len(stratified_split(targets, 5, 0.1, 0.2, 100, 0).val) == 100


def test_a_class_with_one_image_is_refused_by_number() -> None:
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        stratified_split(np.array([0, 0, 0, 1]), 3, 0.1, 0.1, 10, 0)


def test_epoch_order_is_a_function_of_seed_and_epoch() -> None:
    indices = np.arange(100, 205)
    order = epoch_order(indices, 10, seed=1, epoch=2)
    assert order.shape == (10, 10) and len(np.unique(order)) == 100 and set(order.flat) <= set(indices)
    assert np.array_equal(order, epoch_order(indices, 10, 1, 2))
    assert not np.array_equal(order, epoch_order(indices, 10, 1, 3))
    assert not np.array_equal(order, epoch_order(indices, 10, 2, 2))
    assert epoch_order(indices, 1000, 1, 2).shape == (1, 105)


# ---- the M-step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 5, 10, 100, 333])
@pytest.mark.parametrize("budget", [0.3, 1.45])
def test_m_learning_rates_spend_the_budget(total: int, budget: float) -> None:
    rates = m_learning_rates(TrainConfig(m_budget=budget), total)
    assert len(rates) == total and sum(rates) == pytest.approx(budget)
    assert all(r > 0 for r in rates) and all(a >= b - 1e-12 for a, b in zip(rates[1:], rates[2:], strict=False))
    if total == 100:
        assert sum(rates[:10]) == pytest.approx(budget / 1.45)
        assert rates[-1] == pytest.approx(rates[10] / 10)


def unbalanced(k: int = 3, d: int = 5) -> tuple[ClassGaussians, Tensor, Tensor, LatentStatistics]:
    gaussians = ClassGaussians(k, d).double()
    with torch.no_grad():
        gaussians.mu.normal_()
        gaussians.s.normal_(std=3)
    y = torch.arange(k).repeat_interleave(torch.arange(1, k + 1) * 4)
    z = torch.randn(len(y), d, dtype=torch.float64) + y[:, None]
    statistics = LatentStatistics(k, d, keep_latents=True)
    nll = -gaussians.log_prob_of(z, y).detach() + 7
    for part in torch.arange(len(y)).split(5):
        statistics.add(z[part], y[part], nll[part])
    return gaussians, z, y, statistics


def balanced(gaussians: ClassGaussians, z: Tensor, y: Tensor) -> Tensor:
    nll = -gaussians.log_prob_of(z, y)
    return torch.stack([nll[y == k].mean() for k in y.unique()]).mean()


def test_statistics_give_the_class_balanced_nll_of_the_samples() -> None:
    gaussians, z, y, statistics = unbalanced()
    torch.testing.assert_close(statistics.balanced_nll(gaussians), balanced(gaussians, z, y), rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(statistics.balanced_nll(gaussians), (gaussians.mu, gaussians.s))
    want = torch.autograd.grad(balanced(gaussians, z, y), (gaussians.mu, gaussians.s))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        nll = -gaussians.log_prob_of(z, y) + 7
    assert float(statistics.nll_low) == pytest.approx(float(nll.min()))
    assert float(statistics.nll_high) == pytest.approx(float(nll.max()))


def test_absent_classes_do_not_count() -> None:
    gaussians = ClassGaussians(3, 2).double()
    z, y = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 0, 2, 2, 2, 2])
    statistics = LatentStatistics(3, 2)
    statistics.add(z, y, torch.zeros(6))
    torch.testing.assert_close(statistics.balanced_nll(gaussians), balanced(gaussians, z, y))
    statistics.balanced_nll(gaussians).backward()
    assert gaussians.mu.grad[1].abs().max() == 0 and gaussians.mu.grad.isfinite().all()


@pytest.mark.parametrize("mu", [True, False])
def test_the_most_likely_variance_is_about_the_mean_that_stays(mu: bool) -> None:
    gaussians, z, y, statistics = unbalanced()
    free = ClassGaussians(*gaussians.mu.shape, psi=None).double()
    with torch.no_grad():
        free.mu.copy_(gaussians.mu)
    statistics.most_likely(free, mu=mu)
    for k in y.unique().tolist():
        own = z[y == k]
        mean = own.mean(0) if mu else gaussians.mu[k]
        torch.testing.assert_close(free.mu[k], mean.detach())
        torch.testing.assert_close(free.variance()[k], (own - mean).square().mean(0).clamp_min(0.03).detach())


def brute_force(
    gaussians: ClassGaussians, z: Tensor, y: Tensor, config: TrainConfig, weight: float, nll: Tensor
) -> Tensor:
    """The M-step's loss from its definition in ``TrainConfig``, with double loops over classes."""
    k, d = gaussians.mu.shape
    var = gaussians.variance()

    def kl(a: int, b: int) -> Tensor:
        difference = gaussians.mu[a] - gaussians.mu[b]
        return 0.5 * (torch.log(var[b] / var[a]) + (var[a] + difference**2) / var[b] - 1).sum()

    pairs = [(a, b) for a in range(k) for b in range(k) if a != b]
    loss = balanced(gaussians, z, y)

    def spread(values: Tensor) -> float:
        high, low = float(values.max()), float(values.min())
        return high - low + 0.2 * (abs(high) + abs(low))

    each = torch.nn.functional.cross_entropy(config.ce_scale * gaussians.log_prob(z), y, reduction="none")
    entropy = torch.stack([each[y == c].mean() for c in y.unique()]).mean()
    if config.repulsion == "kld":
        class_means = torch.stack([sum(kl(a, b) for b in range(k) if b != a) / (k - 1) for a in range(k)]).detach()
        loss = loss / spread(nll) - weight * sum(kl(a, b) for a, b in pairs) / (k * d) / spread(class_means)
        return loss + config.beta * entropy * d / spread(nll)
    loss = loss / d + config.beta * entropy
    if config.repulsion == "saturating":
        t = config.saturation * d
        loss = loss - weight * sum(t * (1 - torch.exp(-kl(a, b) / t)) for a, b in pairs) / len(pairs) / d
    return loss


@pytest.mark.parametrize("weight", [0.0, 0.7, 20.0])
@pytest.mark.parametrize(
    "options",
    [
        dict(objective="glem", repulsion="kld"),
        dict(objective="glem", repulsion="saturating", saturation=0.3),
        dict(objective="mle"),
        dict(objective="hybrid", beta=0.4),
        dict(objective="hybrid", beta=0.4, ce_scale=0.2),
        dict(objective="hybrid", beta=0.4, repulsion="kld"),
        dict(objective="hybrid", beta=0.4, repulsion="saturating"),
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_m_step_loss_and_gradient_equal_brute_force(options: dict[str, Any], weight: float) -> None:
    gaussians, z, y, statistics = unbalanced()
    config = TrainConfig(**options)
    nll = (-gaussians.log_prob_of(z, y) + 7).detach()
    loss, want = (
        m_step_loss(gaussians, statistics, config, weight),
        brute_force(gaussians, z, y, config, weight, nll),
    )
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)
    parameters = (gaussians.mu, gaussians.s)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_identical_gaussians_leave_the_step_to_the_likelihood() -> None:
    gaussians, z, y, statistics = unbalanced()
    with torch.no_grad():
        gaussians.mu.fill_(0.3)
        gaussians.s.zero_()
    m_step_loss(gaussians, statistics, TrainConfig(objective="glem"), 5.0).backward()
    got = gaussians.mu.grad
    assert got.isfinite().all() and got.abs().max() > 0
    (want,) = torch.autograd.grad(balanced(gaussians, z, y), gaussians.mu)
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0)
    assert cosine.item() == pytest.approx(1, abs=1e-9)


def test_saturating_repulsion_is_bounded_and_harmless_far_out() -> None:
    gaussians = ClassGaussians(4, 10).double()
    small = 1e-4 * torch.randn(4, 10)
    with torch.no_grad():
        gaussians.mu.copy_(small)
    mean = gaussians.kld_matrix().sum() / 12
    torch.testing.assert_close(saturating_kld(gaussians, 5.0), mean, rtol=1e-5, atol=0)  # slope one at the start
    with torch.no_grad():
        gaussians.mu.copy_(torch.arange(4)[:, None] * 1e4)
    value = saturating_kld(gaussians, 5.0)
    assert value.item() == pytest.approx(5.0)
    value.backward()
    assert gaussians.mu.grad.isfinite().all() and gaussians.mu.grad.abs().max() < 1e-12
    assert saturating_kld(ClassGaussians(1, 3), 5.0).item() == 0


def test_a_single_class_has_nothing_to_repel() -> None:
    gaussians = ClassGaussians(1, 3)
    statistics = LatentStatistics(1, 3)
    statistics.add(torch.randn(8, 3), torch.zeros(8, dtype=torch.long), torch.rand(8))
    for repulsion in ("kld", "saturating"):
        assert m_step_loss(gaussians, statistics, TrainConfig(repulsion=repulsion), 3.0).isfinite()


# ---- augmentations ---------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_is_exact_and_hits_half_of_the_images() -> None:
    x = torch.randint(0, 256, (400, 3, 5, 8), dtype=torch.uint8)
    out = augment_batch(x, ["flip"], generator())
    flipped = (out == x.flip(3)).flatten(1).all(1)
    assert (flipped | (out == x).flatten(1).all(1)).all()
    assert 150 < int(flipped.sum()) < 250


def test_crop_is_a_shift_that_repeats_the_edge() -> None:
    height, width = 16, 24
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    x = torch.stack([rows, columns]).to(torch.uint8)[None].repeat(300, 1, 1, 1)
    out = augment_batch(x, ["crop"], generator()).long()
    shifts = set()
    for image in out:
        dy, dx = int(image[0, 8, 0]) - 8, int(image[1, 0, 12]) - 12
        assert torch.equal(image[0], (rows + dy).clamp(0, height - 1))
        assert torch.equal(image[1], (columns + dx).clamp(0, width - 1))
        shifts.add((dy, dx))
    assert {dy for dy, _ in shifts} == set(range(-2, 3)) and {dx for _, dx in shifts} == set(range(-3, 4))


def test_rotation_keeps_the_centre_and_turns_by_up_to_twelve_degrees() -> None:
    """A bright dot on the horizontal axis moves along a circle of pixels, whatever the aspect of the image."""
    for height, width in ((41, 41), (41, 81)):
        x = torch.zeros(60, 1, height, width, dtype=torch.uint8)
        x[:, :, height // 2 - 1 : height // 2 + 2, width // 2 + 13 : width // 2 + 16] = 255
        out = augment_batch(x, ["rotate"], generator()).double()[:, 0]
        mass = out.sum((1, 2))
        dy = (out.sum(2) * torch.arange(height)).sum(1) / mass - height // 2
        dx = (out.sum(1) * torch.arange(width)).sum(1) / mass - width // 2
        torch.testing.assert_close(torch.hypot(dy, dx), torch.full_like(dy, 14.0), rtol=0.02, atol=0)
        angle = torch.rad2deg(torch.atan2(dy, dx))
        assert angle.abs().max() < 12.5 and angle.max() > 9 and angle.min() < -9


def test_jitter_changes_little() -> None:
    x = torch.randint(60, 180, (50, 3, 6, 6), dtype=torch.uint8)
    out = augment_batch(x, ["jitter"], generator())
    change = (out.float() - x.float()).abs()
    assert 1 < change.mean() < 20 and change.max() < 60
    flat = torch.full((50, 1, 6, 6), 100, dtype=torch.uint8)
    values = augment_batch(flat, ["jitter"], generator()).flatten(1)
    assert (values == values[:, :1]).all() and values.min() >= 89 and values.max() <= 111


@pytest.mark.parametrize("names", [["flip"], ["crop"], ["rotate"], ["jitter"], ["flip", "crop", "rotate", "jitter"]])
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 8, 12), (1, 5, 6, 4)])
def test_augmentation_is_deterministic_uint8_and_pure(names: list[str], shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = x.clone()
    out = augment_batch(x, names, generator(1))
    assert torch.equal(x, before)
    assert out.dtype == torch.uint8 and out.shape == x.shape and out.is_contiguous()
    assert torch.equal(out, augment_batch(x, names, generator(1)))
    assert torch.equal(augment_batch(x, [], generator()), x)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(objective="gan"), "objective must be one of glem, mle, hybrid"),
        (dict(repulsion="magnets"), "repulsion must be one of"),
        (dict(averaging="median"), "averaging"),
        (dict(schedule="step"), "schedule"),
        (dict(mean_init="ones"), "mean_init"),
        (dict(precision="fp8"), "precision"),
        (dict(memory="swap"), "memory must be one of stored, reversible"),
        (dict(compile=1), "compile must be true or false"),
        (dict(max_rollbacks=-1), "max_rollbacks"),
        (dict(max_minutes=0), "max_minutes"),
        (dict(max_minutes=math.inf), "max_minutes"),
        (dict(objective="mle", repulsion="kld"), "mle"),
        (dict(objective="mle", beta=0.1), "mle"),
        (dict(objective="glem", beta=0.1), "hybrid"),
        (dict(augment=("cutmix",)), "cutmix"),
        (dict(epochs=0), "epochs"),
        (dict(epochs=1.5), "epochs"),
        (dict(batch_size=-1), "batch_size"),
        (dict(m_steps=0), "m_steps"),
        (dict(max_bad_steps=0), "max_bad_steps"),
        (dict(warmup_steps=-1), "warmup_steps"),
        (dict(lr=0), "lr"),
        (dict(lr=math.nan), "lr"),
        (dict(lr=math.inf), "lr"),
        (dict(clip_norm=-1.0), "clip_norm"),
        (dict(kld_weight=-1.0), "kld_weight"),
        (dict(min_lr=math.nan), "min_lr"),
        (dict(g_fraction=0.0), "g_fraction"),
        (dict(g_fraction=1.0), "g_fraction"),
        (dict(val_fraction=1.0), "val_fraction"),
        (dict(ema_decay=1.5), "ema_decay"),
        (dict(bits=9), "bits"),
        (dict(bits=0), "bits"),
        (dict(milestones=(0.5, 1.5)), "milestones"),
        (dict(threads=0), "threads"),
        (dict(freeze_gaussians_at=0.0), "freeze_gaussians_at"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**bad)


def test_settings_survive_json_and_unknown_ones_are_named() -> None:
    config = TrainConfig(objective="hybrid", augment=("flip",), psi=(5, 0.2, 0.05), milestones=(0.3,))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="learning_rate"):
        TrainConfig.from_dict({"learning_rate": 1})


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
    return TrainConfig(
        **{
            **dict(
                preset="glow_tiny",
                flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[6, 6]),
                epochs=3,
                batch_size=24,
                warmup_steps=3,
                lr=5e-3,
                modes_rank=2,
                sample_every=0,
                seed=1,
                checkpoint_minutes=1e9,
            ),
            **changes,
        }
    )


def tiny_trainer(out: Path, data: ImageData | None = None, resume: bool = False, **changes: Any) -> Trainer:
    return Trainer(data or toy_data(), tiny_config(**changes), out, resume=resume, device="cpu", progress=False)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


RUNS = {
    "ema": dict(averaging="ema", ema_decay=0.9),
    "swa": dict(averaging="swa", swa_start=0.4, schedule="cosine"),
    "hybrid-kld": dict(objective="hybrid", repulsion="kld", beta=0.2, averaging="none", m_rounds=2, m_steps=2),
    "saturating-frozen": dict(
        objective="glem", repulsion="saturating", freeze_gaussians_at=0.6, augment=("crop", "jitter")
    ),
    "mef": dict(preset="mef_tiny", flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[4, 4]), psi=None, epochs=2),
    "identity": dict(preset="identity", flow_options={}, objective="mle", m_steps=3),
}


def comparable(out: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows(out)]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of ``RUNS`` that nobody disturbed."""
    done: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            tiny_trainer(done[name], **RUNS[name]).fit()
        return done[name]

    return folder


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("where", ["during step 2", "during the last step", "before an M-step"])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, whole_runs: Callable[[str], Path], name: str, where: str
) -> None:
    options, whole = RUNS[name], whole_runs(name)

    class Dying(Trainer):
        def e_step(self, x: Tensor, y: Tensor) -> float:
            loss = super().e_step(x, y)  # the weights have moved, the step is not counted yet
            if where == "during step 2" and self.step == 1:
                raise Killed
            if where == "during the last step" and self.step == self.total_steps - 1:
                raise Killed
            return loss

        def m_step(self) -> None:
            super().m_step()
            if where == "before an M-step" and self.m_done == 2:
                raise Killed

    data, out = toy_data(), tmp_path / "cut"
    # A checkpoint after every step.
    dying = Dying(data, tiny_config(**{**options, "checkpoint_minutes": 1e-9}), out, device="cpu", progress=False)
    with pytest.raises(Killed):
        dying.fit()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 1000000}\n{"kind": "ep')  # what came after the checkpoint, and half a line
    (out / ".model.safetensors.123-abcd.tmp").write_bytes(b"half")
    torch.manual_seed(999)
    resumed = tiny_trainer(out, resume=True, **options)
    assert resumed.step < resumed.total_steps
    resumed.fit()
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    held_out = [json.loads((f / "config.json").read_text())["training"]["held_out"] for f in (out, whole)]
    assert held_out[0] == held_out[1]
    assert comparable(out) == comparable(whole)
    assert [row["epoch"] for row in rows(out) if row["kind"] == "epoch"] == list(
        range(1, tiny_config(**options).epochs + 1)
    )


KILL = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import test_training as t
torch.set_num_threads(1)
t.trainer_module.plot_curves = lambda *args: None
class Dying(t.Trainer):
    def e_step(self, x, y):
        if self.step == 7:
            os._exit(9)
        return super().e_step(x, y)
config = t.tiny_config(**{**t.RUNS["ema"], "checkpoint_minutes": 0.0001})
Dying(t.toy_data(), config, sys.argv[2], device="cpu", progress=False).fit()
"""


def test_a_process_that_dies_is_resumed_to_the_same_bits(tmp_path: Path, whole_runs: Callable[[str], Path]) -> None:
    out = tmp_path / "cut"
    died = subprocess.run([sys.executable, "-c", KILL, str(Path(__file__).parent), str(out)], capture_output=True)
    assert died.returncode == 9, died.stderr.decode()
    tiny_trainer(out, resume=True, **RUNS["ema"]).fit()
    assert (out / "model.safetensors").read_bytes() == (whole_runs("ema") / "model.safetensors").read_bytes()


def test_a_stop_request_ends_between_two_steps_with_a_checkpoint(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "whole").fit()
    for at in (2, 4, 5):  # 4 is the last step of the first epoch
        out = tmp_path / f"cut{at}"
        trainer = tiny_trainer(out)
        assert trainer.steps_per_epoch == 4
        original = trainer.e_step

        def e_step(x: Tensor, y: Tensor, trainer=trainer, original=original, at=at) -> float:
            if trainer.step == at - 1:
                os.kill(os.getpid(), 2)  # Ctrl-C in the middle of a step
            return original(x, y)

        trainer.e_step = e_step
        with pytest.raises(KeyboardInterrupt, match=f"step {at}"):
            trainer.fit()
        assert load_checkpoint(out).step == at
        tiny_trainer(out, resume=True).fit()
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert comparable(out) == comparable(tmp_path / "whole")


def test_an_interrupt_inside_a_step_never_saves_half_of_it(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "whole").fit()
    trainer = tiny_trainer(tmp_path / "cut", checkpoint_minutes=1e-9)
    original = trainer.e_step

    def e_step(x: Tensor, y: Tensor) -> float:
        loss = original(x, y)
        if trainer.step == 5:
            raise KeyboardInterrupt
        return loss

    trainer.e_step = e_step
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    tiny_trainer(tmp_path / "cut", resume=True).fit()
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == whole


def test_the_same_settings_give_the_same_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_trainer(tmp_path / name, seed=seed, epochs=1).fit()
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


def test_training_improves_bits_and_finds_the_classes(tmp_path: Path) -> None:
    data = toy_data(300)
    trainer = tiny_trainer(tmp_path / "run", data, epochs=5, objective="hybrid", beta=0.3, val_fraction=0.2)
    before = trainer.measure()
    model = trainer.fit()
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
    # How the run was cut into pieces is not part of it.
    pieces = {"checkpoint_minutes", "max_minutes"}
    assert loaded.config.training["config"] == {k: v for k, v in trainer.config.to_dict().items() if k not in pieces}
    needed = {"val_bits_per_dim", "val_accuracy", "mu_max", "kld_min", "kld_mean", "saturated_variances"}
    assert needed | {"images_per_second", "loss", "lr", "bad_steps"} <= set(history[-1])


@pytest.mark.parametrize("name", ["ema", "hybrid-kld"])
def test_e_steps_leave_the_gaussians_and_m_steps_the_flow_alone(tmp_path: Path, name: str) -> None:
    trainer = tiny_trainer(tmp_path / "run", **RUNS[name])

    def state(module: torch.nn.Module) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in module.state_dict().items()}

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[k], b[k]) for k in b)

    gaussians, flow = trainer.model.gaussians, trainer.model.flow
    before = state(gaussians), state(flow)
    x, y = next(iter(trainer.data.batches(trainer.split.nf, 24)))
    trainer.e_step(x, y)
    assert equal(before[0], state(gaussians)) and not equal(before[1], state(flow))
    assert gaussians.mu.grad is None and gaussians.s.grad is None
    before = state(gaussians), state(flow)
    trainer.m_step()
    assert not equal(before[0], state(gaussians)) and equal(before[1], state(flow))


@pytest.mark.parametrize("learn_mu", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_only_what_is_learned_moves(tmp_path: Path, learn_mu: bool, learn_sigma: bool) -> None:
    trainer = tiny_trainer(tmp_path / "run", learn_mu=learn_mu, learn_sigma=learn_sigma)
    before = {k: v.clone() for k, v in trainer.model.gaussians.state_dict().items()}
    for _ in range(3):
        trainer.m_step()
    after = trainer.model.gaussians.state_dict()
    assert torch.equal(before["mu"], after["mu"]) != learn_mu
    assert torch.equal(before["s"], after["s"]) != learn_sigma


def test_means_never_move_further_than_the_budget(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", kld_weight=1000.0, epochs=10, m_budget=0.5)
    before = trainer.model.gaussians.mu.clone()
    for _ in range(10):
        trainer.m_step()
    moved = (trainer.model.gaussians.mu - before).abs().max().item()
    assert 0.1 < moved < 0.5 * 1.3  # Adam's steps are of about the learning rate


@pytest.mark.parametrize("m_rounds", [1, 2, 3, 5, 9])
def test_every_round_of_m_steps_takes_place(tmp_path: Path, m_rounds: int) -> None:
    """Also where rounds outnumber the batches of an epoch (4)."""
    trainer = tiny_trainer(tmp_path / "run", m_rounds=m_rounds, epochs=2, modes_rank=0)
    trainer.fit()
    assert trainer.m_done == 2 * m_rounds == trainer.m_total


def test_the_loss_of_an_epoch_is_the_mean_of_its_own_steps(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", modes_rank=0)
    losses, real = [], trainer.e_step
    trainer.e_step = lambda x, y: losses.append(real(x, y)) or losses[-1]
    trainer.fit()
    found = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert found == pytest.approx(np.reshape(losses, (3, -1)).mean(1).tolist())


def test_lambda_falls_linearly(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", kld_weight=4.0, kld_weight_end=0.5, epochs=5)
    weights = []
    for done in range(5):
        trainer.m_done = done
        weights.append(trainer.kld_weight())
    assert weights == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0])


def test_learning_rate_warms_up_and_is_halved_down_to_its_floor(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path / "run", epochs=10, warmup_steps=8, lr=1e-2, min_lr=2.5e-3, milestones=(0.5, 0.7, 0.9)
    )
    rates = []
    for step in range(trainer.total_steps):
        rates.append(trainer.flow_optimizer.param_groups[0]["lr"])
        trainer.scheduler.step_update(step + 1)
    assert len(rates) == 40 and rates[0] == pytest.approx(1e-2 / 8)
    assert all(b > a for a, b in zip(rates[:8], rates[1:9], strict=True)) and rates[9] == pytest.approx(1e-2)
    assert rates[18] == pytest.approx(1e-2) and rates[20] == pytest.approx(5e-3)
    assert rates[-1] == pytest.approx(2.5e-3)  # the third halving would pass the floor


@pytest.mark.parametrize("settings", [dict(schedule="cosine", lr=1e-3), dict(milestones=(0.75, 0.5), min_lr=1e-4)])
def test_learning_rates_never_rise_after_the_warm_up(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = tiny_trainer(tmp_path / "run", epochs=10, warmup_steps=8, **settings)
    rates = []
    for step in range(trainer.total_steps):
        rates.append(trainer.flow_optimizer.param_groups[0]["lr"])
        trainer.scheduler.step_update(step + 1)
    assert all(b <= a + 1e-12 for a, b in zip(rates[9:], rates[10:], strict=False))
    if "milestones" in settings:
        halved = [rates[18] / rates[21], rates[28] / rates[31]]
        assert halved == pytest.approx([2.0, 2.0])


# ---- things that go wrong --------------------------------------------------------------------------------------------


def poisoned(trainer: Trainer, steps: set[int]) -> None:
    """Make the latents of these E-steps NaN."""
    encode = trainer.model.encode

    def bad(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = encode(x, generator)
        return (z * math.nan if trainer.step in steps and torch.is_grad_enabled() else z), logdet

    trainer.model.encode = bad


def test_a_nan_step_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", max_bad_steps=3)
    x, y = next(iter(trainer.data.batches(trainer.split.nf, 24)))
    trainer.e_step(x, y)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    average = {k: v.clone() for k, v in trainer.average.state_dict().items()}
    poisoned(trainer, {0})
    for count in (1, 2):
        assert math.isnan(trainer.e_step(x, y))
        assert trainer.bad_steps == trainer.bad_in_a_row == count
        assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
        assert all(torch.equal(v, average[k]) for k, v in trainer.average.state_dict().items())
    trainer.step = 1  # a good step again
    assert math.isfinite(trainer.e_step(x, y))
    assert trainer.bad_in_a_row == 0 and trainer.bad_steps == 2
    assert all(v.isfinite().all() for v in trainer.model.state_dict().values())


def test_a_few_nan_steps_do_not_spoil_a_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", epochs=2)
    poisoned(trainer, {1, 2, 5})
    model = trainer.fit()
    assert trainer.bad_steps == 3 and model.config.training["bad_steps"] == 3
    assert all(v.isfinite().all() for v in model.state_dict().values())
    for row in rows(tmp_path / "run"):
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
    assert rows(tmp_path / "run")[-1]["bad_steps"] == 3


def test_nan_after_nan_stops_the_run_with_advice_and_good_weights(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out, max_bad_steps=3, epochs=4, max_rollbacks=2)
    poisoned(trainer, set(range(5, 100)))
    advice = r"diverged again after 2 returns.*3 steps in a row were not finite.*Lower lr"
    with pytest.warns(UserWarning, match="Returned to step 4") as returns, pytest.raises(TrainingError, match=advice):
        trainer.fit()
    assert len(returns) == 2
    state = load_checkpoint(out)
    weights = {name: value for name, value in state.tensors.items() if name.startswith(("model/", "average/"))}
    assert state.step >= 4 and weights and all(v.isfinite().all() for v in weights.values())
    assert not (out / "model.safetensors").exists()


def test_a_nan_in_the_m_step_leaves_the_gaussians_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.model.gaussians.state_dict().items()}
    real = em_module.m_step_loss
    monkeypatch.setattr(em_module, "m_step_loss", lambda *args: real(*args) * math.nan)
    trainer.m_step()
    assert trainer.bad_steps == 1
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.gaussians.state_dict().items())


def test_a_run_that_ends_badly_can_still_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite held-out bits are no JSON."""
    trainer = tiny_trainer(tmp_path / "run", epochs=1)
    real = trainer.measure
    monkeypatch.setattr(trainer, "measure", lambda: {**real(), "val_bits_per_dim": math.inf})
    trainer.fit()
    assert GLEM.from_pretrained(tmp_path / "run").num_classes == 2


@pytest.mark.parametrize("how", ["write", "fsync", "rename", "link"])
def test_a_full_disk_names_the_checkpoint_and_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    x, y = next(iter(trainer.data.batches(trainer.split.nf, 24)))
    for _ in range(2):
        trainer.save_checkpoint(good=True)
        trainer.e_step(x, y)
        trainer.step += 1
    newest, before = out / NEWEST, {name: (out / name).read_bytes() for name in (NEWEST, PREVIOUS, GOOD)}
    assert before[NEWEST] == before[GOOD] != before[PREVIOUS]

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if how == "write":
            patch.setattr("glem_augment.io._RawFile.write", full)
        elif how == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(os, "replace", full)
            if how == "link":
                patch.setattr(os, "link", full)
        with pytest.raises(OSError, match="no space left") as caught:
            trainer.save_checkpoint()
    assert caught.value.errno == errno.ENOSPC and str(newest) in str(caught.value)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob(".*tmp"))
    assert tiny_trainer(out, resume=True).step == 1
    trainer.save_checkpoint()  # there is space again
    assert load_checkpoint(out).step == 2 and (out / PREVIOUS).read_bytes() == before[NEWEST]
    assert not list(out.glob(".*tmp"))


def test_damaged_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    trainer.save_checkpoint()
    path = out / NEWEST
    assert sorted(p.name for p in out.iterdir()) == [NEWEST, "metrics.jsonl"]
    whole = path.read_bytes()
    for length in (0, 1, 4, 100, *range(0, len(whole), len(whole) // 25), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    for place in (0, 9, 100, *range(8, len(whole), len(whole) // 25), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    for foreign in (b"hello", b"\x80\x04\x95", b"PK\x03\x04" + b"\0" * 100, b"{}", os.urandom(1000)):
        path.write_bytes(foreign)
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    with monkeypatch.context() as patch:
        patch.setattr(statefile, "VERSION", 99)
        path.write_bytes(statefile.to_bytes(*trainer.state()))
    with pytest.raises(TrainingError, match="format 99, this version reads"):
        load_checkpoint(out)
    path.write_bytes(statefile.to_bytes({"step": 1}, {}))
    with pytest.raises(TrainingError, match="no settings"):
        load_checkpoint(out)


@pytest.mark.parametrize("name", [NEWEST, "checkpoint.pt"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"version": 1, "trap": Trap()}, tmp_path / name)
    with pytest.raises(TrainingError, match=name):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_the_pickled_checkpoint_of_an_older_version_is_named_as_such(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    torch.save({"version": 1, "step": 3}, out / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt was written by an older version.*pickle"):
        tiny_trainer(out, resume=True)
    with pytest.raises(TrainingError, match="already holds a run"):
        tiny_trainer(out)
    assert [p.name for p in out.iterdir()] == ["checkpoint.pt"]


def test_resuming_needs_a_run_with_the_same_settings_and_data(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="without --resume"):
        tiny_trainer(out, resume=True)
    tiny_trainer(out).save_checkpoint()
    with pytest.raises(TrainingError, match="already holds a run"):
        tiny_trainer(out)
    with pytest.raises(TrainingError, match="lr: 0.005 then, 0.1 now"):
        tiny_trainer(out, resume=True, lr=0.1)
    with pytest.raises(TrainingError, match="other data"):
        tiny_trainer(out, toy_data(100), resume=True)
    tiny_trainer(out, resume=True, checkpoint_minutes=7.0, sample_every=3, max_bad_steps=4)


def test_other_labels_names_or_pixels_are_other_data() -> None:
    data = toy_data()
    x, y = data.tensor(), data.targets
    changed = x.clone()
    changed[-1, 0, 0, 0] += 1
    others = [
        ImageData.from_tensors(x, np.roll(y, 1), data.classes),
        ImageData.from_tensors(x, y, ["class0", "class2"]),
        ImageData.from_tensors(changed, y, data.classes),
    ]
    assert data_fingerprint(ImageData.from_tensors(x, y, data.classes)) == data_fingerprint(data)
    assert len({data_fingerprint(each) for each in [data, *others]}) == 4


def test_a_class_without_enough_images_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = ImageData.from_tensors(
        torch.zeros(5, 1, 8, 8, dtype=torch.uint8), np.array([0, 0, 0, 0, 1]), ["a", "b"], name="toy"
    )
    with pytest.raises(DataError, match="at least 2 images"):
        tiny_trainer(tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_divide_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 6x6"):
        tiny_trainer(tmp_path / "run", toy_data(shape=(1, 6, 6)))
    assert not (tmp_path / "run").exists()


def test_fine_tuning_starts_from_the_given_flow(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path / "first", epochs=1).fit()
    other = toy_data(90, k=3, seed=4)
    trainer = Trainer(other, tiny_config(epochs=1), tmp_path / "second", init_model=first, device="cpu", progress=False)
    state = trainer.model.flow.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.flow.state_dict().items())
    assert trainer.model.num_classes == 3 and trainer.fit().classes == ["class0", "class1", "class2"]
    with pytest.raises(DataError, match=r"\(1, 8, 8\)"):
        Trainer(toy_data(shape=(1, 4, 8)), tiny_config(), tmp_path / "third", init_model=first, progress=False)


def test_a_resumed_run_keeps_the_record_of_what_it_started_from(tmp_path: Path) -> None:
    first, second = (tiny_trainer(tmp_path / name, epochs=1, seed=seed).fit() for name, seed in (("a", 1), ("b", 2)))
    data = toy_data(90, k=3, seed=4)

    def trainer(folder: str, init: GLEM | None, resume: bool, **config: Any) -> Trainer:
        out = tmp_path / folder
        return Trainer(data, tiny_config(epochs=1, **config), out, resume, init, device="cpu", progress=False)

    digest = weights_sha256(first)
    for folder, init in (("tuned", first), ("new", None)):
        with pytest.raises(TimeUpError):
            trainer(folder, init, False, max_minutes=1e-9).fit()
        with pytest.warns(UserWarning, match="goes on from its own checkpoint"):
            again = trainer(folder, second, True)
        record = again.fit().config.training
        assert record is not None and record.get("init_from", {}).get("weights_sha256") == (digest if init else None)


def test_a_small_class_leaves_the_others_their_modes(tmp_path: Path) -> None:
    y = np.array([0] * 60 + [1] * 40 + [2] * 3)
    whole = toy_data(180, k=3)
    rows = [i for k in range(3) for i in np.flatnonzero(whole.targets == k)[: int(np.sum(y == k))]]
    model = tiny_trainer(tmp_path / "run", whole.subset(rows), epochs=1, modes_rank=8).fit()
    assert model.modes.rank == 8
    assert (model.modes.scales > 0).sum(1).tolist() == [8, 8, 2]


def test_what_was_not_held_out_is_not_called_held_out(tmp_path: Path) -> None:
    model = tiny_trainer(tmp_path / "none", epochs=1, val_fraction=0.0).fit()
    assert model.config.training["held_out"] == {}
    model = tiny_trainer(tmp_path / "coded", epochs=1, code_rows=2, val_fraction=0.1).fit()
    assert set(model.config.training["held_out"]) == {"val_images", "val_bits_per_dim"}


def test_fine_tuning_takes_gaussians_of_another_psi(tmp_path: Path) -> None:
    data, wide = toy_data(), (20.0, 0.2, 0.01)
    first = tiny_trainer(tmp_path / "first", data, epochs=1, psi=wide).fit()
    config = tiny_config(epochs=1, psi=(10.0, 0.2, 0.001))
    second = Trainer(data, config, tmp_path / "second", init_model=first, device="cpu", progress=False)
    torch.testing.assert_close(second.model.gaussians.mu, first.gaussians.mu)
    torch.testing.assert_close(second.model.gaussians.variance(), first.gaussians.variance())
    with pytest.warns(UserWarning, match=r"can't give the variances .* by up to \d+.* Its own is psi=\(20"):
        narrow = tiny_config(epochs=1, psi=(0.1, 0.2, 0.01))
        Trainer(data, narrow, tmp_path / "third", init_model=first, device="cpu", progress=False)


def test_what_follows_the_last_step_can_be_changed_by_those_who_go_on(tmp_path: Path) -> None:
    with pytest.raises(TimeUpError):
        tiny_trainer(tmp_path / "run", objective="hybrid", refit_steps=5, max_minutes=1e-9).fit()
    model = tiny_trainer(tmp_path / "run", resume=True, objective="hybrid", refit_steps=0, modes_rank=0).fit()
    assert model.modes is None


def test_the_m_steps_entropy_weighs_classes_alike_smoothing_included() -> None:
    torch.manual_seed(0)
    gaussians = ClassGaussians(2, 3)
    y = (torch.arange(1000) >= 990).long()
    z = torch.randn(1000, 3) + y[:, None]  # or the other class's share would be as large as the own one's
    with torch.no_grad():
        gaussians.mu.copy_(torch.arange(2.0)[:, None].expand(2, 3))
    statistics = LatentStatistics(2, 3, keep_latents=True)
    statistics.add(z, y, torch.zeros(1000))
    losses = []
    for beta in (0.0, 1.0):
        config = tiny_config(objective="hybrid", beta=beta, label_smoothing=0.1, repulsion="none")
        losses.append(float(m_step_loss(gaussians, statistics, config, 0.0).detach()))
    log_p = (config.ce_scale * gaussians.log_prob(z)).log_softmax(1)
    smooth = -(0.95 * log_p.gather(1, y[:, None]) + 0.05 * log_p.gather(1, 1 - y[:, None]))[:, 0]
    balanced = (smooth[y == 0].mean() + smooth[y == 1].mean()) / 2
    assert losses[1] - losses[0] == pytest.approx(float(balanced.detach()), rel=1e-4)


def test_a_refit_of_some_images_has_some_of_every_class() -> None:
    targets = np.repeat([0, 1, 2], [900, 95, 5])
    rows = np.random.default_rng(0).permutation(1000)
    chosen = some_of_each(rows, targets[rows], 100)
    assert len(chosen) == len(set(chosen)) == 100
    assert np.bincount(targets[chosen]).tolist()[2] == 5 and np.bincount(targets[chosen])[1] >= 8
    assert np.array_equal(some_of_each(rows, targets[rows], 1000), rows)
    assert len(some_of_each(rows, targets[rows], 10)) == 21  # 8, 8 and the 5 there are


@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 8, 4), (5, 4, 4)])
def test_other_shapes_and_class_counts_train(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    data = toy_data(60, k=3, shape=shape)
    model = tiny_trainer(
        tmp_path / "run", data, epochs=1, preset="mef_tiny",
        flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[4, 4]), precision="bf16", sample_every=1,
    ).fit()  # fmt: skip
    assert model.image_shape == shape and model.check_invertibility(data.tensor())["within_half_step"] == 1
    assert (tmp_path / "run" / "samples" / "epoch_0001.png").stat().st_size > 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")) == []


def test_curves_are_drawn_where_matplotlib_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tiny_trainer(tmp_path / "run", epochs=1).fit()
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_refit_improves_the_gaussians_and_leaves_the_flow(tmp_path: Path) -> None:
    data = toy_data()
    trainer = Trainer(
        data, tiny_config(objective="hybrid", epochs=1, refit_steps=40), tmp_path, device="cpu", progress=False
    )
    x, y = data.tensor(), torch.from_numpy(data.targets)
    before = trainer.model.bits_per_dim(x, y).mean()
    flow = {name: value.clone() for name, value in trainer.model.flow.state_dict().items()}
    trainer.refit(trainer.model)
    assert trainer.model.bits_per_dim(x, y).mean() < before
    assert all(torch.equal(value, trainer.model.flow.state_dict()[name]) for name, value in flow.items())


def test_beta_is_annealed_geometrically_over_the_last_part(tmp_path: Path) -> None:
    options = dict(objective="hybrid", beta=0.8, beta_end=0.05, beta_anneal_from=0.5)
    trainer = Trainer(toy_data(), tiny_config(**options), tmp_path, device="cpu", progress=False)
    shares = {0.0: 0.8, 0.5: 0.8, 0.75: 0.8 * 0.05**0.5, 1.0: 0.04}
    for share, want in shares.items():
        trainer.step = share * trainer.total_steps
        assert trainer.beta() == pytest.approx(want)


def test_likelihood_alone_ends_at_its_maximum(tmp_path: Path) -> None:
    """Baseline 2: per class the mean and variance of the latents, as far as the lower bound allows."""
    trainer = tiny_trainer(tmp_path / "run", objective="mle", psi=None, refit_steps=1, modes_rank=0)
    model = trainer.fit()
    rows = np.concatenate([trainer.split.nf, trainer.split.g])
    statistics = trainer._latent_pass(trainer.m_total, np.sort(rows), keep=False, model=model)
    best = float(statistics.balanced_nll(model.gaussians))
    mean = (statistics.total / statistics.count[:, None]).float()
    torch.testing.assert_close(model.gaussians.mu, mean)
    for shift in (0.02, -0.02):
        moved = copy.deepcopy(model.gaussians)
        with torch.no_grad():
            moved.mu += shift
        assert float(statistics.balanced_nll(moved)) > best
        moved = copy.deepcopy(model.gaussians)
        with torch.no_grad():
            moved.set_variance(moved.variance() * (1 + shift))
        assert float(statistics.balanced_nll(moved)) >= best


def test_flows_of_fixed_gaussians_see_all_images(tmp_path: Path) -> None:
    fixed = tiny_trainer(tmp_path / "a", objective="mle", learn_mu=False, learn_sigma=False)
    assert fixed.frozen_from == 0 and tiny_trainer(tmp_path / "b").frozen_from > 0


def test_a_run_of_other_rules_is_not_gone_on_with(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.save_checkpoint()
    checkpoint = trainer.checkpoints.load()
    old = replace(checkpoint, facts={key: value for key, value in checkpoint.facts.items() if key != "rules"})
    check_same_run(checkpoint, trainer.config, trainer.fingerprint, "data")
    with pytest.raises(TrainingError, match="another version"):
        check_same_run(old, trainer.config, trainer.fingerprint, "data")
    free = TrainConfig.from_dict({**trainer.config.to_dict(), "objective": "hybrid", "repulsion": "none"})
    loose = replace(old, facts={**old.facts, "config": free.to_dict()})
    check_same_run(loose, free, trainer.fingerprint, "data")
