"""The examples: their settings, and (slow) that each runs."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from model_cases import photos
from PIL import Image
from test_cli import write_images

from glem_augment import GLEM, GLEMAugment, open_data

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_recipe_for_eva02(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    finetune = load("finetune_timm", monkeypatch)
    recipe: dict[str, Any] = yaml.safe_load((EXAMPLES / "eva02_imagenet.yaml").read_text())
    assert set(recipe) <= set(finetune.DEFAULTS)
    assert recipe["batch_size"] * recipe["accumulate"] * 8 == 512
    assert tuple(recipe["mean"]) == OPENAI_CLIP_MEAN and tuple(recipe["std"]) == OPENAI_CLIP_STD
    GLEMAugment(GLEM.from_pretrained("bundled:fashion-mnist"), **recipe["augment"])


@pytest.mark.slow
def test_the_recipe_runs_with_a_small_eva02_and_taef2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    finetune = load("finetune_timm", monkeypatch)
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split, tuple("abcdefghij"), (7, 7), 2)
    model = GLEM.create("identity", (3, 56, 56), ["image"], autoencoder="taef2")
    model.adapt(str(tmp_path / "data"), rank=8).save(tmp_path / "modes")
    small = ["--model", "eva02_tiny_patch14_224", "--num-classes", "null", "--img-size", "56", "--epochs", "1"]
    small = ["--device", "cpu", "--pretrained", "false", "--batch-size", "5", "--amp", "null", "--workers", "0", *small]
    fixed = ["finetune_timm.py", "--config", str(EXAMPLES / "eva02_imagenet.yaml"), "--data", str(tmp_path / "data")]
    for arm in ([], ["--augment", "{p: 0}"]):
        monkeypatch.setattr(sys, "argv", [*fixed, *small, "--flow", str(tmp_path / "modes"), *arm])
        finetune.main()
        out = capsys.readouterr().out
        assert '"top1_ema": ' in out and "nan" not in out.lower()
        assert ("'rejected': 0" in out) and ("'selected': 0" in out) == bool(arm)


def test_options_come_from_the_command_line_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finetune, file = load("finetune_timm", monkeypatch), tmp_path / "a.yaml"

    def options(text: str, *more: str) -> Any:
        file.write_text(text)
        monkeypatch.setattr(sys, "argv", ["finetune_timm.py", "--config", str(file), "--data", "x", *more])
        return finetune.options()

    # YAML reads 5e-5, without a point, as text.
    args = options("lr: 0.5\nmin_lr: 5e-5\nepochs: 3\n", "--lr", "0.25", "--amp", "null", "--betas", "[0.9, 1e-1]")
    assert (args.lr, args.min_lr, args.epochs, args.amp, args.betas) == (0.25, 5e-5, 3, None, [0.9, 0.1])
    for text, given in (("learning_rate: 0.5\n", ()), ("", ("--epochs", "0"))):
        with pytest.raises(SystemExit):
            options(text, *given)


def test_validation_folders_are_labelled_as_the_training_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finetune, loop = load("finetune_timm", monkeypatch), load("torchvision_loop", monkeypatch)
    write_images(tmp_path / "train", ("bag", "train", "val"), (28, 28), 2, "L")  # names of classes like others
    write_images(tmp_path / "val", ("train", "val"), (28, 28), 2, "L")
    for train, val in (finetune.datasets(tmp_path), loop.datasets(tmp_path, 8)):
        assert [train[i][1] for i in range(len(train))] == [0, 0, 1, 1, 2, 2]
        assert [val[i][1] for i in range(len(val))] == [1, 1, 2, 2]
    write_images(tmp_path / "val", ("coat",), (28, 28), 2, "L")
    for load_data in (lambda: finetune.datasets(tmp_path), lambda: loop.datasets(tmp_path, 8)):
        with pytest.raises(SystemExit, match="coat"):
            load_data()


def test_a_part_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("demo", monkeypatch)
    assert demo.small_network(demo.QUICK).count("% interval") == 1
    assert "+3.0 ± 0.0 points." in demo.difference({"a": [5.0, 6.0], "b": [2.0, 3.0]})
    assert "no clear difference" in demo.difference({"a": [5.0, 9.0], "b": [4.0, 3.0]})


@pytest.mark.slow
def test_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One page without outside files, all of whose lines of Python run."""
    monkeypatch.setattr(sys, "argv", ["demo.py", "--quick", "--out", str(tmp_path)])
    load("demo", monkeypatch).main()
    page = html.unescape((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "<script" not in page and "<link" not in page and "http" not in page
    assert len(re.findall('src="data:image/png;base64', page)) == 40 + 100 + 40 + 20
    assert page.count(" points") == 2 and "weak as a worst case" in page
    blocks = re.findall("<pre>(.*?)</pre>", page, re.DOTALL)
    assert len(blocks) == 4 and all(len(line) < 80 for text in blocks for line in text.splitlines())
    data = open_data("bundled:fashion-mnist").subset(range(0, 920, 7))
    names: dict[str, Any] = {"few": data, "x": data.tensor(), "y": torch.from_numpy(data.targets)}
    monkeypatch.setattr("glem_augment.open_data", lambda *_: data)
    for text in blocks:
        exec(text.replace('GLEM.fit("bundled:fashion-mnist"', "GLEM.fit(few"), names)


def test_the_answers_of_explore(monkeypatch: pytest.MonkeyPatch) -> None:
    explore = load("explore", monkeypatch)
    x = torch.randint(60, 190, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 3
    model = GLEM.fit((x, y), rank=4, classes=["red", "green", "blue"])
    page = explore.Explorer(model, x, y, [f"{i}.png" for i in range(24)])
    assert page.samples(1, 0.7, "rfcm", 5) == page.samples(1, 0.7, "rfcm", 5) != page.samples(1, 0.7, "rfcm", 6)
    original, moved, _, text, before, after = page.move(4, None, -1, "sliders", 0.5, 0, 2.0, 0.0, 0.0, 0.0)
    assert original != moved and "modes of green, **used**" in text and before != after
    assert page.move(4, None, -1, "sliders", 0.5, 0, 0.0, 0.0)[1] == original
    line, names = page.between(0, 1)
    assert line.width == 9 * line.height and names.startswith("red (") and names.count("→") == 8
    text, unlikely, odd = page.measure()
    assert ", accuracy " in text and len(unlikely) == len(odd) == 12 and all(".png" in words for _, words in odd)


@pytest.mark.slow
def test_explore_in_a_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every tab, a slider by the keyboard, a sign of work, an upload; nothing is asked of any other machine."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed (extra explore)")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(photo)
    asked: list[str] = []

    def visit(url: str) -> None:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.on("request", lambda request: asked.append(request.url))
            page.set_default_timeout(60_000)
            page.goto(url)
            page.locator(".progress-text:visible, .eta-bar, .loader:visible").first.wait_for(state="attached")
            page.get_by_role("tab", name="Move").click()
            page.get_by_text("A move along the modes of").wait_for()
            page.get_by_role("slider", name="Mode 1").focus()
            for _ in range(30):
                page.keyboard.press("ArrowLeft")
            page.get_by_text("The largest change of a pixel is 0.").wait_for()
            page.locator("input[type=file]").first.set_input_files(photo)
            page.get_by_role("button", name="Clear").or_(page.get_by_label("Remove Image")).first.wait_for()
            page.get_by_role("tab", name="Between").click()
            page.get_by_text("→").wait_for()
            page.get_by_role("tab", name="Data").click()
            page.get_by_role("button", name="Measure the model").click()
            page.get_by_text(", accuracy").wait_for()
            browser.close()
        assert all(address.startswith((url, "data:", "blob:")) for address in asked), asked

    def wait(page: Any) -> None:
        assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
        visit(page.local_url)
        page.close(verbose=False)

    for name in ("GRADIO_RUN_HISTORY", "GRADIO_TEMP_DIR", "MPLCONFIGDIR"):  # what the example sets is undone
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setattr(gradio.Blocks, "block_thread", wait)
    monkeypatch.setattr(sys, "argv", ["explore.py", "--limit", "100"])
    load("explore", monkeypatch).main()
    assert asked and not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


def test_the_quality_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It tells copies and wrong labels from new images."""
    report = load("quality_report", monkeypatch)
    x, y = (torch.from_numpy(np.asarray(part)) for part in (photos(60, 8)[0], photos(60, 8)[1]))
    for split, rows in (("copies", range(20)), ("train", range(40)), ("test", range(40, 60))):
        for i in rows:
            (tmp_path / split / "ab"[y[i]]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path / split / "ab"[y[i]] / f"{i}.png")
    argv = ["quality_report.py", *(str(tmp_path / split) for split in ("copies", "train", "test"))]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "out"), "--steps", "8"])
    report.main()
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["images"] == {"synthetic": 20, "real": 40, "held_out": 20}
    assert found["memorisation"]["ratio"] == pytest.approx(0, abs=1e-9)
    assert Image.open(tmp_path / "out" / "report.png").width > 400
    sets = [report.some(str(tmp_path / split), "train", 60) for split in ("train", "train", "test")]
    judge = report.trained_judge(*sets[0][:2], 2, 20)
    right = report.quality(*sets, judge)["label_reliability"]
    assert report.quality((sets[0][0], 1 - sets[0][1], sets[0][2]), *sets[1:], judge)["label_reliability"] == 1 - right


def test_does_it_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A whole run on images of two colours."""
    example = load("does_it_help", monkeypatch)
    write_images(tmp_path, ("a", "b"), (16, 16), 12)
    monkeypatch.setattr(example, "too_little", lambda *_: None)
    few = [stack for stack in example.ordinary() if stack.batch is not None][::3]
    monkeypatch.setattr(example, "ordinary", lambda: few)
    options = "--image-size 16 --steps 2 --seeds 2 --threads 1 --autoencoder none".split()
    monkeypatch.setattr(sys, "argv", ["does_it_help.py", str(tmp_path), *options])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("tried ") for line in lines) == len(few) + 6
    measured = sum(line.startswith("measured ") for line in lines)
    assert measured == 5 and sum(" ± " in line for line in lines) >= measured
    drawn, *_, moved = example.by_models(["pixels"])
    found = {example.PLAIN: [50.0, 50.2], example.Stack("other"): [52.0, 52.2], drawn: [55.0, 55.2]}
    words = example.conclusion(found | {moved: [51.0, 51.2]})
    assert "Over other" in words and "drawing helped (half drawn: +3.0" in words and "moving harmed" in words


# ---- whole runs ----------------------------------------------------------------------------------------------------


def smoke(name: str, *options: str) -> list[str]:
    """The lines that the example prints, run as a user runs it."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--smoke", *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_finetune_timm_and_its_resumption(tmp_path: Path) -> None:
    for epochs, options in ([0, 1], []), ([2], ["--epochs", "3"]):
        lines = smoke("finetune_timm", "--out", str(tmp_path), *options)
        rows = [json.loads(line) for line in lines if line[0] == "{"]
        assert [row["epoch"] for row in rows] == epochs
        assert all(0 <= row[f"top1{of}"] <= row[f"top5{of}"] <= 100 for row in rows for of in ("", "_ema"))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["chain", "wrap", "collate"])
def test_torchvision_loop(where: str) -> None:
    lines = smoke("torchvision_loop", "--where", where)
    assert "accuracy" in lines[1] and float(lines[1].split()[-2]) > 25
    # Work in workers is counted there (with --smoke there are none).
    assert "'selected': 0" not in lines[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_long_tail_and_synthetic_only(tmp_path: Path) -> None:
    lines = smoke("long_tail")
    counts = "341 real images, [100, 72, 51, 37, 26, 19, 14, 10, 7, 5] per class; 659 synthetic images"
    assert any(counts in line for line in lines)
    accuracy = [float(line.split("accuracy ")[1].split(" ")[0]) for line in lines if "accuracy" in line]
    assert len(accuracy) == 3 and accuracy[1] > 40 and accuracy[2] > 40
    lines = smoke("synthetic_only", "--export", str(tmp_path / "images"))
    assert float(lines[-1].split(": ")[1].split(" ")[0]) > 50
    assert len(list((tmp_path / "images").rglob("*.png"))) == 600
