"""The proof benchmark: who sees which images, what each method does to a batch, what is compared with what."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.proof import augmentation_data as data
from benchmarks.proof import augmentation_ops as ops
from benchmarks.proof import augmentation_plan as planning
from benchmarks.proof import augmentation_report as reporting
from benchmarks.proof import augmentation_settings as settings
from benchmarks.proof import make_notmnist
from benchmarks.proof.augmentation_plan import Store
from benchmarks.proof.augmentation_train import make_body, order_of
from glem_augment import GLEM, open_data

CLASSES, COUNT = 3, 24


@pytest.fixture(scope="module")
def flow() -> GLEM:
    """A random flow for 3x8x8, adapted to `images()`."""
    torch.manual_seed(0)
    model = GLEM.create("glow_tiny", (3, 8, 8), ["x"], depth=[1, 1], blocks=[1, 1], width=[6, 6])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval().adapt(images(8), rank=6, progress=False)


def images(size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(COUNT) % CLASSES
    return (torch.randint(60, 160, (COUNT, 3, size, size), generator=g) + 25 * y[:, None, None, None]).to(
        torch.uint8
    ), y


def network(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, CLASSES))


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
    assert (
        torch.bincount(first.train[1]).tolist() == data.counts(setting, 10) == [40, 34, 29, 25, 22, 19, 16, 14, 12, 10]
    )
    assert torch.bincount(first.val[1]).tolist() == [25] * 10
    with pytest.raises(SystemExit, match="is this the full data set"):
        data.make_task(replace(setting, per_class=90), 0)


def test_classes_are_numbered_anew() -> None:
    x, y, names = data.images_of(replace(settings.SMOKE, classes=(7, 2)), "train")
    assert names == ["Sneaker", "Pullover"] and torch.bincount(y).tolist() == [100, 100]
    everything = data.images("bundled", "train", 28, 1)
    assert torch.equal(x[y == 0], everything[0][everything[1] == 7])


def test_order_is_a_function_of_the_seed_and_visits_all_images_alike() -> None:
    labels = torch.arange(10) % 2
    order = order_of(labels, 4, 25, seed=3)
    assert torch.equal(order, order_of(labels, 4, 25, seed=3))
    assert not torch.equal(order, order_of(labels, 4, 25, seed=4))
    assert torch.bincount(order.flatten()).tolist() == [10] * 10


def test_a_long_tail_is_oversampled_unless_an_opponent_takes_it_as_it_is() -> None:
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] * 5)
    order = order_of(labels, 10, 30, seed=0)
    assert torch.bincount(labels[order.flatten()]).tolist() == [100, 100, 100]
    seen = torch.bincount(order.flatten(), minlength=30)
    assert seen[20:].tolist() == [20] * 10 and int(seen[:20].min()) >= 2
    natural = order_of(labels, 10, 30, seed=0, oversampled=False)
    assert torch.bincount(natural.flatten()).tolist() == [10] * 30


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", list(settings.METHODS))
def test_every_method_changes_images_and_keeps_labels_honest(name: str, size: int, flow: GLEM) -> None:
    if name in ("latent-noise",) and size != 8:
        pytest.skip("a latent is of the flow's size")
    x, y = images(size)
    before, net = x.clone(), network(size)
    method = settings.METHODS[name]
    for params in method.trials:
        params = {**params, **({"p": 1.0} if "p" in params else {}), **({"flow": "it"} if method.flow else {})}
        stack = ops.Stack([(name, params)], lambda _: flow, net, COUNT, CLASSES, seed=0)
        out, labels = stack(torch.arange(COUNT), x, y)
        assert out.shape == x.shape and out.dtype == torch.float32
        low, high = (float(v) for v in out.aminmax())
        if name != "erasing":  # whose noise is Gaussian
            assert 0 <= low <= high <= 1
        assert torch.equal(x, before) and net.training
        assert all(p.grad is None for p in net.parameters())
        changed = (out != ops.as_float(x)).flatten(1).any(1).float().mean()
        as_they_were = name in ("none", "natural")
        assert changed == 0 if as_they_were else changed > 0.25  # mixing with l near 1 rounds away
        if labels.ndim == 2:
            torch.testing.assert_close(labels.sum(1), torch.ones(COUNT))
            assert name in ("mixup", "cutmix", "mode-mixup-any")
        else:
            assert torch.equal(labels, y)


def test_stacks_go_from_hard_to_soft_labels_and_from_bytes_to_floats(flow: GLEM) -> None:
    x, y = images(8)
    params = {**settings.METHODS["mode-mixup-any"].trials[0], "flow": "it"}
    components = [("mixup", {"alpha": 1.0}), ("mode-mixup-any", params), ("trivial", {"p": 0.5}), ("cropflip", {})]
    stack = ops.Stack(components, lambda _: flow, network(8), COUNT, CLASSES, seed=0)
    for _ in range(3):
        out, labels = stack(torch.arange(COUNT), x, y)
        assert out.dtype == torch.float32 and labels.shape == (COUNT, CLASSES)
        torch.testing.assert_close(labels.sum(1), torch.ones(COUNT))


def test_remembered_latents_are_the_latents(flow: GLEM) -> None:
    x = ops.as_float(images(8)[0])
    remembering = ops.RememberingGLEM.of(flow)
    first = remembering.encode(x)[0]
    torch.testing.assert_close(first, flow.encode(x)[0])
    remembering.flow = None  # from here on nothing can be encoded
    assert torch.equal(remembering.encode(x.flip(0))[0], first.flip(0))


def test_reused_changes_a_share_p_and_makes_each_image_anew_one_time_in_reuse() -> None:
    count, calls, changed = 64, [], []

    def transform(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(int(mask.sum()))
        return torch.where(mask[:, None, None, None], torch.full_like(x, len(calls)), x), y

    reused, g = ops.Reused(transform, 0.5, count), torch.Generator().manual_seed(0)
    x, y, rows = torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.arange(count), torch.randperm(count)
    for _ in range(200):
        out, labels = reused(rows, x, y, g)
        changed.append(float((out[:, 0, 0, 0] != 0).float().mean()))
        assert torch.equal(labels, y)
    assert np.mean(changed) == pytest.approx(0.5, abs=0.02)
    assert sum(calls) / (200 * count * 0.5) == pytest.approx(1 / settings.REUSE, abs=0.02)


@pytest.mark.parametrize(("name", "size"), [("cnn", 32), ("cnn", 64), ("resnet", 28)])
def test_classifiers_have_the_size_that_is_said(name: str, size: int) -> None:
    body = make_body(name, 1, 10, size)
    assert body(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert sum(p.numel() for p in body.parameters()) == pytest.approx({"cnn": 0.16e6, "resnet": 0.71e6}[name], rel=0.03)


# ---- what is compared ------------------------------------------------------------------------------------------------


CIFAR = replace(settings.SETTINGS["cifar10-50"], proof=("imagenette32", "own"))


class AllFlows:
    def missing(self, name: str, setting: settings.Setting) -> None:
        return None


def arguments(**changes) -> argparse.Namespace:
    chosen = dict(
        opponents=list(settings.OPPONENTS), methods=["adversarial", "noise"], trials=3, best=1, seeds=[0, 1, 2, 3, 4],
        leaking=False, through=None, tuning_seeds=3,
    )  # fmt: skip
    return argparse.Namespace(**{**chosen, **changes})


def measure(
    plan: planning.Plan, store: Store, value, rounds: int = 10, setting: settings.Setting = CIFAR
) -> list[planning.Cell]:
    """Fill `store` with made-up numbers, stage by stage, until nothing is left to do; returns all cells."""
    for _ in range(rounds):
        cells = plan.cells(setting, "cnn", store)
        missing = [cell for cell in cells if not store.has(cell) and not plan.lacks(cell)]
        if not missing:
            return cells
        rows = [
            {
                **cell.row(), ("accuracy" if cell.stage == "final" else "val_accuracy"): value(cell),
                "seconds_per_step": 0.01, "cell_seconds": 1.0, "protocol": settings.PROTOCOL, "images": 500,
                "measured_on": 1000, "steps": 10, "processor": "none", "threads": 1, "torch": "0",
            }
            for cell in missing
        ]  # fmt: skip
        for row in rows:
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
    plan, store = planning.Plan(arguments(), AllFlows()), Store(tmp_path)
    cells = measure(plan, store, made_up)
    assert len({cell.key for cell in cells}) == len(cells)
    stages = [cell.stage for cell in cells]
    assert sorted(set(stages), key=stages.index) == ["singles", "pairs", "ours", "final"]
    tried = {(c.side, c.flow, c.method): 0 for c in cells if c.stage in ("singles", "ours")}
    for cell in cells:
        if cell.stage in ("singles", "ours") and cell.seed == settings.TUNING_SEED:
            tried[cell.side, cell.flow, cell.method] += 1
    assert {key: n for key, n in tried.items() if n != 3} == {
        ("opponent", "none", "none"): 1,
        ("opponent", "none", "cropflip"): 1,
        ("opponent", "none", "latent-noise"): 6,  # through either flow
    }
    final = [cell for cell in cells if cell.stage == "final" and cell.seed == 0]
    assert {(c.side, c.flow, c.method) for c in final} == {
        ("opponent", "none", "cropflip"),
        ("opponent", "none", "opponent"),
        ("ours", "imagenette32", "noise"),
        ("ours", "own", "noise"),
        ("control", "identity", "noise"),
    }
    assert all([name for name, _ in c.base] == ["cropflip", "trivial", "erasing"] for c in final if c.base)
    assert {c.params["strength"] for c in final if c.method == "noise"} == {0.5}
    assert {cell.seed for cell in cells if cell.stage == "final"} == {0, 1, 2, 3, 4}
    # Tuning reads validation images, final cells test images, and never the other way round.
    rows = json.loads((tmp_path / "augmentation.json").read_text())
    assert all("accuracy" in row and "val_accuracy" not in row for row in rows) and len(rows) == 25
    tuning = json.loads((tmp_path / "augmentation_tuning.json").read_text())
    assert all("accuracy" not in row and row["seed"] in settings.TUNING_SEEDS for row in tuning)
    # With two more seeds: the best singles, the pair that joins them, the best of each method, flow and control.
    again = [cell for cell in cells if cell.seed in settings.TUNING_SEEDS[1:]]
    assert {(c.stage, c.method) for c in again if c.side == "opponent"} == {
        ("singles", "trivial"),
        ("pairs", "erasing"),
    }
    assert len(again) == 2 * (1 + settings.FINALISTS * (1 + 3 * 2))


def test_images_without_a_mirror_image_are_never_mirrored(tmp_path: Path, flow: GLEM) -> None:
    digits = replace(settings.SETTINGS["fashion-10"], flip=False)
    cells = measure(planning.Plan(arguments(), AllFlows()), Store(tmp_path), made_up, setting=digits)
    assert all("cropflip" not in dict(cell.stack) for cell in cells)
    assert all(cell.base[0][0] == "crop" for cell in cells if cell.base)
    assert [c.method for c in cells if c.stage == "final" and c.seed == 0][:2] == ["crop", "opponent"]
    stack = ops.Stack([("crop", {})], lambda name: flow, torch.nn.Identity(), 4, 2, 0)
    left = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    left[:, :, 10:18, 6:10] = 255  # a bar that no crop by an eighth takes to the other half
    moved = stack(torch.arange(64) % 4, left, torch.zeros(64, dtype=torch.int64))[0]
    assert moved[..., 14:].sum() == 0 and len(moved.flatten(1).unique(dim=0)) > 8


def test_a_lucky_first_seed_does_not_decide(tmp_path: Path) -> None:
    def value(cell: planning.Cell) -> float:
        lucky = 0.025 * (cell.seed == settings.TUNING_SEED)
        return made_up(cell) + (lucky - 0.02) * (cell.method == "noise")

    for seeds, winner in ((1, "noise"), (3, "adversarial")):
        plan, store = planning.Plan(arguments(tuning_seeds=seeds), AllFlows()), Store(tmp_path / str(seeds))
        final = [c for c in measure(plan, store, value) if c.stage == "final" and c.side == "ours"]
        assert {cell.method for cell in final} == {winner}


def test_without_its_flow_a_setting_stops_before_the_test_images(tmp_path: Path) -> None:
    class NoFlows:
        def missing(self, name: str, setting: settings.Setting) -> str | None:
            return None if name == "own" else "not there"

    store = Store(tmp_path)
    plan = planning.Plan(arguments(), NoFlows())
    cells = [cell for cell in measure(plan, store, made_up) if store.has(cell)]
    assert {cell.stage for cell in cells} == {"singles"}
    assert {cell.params["flow"] for cell in cells if cell.method == "latent-noise"} == {"own"}
    waiting = [cell for cell in plan.cells(CIFAR, "cnn", store) if plan.lacks(cell)]
    assert {(cell.method, cell.params["flow"]) for cell in waiting} == {("latent-noise", "imagenette32")}
    # What was measured serves when it comes.
    later = measure(planning.Plan(arguments(), AllFlows()), store, made_up)
    assert {c.flow for c in later} == {"none", "identity", "imagenette32", "own"}
    assert {c.key for c in cells} < {c.key for c in later}


def test_a_retuned_opponent_starts_ours_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    few = planning.Plan(arguments(opponents=["cropflip", "jitter"]), AllFlows())
    before = measure(few, store, made_up)
    more = planning.Plan(arguments(opponents=["cropflip", "jitter", "trivial"]), AllFlows())
    after = more.cells(CIFAR, "cnn", store)
    assert [c.key for c in after if not store.has(c)] == [
        c.key for c in after if c.method == "trivial"
    ]  # nothing of ours is known until the opponent is
    done = measure(more, store, made_up)
    assert not {c.key for c in before if c.stage == "ours"} & {c.key for c in done if c.stage == "ours"}


def test_report_pairs_seeds_and_takes_what_validation_chose(tmp_path: Path) -> None:
    store = Store(tmp_path)
    measure(planning.Plan(arguments(best=2, leaking=True), AllFlows()), store, made_up)
    (result,) = reporting.results_of(store)
    arm = result.best(("imagenette32", "own"))
    assert arm is not None and arm.method == "noise"  # though adversarial has the better test accuracy
    over = reporting.paired_gain(arm.accuracies, result.opponent.accuracies)
    assert (over.mean, over.half, over.seeds) == (pytest.approx(3.1), pytest.approx(0, abs=1e-9), 5)
    reporting.report(store, tmp_path)
    text = (tmp_path / "augmentation.md").read_text()
    proof, leaking = text.split("## Never counted")
    assert "noise, imagenette32" in proof and "noise, own" in proof and "noise, cifar10)" not in proof
    assert (
        "noise, cifar10)" in leaking.split("## All arms")[0] and "imagenette32" not in leaking.split("## All arms")[0]
    )
    assert "Interval over the opponent above zero: 1 (with at least 1 point: 1)" in text
    assert (tmp_path / "augmentation.png").stat().st_size > 1000


def test_paired_gain_is_students_t() -> None:
    gain = reporting.paired_gain({0: 0.50, 1: 0.52, 2: 0.57, 9: 0.1}, {0: 0.49, 1: 0.50, 2: 0.54, 5: 0.9})
    assert (gain.mean, gain.seeds) == (pytest.approx(2.0), 3)
    assert gain.half == pytest.approx(4.303 * 1.0 / math.sqrt(3), rel=1e-3)
    assert reporting.paired_gain({0: 0.5}, {1: 0.5}) is None
    assert math.isnan(reporting.paired_gain({0: 0.5}, {0: 0.4}).half)


def test_a_task_of_ones_own_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SETTINGS", {})
    monkeypatch.setattr(data, "PLACES", dict(data.PLACES))
    setting = data.own_setting("mine=bundled:fashion-mnist", 10, None, ["own", "bundled:fashion-mnist"], flip=True)
    assert (setting.name, setting.size, setting.channels, setting.plain) == ("mine-10", 28, 1, "cropflip")
    task = data.make_task(setting, seed=0)
    assert len(task.train[1]) == 100 and task.train[0].shape[1:] == (1, 28, 28) and len(task.test[1]) == 1000
    flows = data.Flows(tmp_path)
    assert flows.missing("bundled:fashion-mnist", setting) is None and flows.missing("own", setting) is None
    assert "--train-flow cifar10" in flows.missing("cifar10", setting)
    larger = data.own_setting("larger=bundled:fashion-mnist", 10, 32, ["bundled:fashion-mnist"], flip=False)
    assert (larger.size, larger.flow_size, larger.plain) == (32, 28, "crop")
    with pytest.raises(SystemExit, match="NAME=SPEC"):
        data.own_setting("mine", 10, None, ["own"], flip=True)


def test_notmnist_is_made_of_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    labels = np.repeat(np.arange(10, dtype=np.uint8), 5)
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    images[3] = images[1]  # of five images of the first letter four differ
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes(16 if name == "images-idx3" else 8)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    monkeypatch.setattr(make_notmnist, "PER_CLASS", 3)
    monkeypatch.setattr(sys, "argv", ["make_notmnist", str(tmp_path), str(tmp_path / "made")])
    make_notmnist.main()
    train, test = (open_data(tmp_path / "made", split) for split in ("train", "test"))
    assert np.bincount(train.targets).tolist() == [3] * 10 and np.bincount(test.targets).tolist() == [1] + [2] * 9
    assert torch.equal(train.tensor()[:3, 0], torch.from_numpy(images[:3]))
    assert torch.equal(test.tensor()[0, 0], torch.from_numpy(images[4]))
    monkeypatch.setattr(sys, "argv", ["make_notmnist", str(tmp_path / "nowhere"), str(tmp_path / "made")])
    with pytest.raises(SystemExit, match="is missing"):
        make_notmnist.main()
