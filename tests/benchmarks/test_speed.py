"""The benchmarks of speed on tiny sizes: they run, and what they call floor, opponent and memory is what it says."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import backbones, densities, pipeline, reversible, speed, speed_measure, speed_report
from benchmarks.speed.speed_published import PublishedCoupling, PublishedFlow, expm, phi

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p for p in (ROOT / "benchmarks").glob("*/*.py") if '__name__ == "__main__"' in p.read_text())
MEF = {
    "preset": "mef_tiny", "image_shape": (1, 8, 8), "batch": 2,
    "overrides": {"depth": [1, 2], "blocks": [1, 1], "width": [8, 8]},
}  # fmt: skip
# A single level, which is what the other libraries have.
GLOW = {**MEF, "preset": "glow_tiny", "overrides": {"depth": [2], "blocks": [1], "width": [8]}}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_can_be_imported_and_says_how_it_is_run(script: Path) -> None:
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    assert f"python benchmarks/{script.parent.name}/{script.name}" in importlib.import_module(name).__doc__


# ---- floor and timing --------------------------------------------------------------------------------------------


def test_every_form_of_the_floor_does_the_work_of_the_subnets() -> None:
    flow, x = speed.make_flow(MEF, CPU)
    nets = [coupling.net for coupling in speed.couplings(flow)]
    inputs, gradients = speed_measure.met(flow, nets, x)
    assert [tuple(t.shape) for t in inputs] == [(2, 2, 4, 4), (2, 4, 2, 2), (2, 4, 2, 2)]
    for form in speed_measure.FORMS:
        floor = speed_measure.Floor(form, nets, inputs, gradients)
        for module, net, own, given in zip(floor.nets, nets, floor.inputs, inputs, strict=True):
            assert module is not net
            torch.testing.assert_close(module(own), net(given))
        outputs = [module(own) for module, own in zip(floor.nets, floor.inputs, strict=True)]
        torch.autograd.backward(outputs, floor.gradients)
        # Every weight takes part, or the floor would be too low.
        assert all(p.grad is not None and p.grad.any() for module in floor.nets for p in module.parameters())


@pytest.mark.parametrize("n", [4, 5])
def test_everybody_follows_everybody_else_equally_often(n: int) -> None:
    orders = list(itertools.islice(speed_measure.balanced_orders(n), 2 * n if n % 2 else n))
    assert all(sorted(order) == list(range(n)) for order in orders)
    pairs = [pair for order in orders for pair in itertools.pairwise(order)]
    assert {pairs.count(pair) for pair in itertools.permutations(range(n), 2)} == {len(orders) // n}


# ---- opponents ---------------------------------------------------------------------------------------------------


def test_published_exponentials_are_exponentials() -> None:
    m = torch.randn(5, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(expm(m), torch.matrix_exp(m))
    u, v = torch.randn(5, 6, 3, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(eye + u @ phi(v @ u) @ v, torch.matrix_exp(u @ v))


def _check_bijection(flow: nn.Module, x: Tensor) -> None:
    """Round trip, and log|det| against the Jacobian of the first image."""
    with torch.no_grad():
        z, logdet = flow(x)
        back, minus = flow.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(minus, -logdet, atol=1e-3, rtol=1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0].flatten(), x[0])
    expected = jacobian.reshape(x[0].numel(), -1).double().slogdet()[1].float()
    torch.testing.assert_close(logdet.expand(len(x))[0], expected, atol=1e-3, rtol=1e-3)


def test_the_published_flow_is_a_flow_with_our_subnets() -> None:
    flow, x = speed.make_flow(MEF, CPU)
    nets = [coupling.net for coupling in speed.couplings(flow)]
    theirs = PublishedFlow(MEF["image_shape"], MEF["overrides"]["depth"], nets)
    theirs.initialise(torch.rand(64, 1, 8, 8))
    _check_bijection(theirs, x)
    assert {id(p) for net in nets for p in net.parameters()} <= {id(p) for p in theirs.parameters()}
    _check_bijection(PublishedCoupling(52, nn.Conv2d(26, 26 + 2 * 3 * 26, 1)), torch.randn(2, 52, 1, 2))  # low rank


# ---- the report --------------------------------------------------------------------------------------------------


def test_rows_and_verdicts_are_ratios_of_one_round() -> None:
    rng = np.random.default_rng(0)
    load = 1 + rng.random(40)  # what slows everybody in a round is no noise of a ratio
    times: dict[tuple[str, str], list[float]] = {}
    for name, factor in (("floor: a", 1.0), ("floor: b", 1.2), (speed_report.OURS, 1.45), ("FrEIA", 1.4)):
        for operation in ("train", "forward") if name.startswith("floor") else speed_report.OPERATIONS:
            times[name, operation] = list(factor * load)
    rows = {row["side"]: row for row in speed_report.rows_of("glow_tiny_0", 16, times, {speed_report.OURS: 2**20})}
    ours = rows[speed_report.OURS]
    assert ours["train overhead"] == pytest.approx(0.45) and ours["MiB for backward"] == 1
    assert ours["decode images/s"] == pytest.approx(16 / np.median(1.45 * load))
    assert rows["floor: a"]["train overhead"] is None
    found = {row["what"]: row for row in speed_report.verdicts("glow_tiny_0", times)}
    assert found["train / FrEIA"]["ratio"] == pytest.approx(1.45 / 1.4) and not found["train / FrEIA"]["met"]
    found = {row["what"]: row for row in speed_report.verdicts("mef_tiny", times)}
    assert found["train / its networks"]["limit"] == 1.4 and not found["train / its networks"]["met"]
    # A difference within the noise is a tie.
    times[speed_report.OURS, "train"] = list(1.4 * load * (1.02 + 0.3 * rng.standard_normal(40)))
    found = {row["what"]: row for row in speed_report.verdicts("glow_tiny_0", times)}
    assert found["train / FrEIA"]["met"] and found["train / FrEIA"]["noise"] > 0.03


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_speed_writes_json_table_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "CASES", {"mef_tiny": MEF, "glow_tiny_0": GLOW})
    options = ["--cases", "mef_tiny", "glow_tiny_0", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    speed.main()
    record = json.loads((tmp_path / "speed.json").read_text())
    sides = {(row["case"], row["side"]): row["MiB for backward"] for row in record["rows"]}
    assert {("mef_tiny", "published (MEF)"), ("glow_tiny_0", "glem-augment")} <= set(sides)
    assert sides["mef_tiny", speed_report.OURS] > sides["mef_tiny", speed_report.REVERSIBLE] > 0
    assert "## verdicts" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


# ---- the others --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_pipeline_measures_data_set_and_augmentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, images, labels = pipeline.random_model("glow_tiny", depth=[1, 1], blocks=[1, 1], width=[8, 8])
    monkeypatch.setattr(pipeline, "LOADERS", {"0 workers": {"num_workers": 0}})
    rows = pipeline.measure_synthetic(model, per_class=2, rounds=1, folder=tmp_path)
    assert [row["part"] for row in rows] == ["raw decode", "loader", "export"]
    assert len(list(tmp_path.glob("export-0/*/*.png"))) == 2 * model.num_classes
    rows = pipeline.measure_augment(model, images[:16].float() / 255, labels[:16], rounds=1)
    assert len(rows) == len(pipeline.AUGMENTS) and all(row["ratio"] > 0 for row in rows)


def test_backbones_trains_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbones, "VARIANTS", {"tiny": {"depth": [1, 1], "width": [8, 8]}})
    options = ["--data", "bundled", "--seeds", "0", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["backbones.py", *options, "--held-out", "60", "--out", str(tmp_path)])
    backbones.main()
    record = json.loads((tmp_path / "backbones.json").read_text())
    assert record["cells"][0]["bits_per_dim"] > 0 and record["rows"][0]["seeds"] == 1


def test_densities_and_the_drift_of_reversible_training_are_measured() -> None:
    assert [row["ratio"] > 0 for row in densities.measure(classes=4, dim=48, batch=3, rounds=2)] == [True] * 3
    rows = reversible.measure([1, 3], batch=2, image_shape=(1, 8, 8), width=4, seed=0)
    assert [(row["steps"], row["subnets"]) for row in rows] == [(1, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16")]
    for row in rows:
        limit = 1e-4 if row["subnets"] == "fp32" else 0.2
        assert 0 <= row["gradients, relative"] <= row["worst tensor's"] < limit
        assert row["input, largest error"] < 1e-4
