"""The comparison of stacks of augmentation: what it trains on, what it says, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import photos
from PIL import Image
from scipy import stats

from glem_augment import ImageData
from glem_augment.cli import main
from glem_augment.errors import DataError
from glem_augment.evaluation import compare as module
from glem_augment.evaluation import interval
from glem_augment.evaluation.compare import (
    ORDINARY,
    PLAIN,
    Comparison,
    Stack,
    advice,
    compare,
    models_for,
    moves,
    parted,
    report,
)


def images(count: int, seed: int = 0) -> ImageData:
    return ImageData.from_tensors(*photos(count, 32, seed), ["a", "b"])


def test_intervals_are_students() -> None:
    for n in range(2, 11):
        values = np.random.default_rng(n).normal(size=n).tolist()
        low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        assert interval(values) == pytest.approx((high - low) / 2, rel=1e-3)


def test_parts_are_disjoint_and_of_all_classes() -> None:
    data = images(40)
    fit, held = parted(data, 5)
    assert (len(fit), len(held)) == (32, 8) and np.bincount(held.targets).tolist() == [4, 4]
    pixels = {image.numpy().tobytes() for image in fit.tensor()}
    assert not any(image.numpy().tobytes() in pixels for image in held.tensor())


def test_half_of_the_images_are_moved_ones_of_the_same_class() -> None:
    data = images(32)
    comparison = Comparison(models_for(data, "taef2", None), steps=1, copies=1)
    for kind in ("pixels", "autoencoder"):
        stack = moves(kind, kind)[0]
        moved = comparison.moved(stack, data)
        assert moved.shape == (1, *data.tensor().shape)
        change = (moved[0].float() - data.tensor().float()).abs().mean((1, 2, 3))
        assert float(change.min()) > 0.3 and float(change.max()) < 80
        assert comparison.moved(stack, data) is moved  # made once
    plain, again = (next(comparison.batches(PLAIN, data, 3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))  # a function of the seed
    mixed = next(comparison.batches(ORDINARY[3], data, 3))
    assert mixed[1].shape == (32, 2) and torch.allclose(mixed[1].sum(1), torch.ones(32))


def row_values(*gains: float) -> dict[Stack, list[float]]:
    stacks = (PLAIN, Stack("other", "ordinary"), Stack("ours", "pixels"))
    return {s: [50 + g + d for d in (-0.2, 0.0, 0.2)] for s, g in zip(stacks, gains, strict=True)}


def test_advice_is_about_what_is_clear() -> None:
    assert advice(report(row_values(0, 2, 5))).startswith("Use ours: +3.0 ± 0.0 points over other")
    assert advice(report(row_values(0, 2, 1))).startswith("Use other: +2.0")
    assert "leave it out" in advice(report(row_values(0, -1, 0)))
    noisy = row_values(0, 0, 0) | {Stack("ours", "pixels"): [48.0, 52.0, 56.0]}
    assert "leave it out" in advice(report(noisy))


def test_classes_must_agree_and_be_large_enough() -> None:
    data = images(40)
    with pytest.raises(DataError, match="classes"):
        compare(data, data.with_targets(data.targets, ["a", "c"]), progress=False)
    with pytest.raises(DataError, match="5"):
        compare(images(8), images(8), progress=False)


def test_the_command_writes_a_report_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "FEWEST_STEPS", 2)
    monkeypatch.setattr(module, "MOST_STEPS", 2)
    data = images(48)
    for i, (x, y) in enumerate(zip(data.tensor(), data.targets, strict=True)):
        (tmp_path / "photos" / "ab"[y]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / "ab"[y] / f"{i}.png")
    options = ["--image-size", "16", "--minutes", "0.1", "--seeds", "2", "--threads", "1", "--quiet"]
    assert main(["compare", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (found["train"], found["test"], len(found["rows"])) == (36, 12, 4)
    assert found["advice"] in out and all(row["name"] in out for row in found["rows"])
    assert len(found["tuning"]) == 12 and Image.open(tmp_path / "out" / "moves.png").width > 200
