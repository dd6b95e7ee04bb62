"""The proof benchmark: who sees which images, what each method does to a batch, what is compared with what."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.proof import augmentation_data as data
from benchmarks.proof import augmentation_ops as ops
from benchmarks.proof import augmentation_plan as planning
from benchmarks.proof import augmentation_report as reporting
from benchmarks.proof import augmentation_settings as settings
from benchmarks.proof import no_network, unlabelled
from benchmarks.proof.augmentation_plan import Store
from glem_augment import GLEM

CLASSES, COUNT = 3, 24
CIFAR = replace(settings.SETTINGS["cifar10-50"], proof=("imagenette32", "own"))


def images(size: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(COUNT) % CLASSES
    noise = torch.randint(60, 160, (COUNT, 3, size, size), generator=torch.Generator().manual_seed(1))
    return (noise + 25 * y[:, None, None, None]).to(torch.uint8), y


def network(size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, CLASSES))


@pytest.fixture(scope="module")
def flow() -> GLEM:
    """A random flow for 3x8x8, adapted to `images()`."""
    torch.manual_seed(0)
    model = GLEM.create("glow_tiny", (3, 8, 8), ["x"], depth=[1, 1], blocks=[1, 1], width=[6, 6])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval().adapt(images(8), rank=6, progress=False)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_seeds_draw_other_images_and_never_those_of_validation() -> None:
    setting = replace(settings.SMOKE, imbalance=4.0, per_class=40)
    first, again, other = (data.make_task(setting, seed) for seed in (0, 0, 1))

    def seen(part: tuple[Tensor, Tensor]) -> set[bytes]:
        return {row.tobytes() for row in part[0].numpy()}

    assert torch.equal(first.train[0], again.train[0]) and seen(first.train) != seen(other.train)
    assert torch.equal(first.val[0], other.val[0]) and torch.equal(first.test[0], other.test[0])
    for task in (first, other):
        assert not seen(task.train) & seen(task.val) and not (seen(task.train) | seen(task.val)) & seen(task.test)
    counts = torch.bincount(first.train[1]).tolist()
    assert counts == data.counts(setting, 10) == [40, 34, 29, 25, 22, 19, 16, 14, 12, 10]


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(settings.METHODS))
def test_every_method_changes_images_and_keeps_labels_honest(name: str, flow: GLEM) -> None:
    method = settings.METHODS[name]
    for size in (8,) if name == "latent-noise" else (8, 16):
        (x, y), net = images(size), network(size)
        before = x.clone()
        for params in method.trials:
            params = {**params, **({"p": 1.0} if "p" in params else {}), **({"flow": "it"} if method.flow else {})}
            stack = ops.Stack([(name, params)], lambda _: flow, net, COUNT, CLASSES, seed=0)
            out, labels = stack(torch.arange(COUNT), x, y)
            assert out.shape == x.shape and out.dtype == torch.float32 and torch.equal(x, before)
            # Erasing fills in Gaussian noise, which has no bounds.
            assert name == "erasing" or 0 <= float(out.min()) <= float(out.max()) <= 1
            assert net.training and all(p.grad is None for p in net.parameters())
            changed = (out != ops.as_float(x)).flatten(1).any(1).float().mean()
            assert changed == 0 if name in ("none", "natural") else changed > 0.25  # mixing with l near 1 rounds away
            soft = name in ("mixup", "cutmix", "mode-mixup-any")
            assert labels.sum(1).allclose(torch.ones(COUNT)) if soft else torch.equal(labels, y)


# ---- unlabelled images -----------------------------------------------------------------------------------------------


def test_every_method_learns_from_unlabelled_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "smoke", replace(settings.SMOKE, steps={"cnn": 3}))
    monkeypatch.setattr(unlabelled, "best_stack", lambda name: [("cropflip", {})])
    x = ops.as_float(unlabelled.task_of("smoke", 0).val[0][:4])
    for method, values in unlabelled.VALUES.items():
        value = values[0] and 0.0  # every label counts
        logits = [unlabelled.run("smoke", method, value, moves, 0)(x) for moves in (None, *unlabelled.MOVES)]
        assert all(part.shape == (4, 10) and bool(part.isfinite().all()) for part in logits)
        assert torch.equal(logits[0], logits[1]) == (method == "labelled")


def test_hopeless_methods_are_dropped_and_test_images_choose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = {"labelled": 50, "pseudo-labels": 70, "mean-teacher": 60, "fixmatch": 69}

    def run(name: str, method: str, value: float | None, moves: unlabelled.Moves, seed: int) -> float:
        lucky = seed != settings.TUNING_SEED and moves is None
        return quality[method] + (value or 0.0) / 100 + (moves == ("noise", 1.0)) + 10 * lucky

    monkeypatch.setattr(unlabelled, "run", run)
    monkeypatch.setattr(unlabelled, "task_of", lambda name, seed: Mock())
    monkeypatch.setattr(unlabelled, "accuracy", lambda network, images: network / 100)
    options = ["--settings", "cifar10-50", "--seeds", "0", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["unlabelled.py", *options])
    for _ in range(2):  # the second run finds all rows
        unlabelled.main()
        rows = json.loads((tmp_path / "unlabelled.json").read_text())
        tested = [(row["method"], row["tuned"], row["moves"]) for row in rows if "accuracy" in row and row["seed"] == 0]
        moves = ["noise", 1.0]
        assert tested == [
            ("labelled", None, None), ("pseudo-labels", 0.95, None), ("pseudo-labels", 0.95, moves),
            ("fixmatch", 0.95, None), ("fixmatch", 0.95, moves),
        ]  # fmt: skip
        assert all(("accuracy" in row) == (row["seed"] != settings.TUNING_SEED) for row in rows)
        assert len(rows) == sum(map(len, unlabelled.VALUES.values())) + 4 + 2 * 5


# ---- what is compared ------------------------------------------------------------------------------------------------


class AllFlows:
    def missing(self, name: str, setting: settings.Setting) -> str | None:
        return None


def planned(**changes) -> planning.Plan:
    chosen = dict(
        opponents=list(settings.OPPONENTS), methods=["adversarial", "noise"], trials=3, best=1, seeds=[0, 1, 2, 3, 4],
        leaking=False, through=None, tuning_seeds=3, triples=False,
    )  # fmt: skip
    return planning.Plan(argparse.Namespace(**{**chosen, **changes}), AllFlows())


def measure(plan: planning.Plan, store: Store, value) -> list[planning.Cell]:
    """Fill `store` with made-up numbers, stage by stage, until nothing is left to do; returns all cells."""
    for _ in range(10):
        cells = plan.cells(CIFAR, "cnn", store)
        missing = [cell for cell in cells if not store.has(cell) and not plan.lacks(cell)]
        if not missing:
            return cells
        for cell in missing:
            row = {
                **cell.row(), ("accuracy" if cell.stage == "final" else "val_accuracy"): value(cell),
                "seconds_per_step": 0.01, "cell_seconds": 1.0, "protocol": settings.PROTOCOL, "images": 500,
                "measured_on": 1000, "steps": 10, "processor": "none", "threads": 1, "torch": "0",
            }  # fmt: skip
            store.add(row)
    raise AssertionError("the plan does not end")


def made_up(cell: planning.Cell) -> float:
    """Trivial is the best single, with erasing the best pair; noise wins on validation, adversarial on the test."""
    names = [name for name, _ in cell.stack]
    result = 0.5 + 0.01 * cell.seed * (cell.stage == "final")
    result += 0.05 * ("trivial" in names) + 0.02 * ("erasing" in names) - 0.01 * ("mixup" in names)
    if cell.side in ("ours", "control"):
        better = "adversarial" if cell.stage == "final" else "noise"
        result += 0.03 * (cell.side == "ours") + 0.01 * (cell.method == better)
    return result + 0.001 * (cell.params.get("strength") == 0.5)


def test_plan_tunes_both_sides_and_tests_the_winners_of_validation_alone(tmp_path: Path) -> None:
    plan, store = planned(), Store(tmp_path)
    cells = measure(plan, store, made_up)
    assert len({cell.key for cell in cells}) == len(cells)
    stages = [cell.stage for cell in cells]
    assert sorted(set(stages), key=stages.index) == ["singles", "pairs", "ours", "final"]
    tried = [(c.side, c.flow, c.method) for c in cells if c.stage in ("singles", "ours") and c.seed == 1000]
    assert settings.TUNING_SEED == 1000
    assert {key: tried.count(key) for key in tried if tried.count(key) != 3} == {
        ("opponent", "none", "none"): 1,
        ("opponent", "none", "cropflip"): 1,
        ("opponent", "none", "latent-noise"): 6,  # through either flow
    }
    final = [cell for cell in cells if cell.stage == "final" and cell.seed == 0]
    arms = [("opponent", "none", "cropflip"), ("opponent", "none", "opponent"), ("ours", "imagenette32", "noise")]
    arms += [("ours", "own", "noise"), ("control", "identity", "noise")]
    assert sorted((c.side, c.flow, c.method) for c in final) == sorted(arms)
    assert all([name for name, _ in c.base] == ["cropflip", "trivial", "erasing"] for c in final if c.base)
    assert {c.params["strength"] for c in final if c.method == "noise"} == {0.5}
    # Tuning reads validation images, final cells test images, and never the other way round.
    rows = json.loads((tmp_path / "augmentation.json").read_text())
    assert all("accuracy" in row and "val_accuracy" not in row for row in rows) and len(rows) == 25
    tuning = json.loads((tmp_path / "augmentation_tuning.json").read_text())
    assert all("accuracy" not in row and row["seed"] in settings.TUNING_SEEDS for row in tuning)

    # A lucky first seed does not decide.
    def value(cell: planning.Cell) -> float:
        lucky = 0.025 * (cell.seed == settings.TUNING_SEED)
        return made_up(cell) + (lucky - 0.02) * (cell.method == "noise")

    for seeds, winner in ((1, "noise"), (3, "adversarial")):
        cells = measure(planned(tuning_seeds=seeds), Store(tmp_path / str(seeds)), value)
        assert {cell.method for cell in cells if cell.stage == "final" and cell.side == "ours"} == {winner}


def test_report_pairs_seeds_and_takes_what_validation_chose(tmp_path: Path) -> None:
    store = Store(tmp_path)
    measure(planned(best=2, leaking=True), store, made_up)
    (result,) = reporting.results_of(store)
    arm = result.best(("imagenette32", "own"))
    assert arm is not None and arm.method == "noise"  # though adversarial has the better test accuracy
    over = reporting.paired_gain(arm.accuracies, result.opponent.accuracies)
    assert (over.mean, over.half, over.seeds) == (pytest.approx(3.1), pytest.approx(0, abs=1e-9), 5)
    reporting.report(store, tmp_path)
    text = (tmp_path / "augmentation.md").read_text()
    proof, leaking = text.split("## Never counted")
    assert "noise, imagenette32" in proof and "noise, own" in proof and "noise, cifar10)" not in proof
    leaking = leaking.split("## All arms")[0]
    assert "noise, cifar10)" in leaking and "imagenette32" not in leaking
    assert "Interval over the opponent above zero: 1 (with at least 1 point: 1)" in text
    assert (tmp_path / "augmentation.png").stat().st_size > 1000


def test_an_opponent_is_never_worse_than_crop_and_flip(tmp_path: Path) -> None:
    def value(cell: planning.Cell) -> float:
        return made_up(cell) + 0.1 * (cell.stage == "final" and cell.method == "cropflip")

    store = Store(tmp_path)
    measure(planned(), store, value)
    (result,) = reporting.results_of(store)
    arm = result.best(("imagenette32",))
    assert arm is not None and result.strongest(arm) is result.plain is not result.opponent


@pytest.mark.parametrize(("better", "on_test"), [("cutmix", 0.03), ("mixup", -0.03), (None, 0.0)])
def test_a_third_operation_counts_where_validation_prefers_it(
    tmp_path: Path, better: str | None, on_test: float
) -> None:
    def value(cell: planning.Cell) -> float:
        preferred = 0.03 if cell.method == better else -0.03
        return made_up(cell) + (on_test if cell.stage == "final" else preferred)

    store = Store(tmp_path)
    measure(planned(), store, made_up)
    measure(planned(triples=True), store, value)
    (result,) = reporting.results_of(store)
    arm, tried = result.best(("imagenette32",)), {row["method"] for row in result.tuning if row["stage"] == "triples"}
    assert arm is not None and tried == {"jitter", "mixup", "cutmix", "pixel-adversarial", "latent-noise"}
    chosen = [name for name, _ in result.opponent.stack]
    assert chosen == ["cropflip", "trivial", "erasing", *([better] if better else [])]
    assert (result.strongest(arm) is result.opponent) == (on_test >= 0)
    assert len(result.strongest(arm).accuracies) == 5


def test_without_a_network_classes_are_told_apart() -> None:
    rows = no_network.run(settings.SMOKE, [0, 1])
    assert [(row["method"], row["seed"]) for row in rows] == list(
        itertools.product(("hog-ridge", "label-spreading"), (0, 1))
    )
    assert all(row["accuracy"] > 0.6 and row["val_accuracy"] > 0.6 for row in rows)
