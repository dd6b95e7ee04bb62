"""The benchmark of the paper's tables: what is asked of whom, the verdicts, and a whole run at the smallest scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper.claims import CLAIMS, FAILS, HOLDS, OPEN, Measured, verdicts
from benchmarks.paper.figures import SETTINGS, two_dimensional_fit
from benchmarks.paper.lab import Lab, Number, _method
from benchmarks.paper.paper import check_tables, main
from benchmarks.paper.report import markdown, numbers_of, oracle_row, row, values_of, write_table
from benchmarks.paper.scales import SCALES
from benchmarks.paper.tables import TITLES, Cell, cells_of
from glem_augment.training.methods import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TITLES)
def test_every_cell_is_a_method_with_settings_that_exist(table: int, scale: str) -> None:
    cells = cells_of(table, SCALES[scale].sizes)
    assert cells
    keys = set()
    for cell in cells:
        _method(cell.method).config(**{**SCALES[scale].flow, **cell.changes})
        assert cell.data in ("main", "second") and set(cell.paper) <= set(cell.metrics)
        assert cell.method != "ce" or "NF-A" not in cell.metrics  # one Gaussian can't classify
        keys.add((cell.label, cell.data, cell.setting))
    assert len(keys) == len(cells)  # rows can be told apart


def test_tables_and_methods_cover_each_other() -> None:
    used = {cell.method for table in TITLES for cell in cells_of(table, (1,))}
    assert set(METHODS) - used == {"lambda0-psi", "saturating"}  # offered, in no table of the paper


def test_printed_numbers_are_the_papers() -> None:
    table3 = {cell.label: cell.paper for cell in cells_of(3, (1,))}
    assert table3["lambda_0 = 15"]["NF-A"] == 68.23 and table3["lambda_0 = 1"]["BPD"] == 1.64
    table5 = {cell.label: cell.paper for cell in cells_of(5, (1,))}
    assert table5["RFCM"] == {"CNN-A": 49.74, "FID": 25.55, "Cov": 22.47, "L-R": 33.56}


def write(folder: Path, table: int, entries: list[tuple[str, str, str, list[float]]]) -> None:
    rows = []
    for label, setting, metric, values in entries:
        for seed, value in enumerate(values):
            rows.append(
                dict(table=table, method=label, role="main", setting=setting, metric=metric, seed=seed, value=value)
            )
    (folder / f"table{table}.cpu.json").write_text(json.dumps(rows))


def verdict(folder: Path, word: str) -> dict[str, str]:
    found = [v for v in verdicts(folder, "cpu") if word in v["claim"]]
    assert len(found) == 1
    return found[0]


def test_verdicts_need_more_than_the_noise(tmp_path: Path) -> None:
    def both(value: list[float], other: list[float]) -> str:
        entries = []
        for metric in ("NF-A", "CNN-A", "L-R"):
            entries += [("3: KLD 10 + psi", "default", metric, value), ("2: KLD 10", "default", metric, other)]
        write(tmp_path, 6, entries)
        return verdict(tmp_path, "psi helps")["verdict"]

    assert both([80.0], [70.0]) == HOLDS and both([70.0], [80.0]) == FAILS
    assert both([75.0], [74.5]) == OPEN  # within the error of 5,000 images
    assert both([75.0, 75.1, 75.05], [74.5, 74.4, 74.55]) == HOLDS  # three seeds that agree
    assert both([75.0, 85.0], [70.0, 79.0]) == OPEN
    assert both([70.0, 70.5], [75.0, 75.3]) == OPEN  # apart by 95 %, but not by what three comparisons ask for
    assert all(v["verdict"] == OPEN for v in verdicts(tmp_path / "nowhere", "cpu"))
    assert len(CLAIMS) == 9


def test_runs_of_the_same_flows_are_compared_in_pairs(tmp_path: Path) -> None:
    """Differences that agree, of flows that don't."""

    def rfcm(flows: str) -> str:
        entries = []
        for metric, more in (("CNN-A", 1.0), ("Cov", 1.0), ("FID", -1.0)):
            plain = [40.0, 50.0, 60.0]
            entries += [("tau = 0.9", "default", metric, plain)]
            entries += [("RFCM", "rfcm", metric, [v + more * (2 + 0.1 * i) for i, v in enumerate(plain)])]
        write(tmp_path, 5, entries)
        path = tmp_path / "table5.cpu.json"
        rows = json.loads(path.read_text())
        hashes = {"rfcm": flows, "default": "abc"}
        for entry in rows:
            entry["weights_hash"] = hashes[entry["setting"]][entry["seed"]]
        path.write_text(json.dumps(rows))
        return verdict(tmp_path, "RFCM helps")["verdict"]

    assert rfcm("abc") == HOLDS and rfcm("xyz") == OPEN


