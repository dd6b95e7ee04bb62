"""The benchmark of the paper's tables: the cells, and tables and verdicts out of the stored results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper.lab import method_settings
from benchmarks.paper.methods import METHODS
from benchmarks.paper.paper import main
from benchmarks.paper.research import split_settings
from benchmarks.paper.scales import SCALES
from benchmarks.paper.tables import CLAIMS, TITLES, cells_of
from glem_augment.cli.common import table as settings_of
from glem_augment.training import TrainConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# ---- the cells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_is_a_method_with_settings_that_exist(scale: str) -> None:
    used = set()
    for table in TITLES:
        cells = cells_of(table, SCALES[scale].sizes)
        for cell in cells:
            TrainConfig(**split_settings({**method_settings(cell.method), **SCALES[scale].flow, **cell.changes})[0])
            assert cell.data in ("main", "second") and set(cell.paper) <= set(cell.metrics)
            assert cell.method != "ce" or "NF-A" not in cell.metrics  # one Gaussian can't classify
        assert len({(cell.label, cell.data, cell.setting) for cell in cells}) == len(cells) > 0
        used |= {cell.method for cell in cells}
    assert set(METHODS) <= used


def test_recipes_are_settings_and_those_with_m_steps_say_so() -> None:
    for path in sorted((BENCHMARKS / "recipes").glob("*.yaml")):
        own, research = split_settings(settings_of(str(path)))
        TrainConfig(**own)
        assert research.joint == ("m_steps" not in own), path.name


# ---- tables and results ----------------------------------------------------------------------------------------------


def test_stored_tables_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are those of today's settings: nothing is loaded, trained or added."""
    stored = (BENCHMARKS / "results" / "paper.csv").read_bytes()
    (tmp_path / "paper.csv").write_bytes(stored)
    options = ["all", "--scale", "cpu", "--device", "cpu", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["paper.py", *options])
    main()
    assert not (tmp_path / "work").exists()
    assert (tmp_path / "paper.csv").read_bytes() == stored


def test_claims_are_about_arms_of_the_tables() -> None:
    for _, number, role, *arms, metric in CLAIMS:
        cells = {cell.arm: cell for cell in cells_of(number, SCALES["cpu"].sizes) if cell.data == role}
        assert all(metric in cells[arm].metrics for arm in arms)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_missing_number_is_measured_again_and_comes_out_the_same(tmp_path: Path) -> None:
    """Table 6 at the smallest scale, and again after rows left."""
    command = [sys.executable, str(BENCHMARKS / "paper" / "paper.py"), "6", "--scale", "smoke", "--device", "cpu"]
    command += ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    subprocess.run(command, check=True)
    path = tmp_path / "paper.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[9:]]))
    subprocess.run(command, check=True)
    before, after = (
        sorted(line.split(",")[:7] for line in text) for text in (lines, path.read_text().splitlines(True))
    )
    assert before == after and len(after) == 27
