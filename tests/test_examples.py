"""The examples: their settings, and (slow) that each runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from glem_augment import GLEM, GLEMAugment

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_for_eva02(monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = load("finetune_timm", monkeypatch)
    recipe: dict[str, Any] = yaml.safe_load((EXAMPLES / "eva02_imagenet.yaml").read_text())
    assert set(recipe) <= set(finetune.DEFAULTS)
    published = {
        "model": "eva02_base_patch14_448.mim_in22k_ft_in22k",
        "opt": "adamw",
        "lr": 5e-5,
        "layer_decay": 0.8,
        "weight_decay": 0.05,
        "epochs": 15,
        "warmup_epochs": 2,
        "drop_path": 0.15,
        "smoothing": 0.2,
        "aa": "rand-m9-mstd0.5-inc1",
        "ema_decay": 0.9999,
        "img_size": 448,
        "crop_mode": "squash",
    }
    assert {name: recipe[name] for name in published} == published
    assert recipe["batch_size"] * recipe["accumulate"] * 8 == 512
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert tuple(recipe["mean"]) == OPENAI_CLIP_MEAN and tuple(recipe["std"]) == OPENAI_CLIP_STD
    GLEMAugment.from_config(recipe["augment"], GLEM.from_pretrained("bundled:fashion-mnist"))


def test_options_come_from_the_command_line_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finetune = load("finetune_timm", monkeypatch)
    file = tmp_path / "a.yaml"
    file.write_text("lr: 0.5\nepochs: 3\naugment: {policy: mixup}\n")
    argv = ["finetune_timm.py", "--config", str(file), "--data", "x", "--lr", "0.25", "--mean", "[0.1, 0.2, 0.3]"]
    monkeypatch.setattr(sys, "argv", argv)
    args = finetune.options()
    assert (args.lr, args.epochs, args.mean, args.smoothing) == (0.25, 3, [0.1, 0.2, 0.3], 0.1)
    assert args.augment == {"policy": "mixup"}
    # YAML reads 5e-4, without a point, as text.
    file.write_text("lr: 5e-5\nout: runs/a\n")
    monkeypatch.setattr(sys, "argv", [*argv[:5], "--min-lr", "1e-6", "--aa", "rand-m9", "--amp", "null"])
    args = finetune.options()
    assert (args.lr, args.min_lr, args.aa, args.amp) == (5e-5, 1e-6, "rand-m9", None)
    assert args.out == Path("runs/a") and args.flow == finetune.BUNDLED
    file.write_text("# nothing\n")
    assert finetune.options().lr == finetune.DEFAULTS["lr"]
    file.write_text("learning_rate: 0.5\n")
    with pytest.raises(SystemExit):
        finetune.options()


def test_posterize_at_the_highest_level(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform

    before = NAME_TO_OP["PosterizeIncreasing"]
    try:
        load("finetune_timm", monkeypatch)
        image = Image.new("RGB", (8, 8), (200, 100, 50))
        assert NAME_TO_OP["PosterizeIncreasing"](image, 0).getpixel((0, 0)) == (128, 0, 0)
        transform = rand_augment_transform("rand-m10-inc1", {})
        for _ in range(100):
            transform(image)
    finally:
        NAME_TO_OP["PosterizeIncreasing"] = before


def smoke(name: str, *options: str) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--smoke", *options],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_finetune_timm_and_its_resumption(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in smoke("finetune_timm", "--out", str(tmp_path)).splitlines() if line[0] == "{"]
    assert [row["epoch"] for row in rows] == [0, 1] and all(0 <= row["top1"] <= row["top5"] <= 100 for row in rows)
    rest = [
        json.loads(line)
        for line in smoke("finetune_timm", "--out", str(tmp_path), "--epochs", "3").splitlines()
        if line[0] == "{"
    ]
    assert [row["epoch"] for row in rest] == [2]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["chain", "wrap", "collate"])
def test_torchvision_loop(where: str) -> None:
    lines = smoke("torchvision_loop", "--where", where).splitlines()
    assert "accuracy" in lines[1] and float(lines[1].split()[-2]) > 25
    # What is done in workers is counted there (with --smoke there are none).
    assert "'selected': 0" not in lines[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_long_tail() -> None:
    out = smoke("long_tail")
    assert "341 real images, [100, 72, 51, 37, 26, 19, 14, 10, 7, 5] per class; 659 synthetic ones" in out
    accuracy = [float(line.split("accuracy ")[1].split(" ")[0]) for line in out.splitlines() if "accuracy" in line]
    assert len(accuracy) == 2 and accuracy[1] > 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_synthetic_only(tmp_path: Path) -> None:
    out = smoke("synthetic_only", "--export", str(tmp_path / "images"))
    accuracy = float(out.strip().splitlines()[-1].split(": ")[1].split(" ")[0])
    assert accuracy > 50 and len(list((tmp_path / "images").rglob("*.png"))) == 600