def test_the_spread_of_three_seeds_is_moderated_by_that_of_all(tmp_path: Path) -> None:
    def psi(others: float) -> str:
        entries = []
        for metric in ("NF-A", "CNN-A", "L-R"):
            entries += [("3: KLD 10 + psi", "default", metric, [80.0, 80.1, 80.2])]
            entries += [("2: KLD 10", "default", metric, [78.0, 79.0, 77.0])]
            for k in range(12):
                entries += [(f"other {k}", "default", metric, [70.0 + k, 70.0 + k + others, 70.0 + k - others])]
        write(tmp_path, 6, entries)
        return verdict(tmp_path, "psi helps")["verdict"]

    assert psi(0.2) == HOLDS and psi(4.0) == OPEN


def lambda_table(folder: Path, nf: list[float], fid: list[float]) -> str:
    entries = []
    for w, a, f in zip((1, 3, 5, 10, 15, 20), nf, fid, strict=True):
        for metric, value in (("NF-A", a), ("CNN-A", a - 20), ("FID", f)):
            entries.append((f"lambda_0 = {w}", "default", metric, [value]))
    write(folder, 3, entries)
    return verdict(folder, "rises, then falls")["verdict"]


def test_rise_and_fall_with_lambda(tmp_path: Path) -> None:
    assert lambda_table(tmp_path, [50, 70, 75, 80, 70, 60], [20, 21, 24, 26, 31, 36]) == HOLDS
    assert lambda_table(tmp_path, [50, 60, 65, 70, 75, 80], [20, 21, 24, 26, 31, 36]) == OPEN  # no fall in sight
    assert lambda_table(tmp_path, [50, 70, 75, 80, 70, 60], [36, 31, 26, 24, 21, 20]) == FAILS
    assert lambda_table(tmp_path, [90, 80, 70, 60, 50, 40], [20, 21, 24, 26, 31, 36]) == FAILS
    # FID of one run within its error, whatever its order
    assert lambda_table(tmp_path, [50, 70, 75, 80, 70, 60], [20, 20.3, 20.1, 19.8, 19.7, 19.6]) == OPEN


def test_lower_fid_counts_for_rfcm(tmp_path: Path) -> None:
    def rfcm(fid: list[float]) -> str:
        entries: list[Any] = []
        for metric, good, plain in (("CNN-A", [50.0, 50.2], [45.0, 45.1]), ("Cov", [30.0, 30.1], [20.0, 20.3])):
            entries += [("RFCM", "rfcm", metric, good), ("tau = 0.9", "default", metric, plain)]
        entries += [("RFCM", "rfcm", "FID", fid), ("tau = 0.9", "default", "FID", [26.0, 26.1])]
        write(tmp_path, 5, entries)
        return verdict(tmp_path, "RFCM helps")["verdict"]

    assert rfcm([22.0, 22.1]) == HOLDS and rfcm([30.0, 30.1]) == FAILS
    assert rfcm([22.0]) == OPEN and rfcm([15.0]) == HOLDS  # of one seed, only what is far apart


def test_no_verdict_from_the_best_of_several_temperatures_alone(tmp_path: Path) -> None:
    def temperatures(cnn: list[float]) -> str:
        entries: list[Any] = []
        for t, a, label in zip((0.7, 0.8, 0.9, 1.0, 1.1, 1.2), cnn, (96, 94, 92, 90, 87, 84), strict=True):
            setting = "default" if t == 0.9 else f"tau={t:g}"
            entries += [(f"tau = {t}", setting, "CNN-A", [a]), (f"tau = {t}", setting, "L-R", [label])]
        write(tmp_path, 5, entries)
        return verdict(tmp_path, "tau below 1")["verdict"]

    assert temperatures([70, 76, 80, 75, 70, 60]) == HOLDS and temperatures([60, 65, 70, 75, 80, 76]) == FAILS
    assert temperatures([76.1, 76.2, 76.2, 76.28, 76.3, 76.2]) == OPEN


