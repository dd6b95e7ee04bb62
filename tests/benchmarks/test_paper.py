"""The benchmark of the paper's tables: what is asked of whom, the verdicts, and tables out of the stored results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper import paper
from benchmarks.paper.claims import CLAIMS, FAILS, HOLDS, OPEN, verdicts
from benchmarks.paper.figures import SETTINGS, two_dimensional_fit
from benchmarks.paper.lab import FLOORS, Lab, Number, method_settings
from benchmarks.paper.paper import check_tables, main
from benchmarks.paper.research import ResearchTrainer, split_settings
from benchmarks.paper.scales import SCALES
from benchmarks.paper.tables import TITLES, cells_of
from glem_augment import ImageData
from glem_augment.cli.common import table as settings_of
from glem_augment.cli.train import checked
from glem_augment.training.config import METHODS, TrainConfig, method

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def number(metric: str, value: float, key: str = "key") -> Number:
    return Number(metric, value, "abc", key, "this processor")


# ---- what is asked of whom -------------------------------------------------------------------------------------------


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


def test_lambda_is_halved_and_the_means_stop_where_the_published_gaussians_freeze(
    bundled_train: ImageData, tmp_path: Path
) -> None:
    own, research = split_settings({**SCALES["paper"].flow, "preset": "identity"})
    data, config = bundled_train.subset(range(0, 1000, 20)), method("glem", **own)
    run = ResearchTrainer(data, config, tmp_path, progress=False, research=research)
    assert run.frozen_from == run.m_total == len(run.m_rates) == 100
    run.m_done = 99
    assert run.kld_weight() == 5.0


@pytest.mark.parametrize("m_rounds", [1, 2, 9])
def test_research_settings_do_what_they_say(bundled_train: ImageData, tmp_path: Path, m_rounds: int) -> None:
    """Also if rounds of M-steps outnumber the batches of an epoch (4)."""
    settings = dict(
        preset="identity", objective="hybrid", joint=False, beta=0.8, epochs=3, batch_size=20, val_fraction=0.0,
        modes_rank=0, refit_beta=0.0, sample_every=0, m_rounds=m_rounds, m_steps=1, freeze_gaussians_at=0.6,
        sigma_lr_scale=3.0, beta_anneal=(0.5, 0.05),
    )  # fmt: skip
    own, research = split_settings(settings)
    data = bundled_train.subset(range(0, 1000, 10))
    run = ResearchTrainer(data, TrainConfig(**own), tmp_path, progress=False, research=research)
    at, betas, step, gaussians = [], [], run.gaussian_step, run.model.gaussians
    moves = torch.zeros(2)

    def noting(rate: float) -> None:
        before = gaussians.mu.detach().clone(), gaussians.s.detach().clone()
        at.append(run.step)
        betas.append(run.config.beta)
        step(rate)
        for i, (new, old) in enumerate(zip((gaussians.mu, gaussians.s), before, strict=True)):
            moves[i] = (new.detach() - old).abs().max() / rate

    run.gaussian_step = noting
    run.fit()
    assert at == [4 * epoch + 4 * r // m_rounds for epoch in range(2) for r in range(m_rounds)]
    wanted = [0.8 * 0.05 ** max(0.0, (step / 12 - 0.5) / 0.5) for step in at]
    assert betas == pytest.approx(wanted) and run.config.beta == 0.8
    assert float(moves[1] / moves[0]) == pytest.approx(3.0, rel=0.3)


def test_recipes_are_settings_and_those_with_m_steps_say_so() -> None:
    for path in sorted((BENCHMARKS / "recipes").glob("*.yaml")):
        own, _ = split_settings(settings_of(str(path)))
        assert TrainConfig(**checked(own, str(path))).joint == ("m_steps" not in own), path.name


def test_the_control_has_the_floor_that_is_best_for_held_out_images(tmp_path: Path) -> None:
    lab = Lab(SCALES["smoke"], "smoke", tmp_path, "cpu")
    (cell,) = (cell for cell in cells_of(3, (1,)) if cell.method == "pixels")
    gaussians = lab.flow(cell, 0).model.gaussians
    assert gaussians.lowest_variance in FLOORS and gaussians.lowest_variance < 0.03
    assert float((gaussians.variance() < 0.03).float().mean()) > 0.2  # where a flow's Gaussians would be cut off


# ---- verdicts --------------------------------------------------------------------------------------------------------


def verdict(folder: Path, word: str, table: int, values: dict[tuple[str, str], list[float]], **flows: str) -> str:
    """The verdict on the claim that contains `word`.

    Args:
        values: (method, metric) -> one value per seed. Methods named "label/setting" have that setting.
        flows: setting -> one letter per seed, the hash of the flow's weights.
    """
    rows = []
    for (name, metric), per_seed in values.items():
        label, _, setting = name.partition("/")
        for seed, value in enumerate(per_seed):
            entry = dict(table=table, method=label, role="main", setting=setting or "default", metric=metric)
            hashes = flows.get(setting or "default")
            rows.append({**entry, "seed": seed, "value": value, "weights_hash": hashes and hashes[seed]})
    (folder / f"table{table}.cpu.json").write_text(json.dumps(rows))
    (found,) = (v["verdict"] for v in verdicts(folder, "cpu") if word in v["claim"])
    return found


def test_verdicts_need_more_than_the_noise(tmp_path: Path) -> None:
    def psi(value: list[float], other: list[float], spread: float | None = None) -> str:
        values = {}
        for metric in ("NF-A", "CNN-A", "L-R"):
            values["3: KLD 10 + psi", metric], values["2: KLD 10", metric] = value, other
            for k in range(0 if spread is None else 12):
                values[f"other {k}", metric] = [70.0 + k, 70.0 + k + spread, 70.0 + k - spread]
        return verdict(tmp_path, "psi helps", 6, values)

    assert psi([80.0], [70.0]) == HOLDS and psi([70.0], [80.0]) == FAILS
    assert psi([75.0], [74.5]) == OPEN  # within the error of 5,000 images
    assert psi([75.0, 75.1, 75.05], [74.5, 74.4, 74.55]) == HOLDS  # three seeds that agree
    assert psi([75.0, 85.0], [70.0, 79.0]) == OPEN
    assert psi([70.0, 70.5], [75.0, 75.3]) == OPEN  # apart by 95 %, but not by what three comparisons ask for
    # The spread of three seeds is moderated by that of all methods.
    seeds = [80.0, 80.1, 80.2], [78.0, 79.0, 77.0]
    assert psi(*seeds, spread=0.2) == HOLDS and psi(*seeds, spread=4.0) == OPEN
    assert [v["verdict"] for v in verdicts(tmp_path / "nowhere", "cpu")] == [OPEN] * len(CLAIMS) == [OPEN] * 10


def test_rfcm_is_judged_in_pairs_of_the_same_flows_and_by_a_lower_fid(tmp_path: Path) -> None:
    def rfcm(fid: list[float], plain_fid: list[float], more: list[float], plain: list[float], flows: str = "") -> str:
        values = {("RFCM/rfcm", "FID"): fid, ("tau = 0.9", "FID"): plain_fid}
        for metric in ("CNN-A", "Cov"):
            values["RFCM/rfcm", metric], values["tau = 0.9", metric] = more, plain
        return verdict(tmp_path, "RFCM helps", 5, values, **({"default": "abc", "rfcm": flows} if flows else {}))

    plain = [40.0, 50.0, 60.0]
    fewer, more = [38.0, 47.9, 57.8], [42.0, 52.1, 62.2]  # differences that agree, of numbers that don't
    assert rfcm(fewer, plain, more, plain, "abc") == HOLDS and rfcm(fewer, plain, more, plain, "xyz") == OPEN
    shares = [50.0, 50.2], [45.0, 45.1]
    assert rfcm([22.0, 22.1], [26.0, 26.1], *shares) == HOLDS and rfcm([30.0, 30.1], [26.0, 26.1], *shares) == FAILS
    # Of one seed, only what is far apart.
    assert rfcm([22.0], [26.0, 26.1], *shares) == OPEN and rfcm([15.0], [26.0, 26.1], *shares) == HOLDS


def test_rise_and_fall_with_lambda(tmp_path: Path) -> None:
    def lambdas(nf: list[float], fid: list[float]) -> str:
        values = {}
        for w, a, f in zip((1, 3, 5, 10, 15, 20), nf, fid, strict=True):
            for metric, value in (("NF-A", a), ("CNN-A", a - 20), ("FID", f)):
                values[f"lambda_0 = {w}", metric] = [value]
        return verdict(tmp_path, "rises, then falls", 3, values)

    peak, worse = [50, 70, 75, 80, 70, 60], [20, 21, 24, 26, 31, 36]
    assert lambdas(peak, worse) == HOLDS and lambdas(peak, worse[::-1]) == FAILS
    assert lambdas([50, 60, 65, 70, 75, 80], worse) == OPEN  # no fall in sight
    assert lambdas([90, 80, 70, 60, 50, 40], worse) == FAILS
    assert lambdas(peak, [20, 20.3, 20.1, 19.8, 19.7, 19.6]) == OPEN  # FID of one run within its error


def test_continuum_needs_a_sure_sign(tmp_path: Path) -> None:
    def continuum(p: float, *rho: float) -> str:
        values = {"rho-distance": list(rho), "rho-distance p": [p] * len(rho), "rho-confusion": [-r for r in rho]}
        named = {("lambda_0 = 10", metric): numbers for metric, numbers in values.items()}
        return verdict(tmp_path, "similar classes", 3, named)

    assert (continuum(0.001, 0.6), continuum(0.3, 0.1), continuum(0.001, -0.6)) == (HOLDS, OPEN, FAILS)
    assert continuum(0.04, 0.4) == OPEN  # to one side, so twice as likely to either
    assert continuum(0.01, 0.5, -0.4) == OPEN


# ---- tables and results ----------------------------------------------------------------------------------------------


def test_the_two_dimensional_illustration_learns_what_its_panels_say() -> None:
    y = torch.arange(300) % 3
    z = torch.randn(300, 2) * 0.6 + torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5]])[y]
    start, spread = (torch.stack([f(z[y == c]) for c in range(3)]) for f in (lambda v: v.mean(0), lambda v: v.var(0)))
    found = {name: two_dimensional_fit(settings, z, y, steps=60) for name, settings in SETTINGS.items()}
    kld = {name: float(gaussians.kld_matrix().detach().sum()) for name, gaussians in found.items()}
    assert torch.allclose(found["likelihood only"].mu, start, atol=0.05)  # already at its maximum
    assert torch.equal(found["KLD, only variances"].mu, start)
    assert torch.allclose(found["KLD, only means"].variance(), spread, atol=1e-4)
    assert min(kld["KLD, only means"], kld["KLD, only variances"]) > 1.05 * kld["likelihood only"]


def test_a_check_measures_anew_and_says_what_the_results_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = SCALES["smoke"]
    cells = [cell for cell in cells_of(3, scale.sizes) if cell.label.startswith("identity")]
    results, lab = (Lab(scale, "smoke", tmp_path / name, "cpu") for name in ("none", "work"))
    cell = replace(cells[0], metrics=("NF-A",))
    key = results.key(cell, 0, results._about("NF-A", cell))
    results.learn([number(metric, 12.5, key) for metric in ("NF-A", "BPD", "ECE")])
    measured = lab.measure(cell, 0)
    assert measured[0].value != 12.5 and measured[0].processor == lab.processor
    # What was measured on another processor stays so, whoever reads it.
    later = Lab(scale, "smoke", tmp_path / "work", "cpu")
    later.processor = "another one"
    assert later.measure(cell, 0) == measured
    with pytest.raises(SystemExit, match="there is no row 'lambda_0 = 2' .* 'lambda_0 = 10'"):
        check_tables([3], scale, lab, results, 1, ["lambda_0 = 2"])
    monkeypatch.setattr(paper, "cells_of", lambda table, sizes: [cell])
    check_tables([3], scale, lab, results, 1, [])
    assert "  results: NF-A 12.5\n  now:     NF-A" in capsys.readouterr().out


def test_every_table_comes_out_of_the_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data, flows or measuring, and as it is stored, but for the versions that wrote it."""
    stored = BENCHMARKS / "results" / "paper"
    for path in stored.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options = ["all", "claims", "trust", "pareto", "--scale", "cpu", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["paper.py", *options, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert main() == 0 and not (tmp_path / "work").exists()
    for path in stored.glob("*.json"):
        assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text()), path.name
    for path in stored.glob("*.md"):
        texts = [p.read_text().splitlines() for p in (path, tmp_path / path.name)]
        found = [[line for line in lines if "written with" not in line] for lines in texts]
        assert found[0] == found[1], path.name


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
