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

from benchmarks.common import balanced_orders
from benchmarks.speed import backbones, reversible, speed
from benchmarks.speed.opponents import PublishedCoupling, PublishedFlow, expm, phi

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


@pytest.mark.parametrize("n", [4, 5])
def test_everybody_follows_everybody_else_equally_often(n: int) -> None:
    orders = list(itertools.islice(balanced_orders(n), 2 * n if n % 2 else n))
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
        torch.testing.assert_close(flow.inverse(z), x, atol=1e-4, rtol=1e-4)

    def flat(one: Tensor) -> Tensor:
        z = flow(one[None])[0]
        return torch.cat([part.flatten() for part in (z if isinstance(z, tuple) else (z,))])

    jacobian = torch.autograd.functional.jacobian(flat, x[0])
    expected = jacobian.reshape(x[0].numel(), -1).double().slogdet()[1].float()
    torch.testing.assert_close(logdet.expand(len(x))[0], expected, atol=1e-3, rtol=1e-3)


def test_the_published_flow_is_a_flow_with_our_subnets() -> None:
    flow, x = speed.make_flow(MEF)
    nets = speed.subnets(flow)
    theirs = PublishedFlow(MEF["image_shape"], MEF["overrides"]["depth"], nets)
    theirs(torch.rand(64, 1, 8, 8))  # initialises
    _check_bijection(theirs, x)
    assert {id(p) for net in nets for p in net.parameters()} <= {id(p) for p in theirs.parameters()}
    _check_bijection(PublishedCoupling(52, nn.Conv2d(26, 26 + 2 * 3 * 26, 1)), torch.randn(2, 52, 1, 2))  # low rank


# ---- the report --------------------------------------------------------------------------------------------------


def test_rows_and_verdicts_are_ratios_of_one_round() -> None:
    rng = np.random.default_rng(0)
    load = 1 + rng.random(40)  # what slows everybody in a round is no noise of a ratio
    times: dict[tuple[str, str], list[float]] = {}
    for name, factor in (("floor: a", 1.0), ("floor: b", 1.2), (speed.OURS, 1.45), ("FrEIA", 1.4)):
        for operation in ("train", "forward") if name.startswith("floor") else speed.OPERATIONS:
            times[name, operation] = list(factor * load)
    rows = {row["side"]: row for row in speed.rows_of("glow_tiny_0", times)}
    assert rows[speed.OURS]["train overhead"] == pytest.approx(0.45) and list(rows) == [speed.OURS, "FrEIA"]
    found = {row["what"]: row for row in speed.verdicts("glow_tiny_0", times)}
    assert found["train / FrEIA"]["ratio"] == pytest.approx(1.45 / 1.4) and not found["train / FrEIA"]["met"]
    found = {row["what"]: row for row in speed.verdicts("mef_tiny", times)}
    assert found["train / its networks"]["limit"] == 1.4 and not found["train / its networks"]["met"]
    # A difference within the noise is a tie.
    times[speed.OURS, "train"] = list(1.4 * load * (1.02 + 0.3 * rng.standard_normal(40)))
    found = {row["what"]: row for row in speed.verdicts("glow_tiny_0", times)}
    assert found["train / FrEIA"]["met"] and found["train / FrEIA"]["noise"] > 0.03


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_speed_measures_every_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "CASES", {"mef_tiny": MEF, "glow_tiny_0": GLOW})
    monkeypatch.setattr(sys, "argv", ["speed.py", "--rounds", "1", "--out", str(tmp_path)])
    speed.main()
    record = json.loads((tmp_path / "speed.json").read_text())
    sides = {(row["case"], row["side"]) for row in record["rows"]}
    assert {("mef_tiny", speed.PUBLISHED), ("mef_tiny", speed.REVERSIBLE), ("glow_tiny_0", speed.OURS)} <= sides
    assert "## verdicts" in (tmp_path / "speed.md").read_text()


# ---- the others --------------------------------------------------------------------------------------------------


def test_backbones_trains_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbones, "VARIANTS", {"tiny": {"depth": [1, 1], "width": [8, 8]}})
    options = ["--data", "bundled", "--seeds", "0", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["backbones.py", *options, "--held-out", "60", "--out", str(tmp_path)])
    backbones.main()
    record = json.loads((tmp_path / "backbones.json").read_text())
    assert record["cells"][0]["bits_per_dim"] > 0 and record["rows"][0]["seeds"] == 1


def test_the_drift_of_reversible_training_is_measured() -> None:
    rows = reversible.measure([1, 3], batch=2, image_shape=(1, 8, 8), width=4, seed=0)
    assert [(row["steps"], row["subnets"]) for row in rows] == [(1, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16")]
    for row in rows:
        limit = 1e-4 if row["subnets"] == "fp32" else 0.2
        assert 0 <= row["gradients, relative"] <= row["worst tensor's"] < limit
        assert row["input, largest error"] < 1e-4
