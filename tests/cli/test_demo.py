"""The demo, on the identity flow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from glem_augment import GLEM, ImageData
from glem_augment.cli import main
from glem_augment.cli.demo import QUICK, DemoSize, epoch_batches, verdict


def test_the_demo_writes_its_report_and_pictures(
    bundled_train: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GLEM.create("identity", (1, 28, 28), bundled_train.classes, bundled_train.class_ids)
    model.fit_modes(bundled_train, rank=4)
    model.save(tmp_path / "model")
    out = tmp_path / "out"
    argv = ["demo", "--model", str(tmp_path / "model"), "--out", str(out), "--quick", "--quiet"]
    monkeypatch.setattr("glem_augment.cli.demo.QUICK", replace(QUICK, seeds=2, epochs=1))
    assert main(argv) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["flow"]["round_trip"]["within_half_step"] == 1.0 and report["quick"] is True
    arms = report["arms"]
    assert set(arms) == {"no augmentation", "GLEMAugment", "identity control"}
    for arm in arms.values():
        assert len(arm["accuracies"]) == 2 and arm["mean"] == pytest.approx(sum(arm["accuracies"]) / 2)
    printed, bars = capsys.readouterr()
    assert "|" not in bars
    for words in ("identity control", "Not like for like", verdict(arms)):
        assert words in printed
    assert len(list((out / "synthetic").rglob("*.png"))) == 20
    for name in ("preview.png", "synthetic.png"):
        assert Image.open(out / name).width > 300
    monkeypatch.setattr("glem_augment.cli.demo.QUICK", replace(QUICK, epochs=1))
    assert main(argv) == 0  # a second demo replaces the results of the first one
    assert len(json.loads((out / "report.json").read_text())["arms"]["GLEMAugment"]["accuracies"]) == 1


def test_all_arms_see_the_same_rows() -> None:
    size = DemoSize(epochs=2)
    plain, augmented = (list(epoch_batches(10, 3, 0, size, views)) for views in (1, 5))
    assert len(plain) == 2 * 3
    for (rows, original), (others, view) in zip(plain, augmented, strict=True):
        assert torch.equal(rows, others) and (original == 0).all() and view.max() < 5
    assert 0 < sum(int((view > 0).sum()) for _, view in augmented) < 2 * 9


def test_a_gain_counts_from_twice_its_standard_error() -> None:
    def arms(gain: float) -> dict:
        plain = {"mean": 0.8, "std": 0.01, "accuracies": [0.0] * 8}
        return {"no augmentation": plain, "GLEMAugment": {**plain, "mean": 0.8 + gain}}

    assert "+0.90 points, not more" in verdict(arms(0.009)) and "(0.50)" in verdict(arms(0.009))
    assert "+1.10 points, more" in verdict(arms(0.011)) and "-1.10 points, more" in verdict(arms(-0.011))