def test_continuum_needs_a_sure_sign(tmp_path: Path) -> None:
    def continuum(rho: float, p: float) -> str:
        entries = [
            ("lambda_0 = 10", "default", name, [v])
            for name, v in (("rho-distance", rho), ("rho-distance p", p), ("rho-confusion", -rho))
        ]
        write(tmp_path, 3, entries)
        return verdict(tmp_path, "similar classes")["verdict"]

    assert (continuum(0.6, 0.001), continuum(0.1, 0.3), continuum(-0.6, 0.001)) == (HOLDS, OPEN, FAILS)
    assert continuum(0.4, 0.04) == OPEN  # to one side, so twice as likely to either
    entries = [("lambda_0 = 10", "default", "rho-distance", [0.5, -0.4])]
    write(tmp_path, 3, [*entries, ("lambda_0 = 10", "default", "rho-distance p", [0.01, 0.01])])
    assert verdict(tmp_path, "similar classes")["verdict"] == OPEN


def number(metric: str, value: float, key: str = "key") -> Number:
    return Number(metric, value, "abc", key, "this processor")


def test_markdown_has_the_papers_number_beside_the_measured_one() -> None:
    cells = [
        Cell("GLEM", "main", "glem", ("NF-A", "FID"), paper={"NF-A": 67.67}),
        Cell("CE", "main", "ce", ("FID",)),
    ]
    name = SCALES["cpu"].main.name
    rows = [row(2, cells[0], name, seed, number("NF-A", value)) for seed, value in enumerate((50.0, 52.0))]
    rows.append(oracle_row(2, "main", name, number("accuracy", 90.0)))
    text = markdown(2, "cpu", SCALES["cpu"], cells, rows, "command")
    assert "| method | setting | NF-A | paper | FID |" in text
    assert "| GLEM | default | 51 ± 1.4 | 67.67 |  |" in text and "| CE | default | x |  |  |" in text
    assert "Oracle: 90.00 %" in text and "Measured on this processor;" in text
    assert values_of(rows, "GLEM", name, "default", "NF-A") == [50.0, 52.0]


def test_the_two_dimensional_illustration_learns_what_its_panels_say() -> None:
    y = torch.arange(300) % 3
    z = torch.randn(300, 2) * 0.6 + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5]])[y]
    start = torch.stack([z[y == c].mean(0) for c in range(3)])
    found = {name: two_dimensional_fit(settings, z, y, steps=60) for name, settings in SETTINGS.items()}
    kld = {name: float(gaussians.kld_matrix().detach().sum()) for name, gaussians in found.items()}
    assert torch.allclose(found["likelihood only"].mu, start, atol=0.05)  # already at its maximum
    assert torch.equal(found["KLD, only variances"].mu, start)
    spread = torch.stack([z[y == c].var(0) for c in range(3)])
    assert torch.allclose(found["KLD, only means"].variance(), spread, atol=1e-4)
    assert min(kld["KLD, only means"], kld["KLD, only variances"]) > 1.05 * kld["likelihood only"]


def test_measured_reads_every_table_of_its_scale(tmp_path: Path) -> None:
    write(tmp_path, 1, [("GLEM", "default", "NF-A", [1.0, 2.0])])
    (tmp_path / "table2.gpu.json").write_text("[]")
    assert Measured(tmp_path, "cpu").values(1, "main", "GLEM", "NF-A") == [1.0, 2.0]
    assert Measured(tmp_path, "gpu").rows == []


