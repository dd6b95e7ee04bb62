"""The proof benchmark: who sees which images, what each method does to a batch, which stacks are compared."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.proof.augmentation import data as data
from benchmarks.proof.augmentation import plan as planning
from benchmarks.proof.augmentation import settings as settings
from benchmarks.proof.augmentation.ops import Stack
from benchmarks.proof.augmentation.plan import Store
from glem_augment import GLEM

CIFAR = replace(settings.SETTINGS["cifar10-50"], proof=("imagenette32", "own"))


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


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.METHODS)
def test_every_operation_of_a_stack_changes_or_keeps_images_and_labels(name: str) -> None:
    """Also the models that the operations move images along: they are built from parts of GLEM."""
    torch.manual_seed(1)
    x, y = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def flow(_: str, pooled: bool) -> GLEM:
        return GLEM.fit((x, y), rank=4, pooled=pooled)

    method = settings.METHODS[name]
    params = {**method.trials[-1], **({"flow": "identity"} if method.flow else {})}
    params |= {"p": 1.0} if "p" in params else {}
    moved, labels = Stack([(name, params)], flow, network, 20, 2, seed=0)(torch.arange(20), x, y)
    assert moved.shape == x.shape and moved.dtype == torch.float32 and bool(moved.isfinite().all())
    assert labels.shape in ((20,), (20, 2))
    assert torch.equal(moved, x / 255) == (name in ("none", "natural"))


# ---- the comparison --------------------------------------------------------------------------------------------------


class AllFlows:
    def missing(self, name: str, setting: settings.Setting) -> str | None:
        return None


def measure(plan: planning.Plan, store: Store, value) -> list[planning.Cell]:
    """Fill `store` with made-up numbers, stage by stage, until nothing is left to do; returns all cells."""
    for _ in range(10):
        cells = plan.cells(CIFAR, "cnn", store)
        missing = [cell for cell in cells if not store.has(cell) and not plan.lacks(cell)]
        if not missing:
            return cells
        for cell in missing:
            row = {
                **cell.row(), ("accuracy" if cell.stage in planning.ON_TEST else "val_accuracy"): value(cell),
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
    chosen = argparse.Namespace(
        opponents=list(settings.OPPONENTS), methods=["adversarial", "noise"], trials=3, best=1, seeds=[0, 1, 2, 3, 4],
        leaking=False, through=None, tuning_seeds=3, beside=None,
    )  # fmt: skip
    plan, store = planning.Plan(chosen, AllFlows()), Store(tmp_path)
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
