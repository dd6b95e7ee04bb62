"""The benchmark of the paper's tables: the cells, and tables and verdicts out of the stored results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper.lab import method_settings
from benchmarks.paper.methods import METHODS
from benchmarks.paper.paper import main
from benchmarks.paper.research import split_settings
from benchmarks.paper.scales import SCALES
from benchmarks.paper.tables import TITLES, cells_of
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
    assert set(METHODS) - used == {"lambda0-psi", "saturating", "unlabelled"}  # offered, in no table of the paper


def test_recipes_are_settings_and_those_with_m_steps_say_so() -> None:
    for path in sorted((BENCHMARKS / "recipes").glob("*.yaml")):
        own, research = split_settings(settings_of(str(path)))
        TrainConfig(**own)
        assert research.joint == ("m_steps" not in own), path.name


# ---- tables and results ----------------------------------------------------------------------------------------------


def test_a_table_comes_out_of_the_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data, flows or measuring. `test_numbers` has the pages of all tables."""
    stored = BENCHMARKS / "results" / "paper"
    for path in stored.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options = ["6", "--scale", "cpu", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["paper.py", *options, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert main() == 0 and not (tmp_path / "work").exists()
    assert json.loads((tmp_path / "table6.cpu.json").read_text()) == json.loads(
        (stored / "table6.cpu.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_table_stops_resumes_and_comes_out_the_same(tmp_path: Path) -> None:
    """Table 6 at the smallest scale: whole, and in pieces of two seconds."""
    results = []
    for name, limit in (("whole", []), ("pieces", ["--max-minutes", "0.03"])):
        command = [sys.executable, str(BENCHMARKS / "paper" / "paper.py"), "6", "--scale", "smoke", "--device", "cpu"]
        command += ["--threads", "1", "--out", str(tmp_path / name), "--work", str(tmp_path / name / "work"), *limit]
        codes = []
        while not codes or codes[-1] == 75:
            codes.append(subprocess.run(command, capture_output=True).returncode)
        assert codes[-1] == 0 and (len(codes) > 1) == bool(limit)
        results.append(json.loads((tmp_path / name / "table6.smoke.json").read_text()))
    assert results[0] == results[1] and len(results[0]) == 26