def test_what_the_results_have_is_not_measured_again(tmp_path: Path) -> None:
    """Two cells of Table 2 in a file of results, which a laboratory without data and flows takes them from."""
    scale, cells = SCALES["cpu"], [cell for cell in cells_of(2, (1,)) if cell.method == "glem"]
    empty = Lab(scale, "cpu", tmp_path / "work", "cpu")
    rows = []
    for cell in cells:
        for group in (("NF-A", "BPD", "ECE"), ("FID", "Cov", "L-R"), ("CNN-A",)):
            key = empty.key(cell, 0, empty._about(group[0], cell))
            metrics = [metric for metric in group if metric in cell.metrics]
            rows += [row(2, cell, scale.main.name, 0, number(m, float(len(m)), key)) for m in metrics]
    write_table(tmp_path, 2, "cpu", scale, cells, rows, "command")
    lab = Lab(scale, "cpu", tmp_path / "work", "cpu", known=numbers_of(tmp_path, "cpu"))
    for cell in cells:
        assert lab.knows(cell, 0) and not lab.knows(cell, 1) and not empty.knows(cell, 0)
        assert [(n.metric, n.value) for n in lab.measure(cell, 0)] == [
            (m, float(len(m))) for m in ("NF-A", "FID", "Cov", "L-R", "CNN-A")
        ]
    changed = Cell("GLEM 10", "main", "glem", ("NF-A",), {"kld_weight": 10.5})
    cooler = Cell("GLEM 10", "main", "glem", ("CNN-A",), tau=0.8)
    assert not lab.knows(changed, 0) and not lab.knows(cooler, 0)
    second = Cell("GLEM 10", "second", "glem", ("NF-A",))
    assert not lab.knows(second, 0)
    elsewhere = replace(scale, main=replace(scale.main, spec="/other/images"), second=scale.main)
    others = Lab(elsewhere, "cpu", tmp_path / "work", "cpu", known=numbers_of(tmp_path, "cpu"))
    assert not any(others.knows(replace(cells[0], data=role), 0) for role in ("main", "second"))
    assert not (tmp_path / "work").exists()


def test_a_check_measures_anew_and_says_what_the_results_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = SCALES["smoke"]
    cell = next(cell for cell in cells_of(3, scale.sizes) if cell.label.startswith("identity"))
    results = Lab(scale, "smoke", tmp_path / "none", "cpu")
    key = results.key(cell, 0, results._about("NF-A", cell))
    results.known[key] = {"NF-A": number("NF-A", 12.5, key)}
    lab = Lab(scale, "smoke", tmp_path / "work", "cpu")
    cell = replace(cell, metrics=("NF-A",))
    measured = lab.measure(cell, 0)
    assert measured[0].value != 12.5 and measured[0].processor == lab.processor
    # What was measured on another processor stays so, whoever reads it.
    later = Lab(scale, "smoke", tmp_path / "work", "cpu")
    later.processor = "another one"
    assert later.measure(cell, 0) == measured
    with pytest.raises(SystemExit, match="there is no row 'lambda_0 = 2' .* 'lambda_0 = 10'"):
        check_tables([3], scale, lab, results, 1, ["lambda_0 = 2"])
    check_tables([6], scale, Known(results, 50.0), Known(results, 40.0), 1, ["3: KLD 10 + psi"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["  results: NF-A 40", "  now:     NF-A 50"]


class Known:
    """A laboratory with one answer."""

    def __init__(self, lab: Lab, value: float) -> None:
        self.spec, self.value = lab.spec, value

    def knows(self, cell: Cell, seed: int) -> bool:
        return True

    def measure(self, cell: Cell, seed: int) -> list[Number]:
        return [number("NF-A", self.value)]


def test_every_table_comes_out_of_the_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data, flows or measuring, and as it is stored, but for the versions that wrote it."""
    stored = BENCHMARKS / "results" / "paper"
    for path in stored.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options = ["all", "claims", "trust", "pareto", "--scale", "cpu", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["paper.py", *options, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert main() == 0 and not (tmp_path / "work").exists()
    for path in stored.glob("*.*"):
        if path.suffix == ".json":
            assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text()), path.name
        elif path.suffix == ".md":
            lines = [
                [line for line in p.read_text().splitlines() if "written with" not in line]
                for p in (path, tmp_path / path.name)
            ]
            assert lines[0] == lines[1], path.name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_table_stops_resumes_and_comes_out_the_same(tmp_path: Path) -> None:
    """Table 6 at the smallest scale: whole, and in pieces of two seconds."""
    results = []
    for name, limit in (("whole", []), ("pieces", ["--max-minutes", "0.03"])):
        command = [
            sys.executable,
            str(BENCHMARKS / "paper" / "paper.py"),
            "6",
            "--scale",
            "smoke",
            "--threads",
            "1",
            *limit,
        ]
        command += ["--out", str(tmp_path / name), "--work", str(tmp_path / name / "work"), "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
        codes = []
        while not codes or codes[-1] == 75:
            codes.append(subprocess.run(command, env=environment, capture_output=True).returncode)
        assert codes[-1] == 0 and (len(codes) > 1) == bool(limit)
        results.append(json.loads((tmp_path / name / "table6.smoke.json").read_text()))
    assert results[0] == results[1] and len(results[0]) == 26
