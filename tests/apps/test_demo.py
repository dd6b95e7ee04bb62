"""The demo: one page with all parts, whose numbers are the report's."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from glem_augment import Noise, open_data
from glem_augment.apps.demo import QUICK, moves, sentence
from glem_augment.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a quick demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:  # whole blocks would be decoded for a few images
        patch.setattr("glem_augment.synthetic.dataset.BLOCK", 4)
        assert main(["demo", "--out", str(out), "--quick", "--quiet"]) == 0
    return out


def test_the_page_has_every_part_and_the_numbers_of_the_report(demo: Path) -> None:
    page = html.unescape((demo / "index.html").read_text(encoding="utf-8"))
    report = json.loads((demo / "report.json").read_text(encoding="utf-8"))
    titles = [
        "Share images that you cannot share",
        "Move images where there are few",
        "Draw a balanced data set",
        "One model, both ways",
    ]
    assert [page.index(title) for title in titles] == sorted(page.index(title) for title in titles)
    assert report["quick"] is True and "A quick run" in page
    for part in (report["private"], report["moves"]):
        for arm in part["arms"].values():
            assert len(arm["accuracies"]) == 2 and arm["mean"] == pytest.approx(sum(arm["accuracies"]) / 2)
            assert f"{arm['mean']:.1f} ± {arm['interval']:.1f}" in page
        gain = part["difference"]
        assert sentence(gain["what"], gain["mean"], gain["interval"]) in page
    model = report["model"]
    assert f"{100 * model['accuracy']:.1f} ± {100 * model['accuracy_interval']:.1f}" in page
    assert model["round_trip"]["within_half_step"] == 1.0


def test_the_page_is_one_file(demo: Path) -> None:
    page = (demo / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and "<script" not in page and "<link" not in page and "url(" not in page and "http" not in page
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size in ((32, 32), (28, 28))
    assert len(sources) == 20 + 40 + 20


def test_the_set_and_the_pictures_lie_beside_the_page(demo: Path) -> None:
    made = open_data(demo / "synthetic")
    assert len(made) == 20 and len(made.classes) == 10
    for name in ("private", "moves", "synthetic"):
        assert Image.open(demo / f"{name}.png").width > 150


def test_the_lines_of_python_on_the_page_run(demo: Path) -> None:
    page = (demo / "index.html").read_text(encoding="utf-8")
    blocks = [html.unescape(text) for text in re.findall("<pre>(.*?)</pre>", page, re.DOTALL)]
    lines = [text for text in blocks if "import" in text]
    assert len(lines) == 2
    train = open_data("bundled:fashion-mnist")
    names: dict = {"few": train.subset(range(0, len(train), 5))}
    for text in lines:
        exec(text.replace('GLEM.fit("bundled:fashion-mnist"', "GLEM.fit(few"), names)
    assert len(names["shared"]) == 10 * 20 and names["shared"].temperature == 1.0


def test_photographs_ship_with_their_terms() -> None:
    data = open_data("bundled:photographs")
    assert len(data) == 3 and data.image_shape == (3, 256, 256) and data.classes == ["image"]
    assert torch.equal(data.tensor(), open_data("bundled:photographs", "test").tensor())
    folder = Path(__file__).parents[2] / "glem_augment" / "bundled" / "data" / "photographs"
    terms = (folder / "LICENSE.txt").read_text(encoding="utf-8")
    files = sorted((folder / "image").iterdir())
    assert len(files) == 3 and all(f"\n{file.name} " in terms for file in files)
    assert sum(file.stat().st_size for file in files) < 150_000
    assert "photographs/LICENSE.txt" in (folder.parents[3] / "pyproject.toml").read_text(encoding="utf-8")


def test_the_networks_of_a_pair_differ_by_the_moves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves of no length give the same networks: the same images, start, order and crops."""
    size, arms = replace(QUICK, few_steps=6), {}
    for policy in (Noise(0.0), Noise(0.5)):
        monkeypatch.setattr("glem_augment.apps.demo.USUAL", policy)
        found = moves(size, False)[1]["arms"]
        arms[policy] = found["crop and moves"]["accuracies"], found["crop"]["accuracies"]
    (still, crop), (moved, again) = arms.values()
    assert still == crop == again and moved != crop and crop[0] != crop[1]


def test_a_difference_within_its_interval_is_none() -> None:
    assert sentence("a over b", 1.0, 1.1) == "A over b: +1.0 ± 1.1 points, which is no clear difference."
    assert sentence("a over b", -1.2, 1.1) == "A over b: -1.2 ± 1.1 points."
