"""`glem explore`: the page is served, and asked as a browser would ask it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import Output, fails, images_of, output, trained  # noqa: F401  (two are fixtures)
from test_hub import server, tiny_model  # noqa: F401  (one is a fixture)

from glem_augment import GLEM, SyntheticDataset
from glem_augment.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
Visit = Callable[[str], None]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets is undone; matplotlib would make the folder that it removed again."""
    for name in ("GRADIO_RUN_HISTORY", "GRADIO_TEMP_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_what_explore_needs(trained: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    fails(["explore", str(trained), "--split", "test"], output, "DATA is missing", "photos/")
    fails(["explore", "bundled:cifar10", "--split", "test"], output, "DATA is missing")  # it ships without images
    monkeypatch.setitem(sys.modules, "gradio", None)
    fails(["explore"], output, "pip install 'glem-augment[explore]'")


def visited(argv: list[str], visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `glem explore` in an empty folder, with a call of `visit` in the place of the wait for Ctrl-C."""
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed (extra explore)")

    def wait(page: Any) -> None:
        assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
        visit(page.local_url)
        page.close(verbose=False)

    monkeypatch.setattr(gradio.Blocks, "block_thread", wait)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["explore", *argv]) == 0
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()
    assert not list((tmp_path / "empty").iterdir())


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, str]:
    """A photograph, a damaged file and a picture of 100 megapixels."""
    paths = {name: str(tmp_path / f"{name}.png") for name in ("photo", "broken", "bomb")}
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(paths["photo"])
    Path(paths["broken"]).write_bytes(Path(paths["photo"]).read_bytes()[:200])
    Image.new("1", (11_000, 9100)).save(paths["bomb"])
    return paths


def test_every_tab_answers(
    trained: Path,  # noqa: F811
    photos: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def visit(url: str) -> None:
        client_module = pytest.importorskip("gradio_client")
        client = client_module.Client(url, verbose=False, download_files=str(tmp_path / "downloads"))

        def ask(*values: Any, name: str) -> Any:
            return client.predict(*values, api_name=f"/{name}")

        sheet = Image.open(ask(1, 0.8, "rfcm", 3, name="samples"))
        cell = np.asarray(sheet.convert("RGB"))[-18 - 2 - 56 : -18 - 2, 20 : 20 + 56]
        sample = SyntheticDataset(GLEM.from_pretrained(trained), {"cat": 25}, 0.8, 3, source="rfcm").images([24])[0]
        assert (cell[::7, ::7] == sample.permute(1, 2, 0).numpy()).all()

        upload = client_module.handle_file(photos["photo"])
        original, moved, _, facts, *bars = ask(0, upload, 2, "noise", 0.1, 0, *[0] * 5, name="move")
        assert Image.open(original).size == Image.open(moved).size
        assert "modes of dog, which GLEMAugment uses" in facts and len(bars) == 2
        assert sum(entry["confidence"] for entry in bars[0]["confidences"]) == pytest.approx(1, abs=1e-4)
        slid = (ask(0, None, -1, "sliders", s, 0, c, *[0] * 4, name="move")[1] for s, c in ((1, 1), (0.5, 2), (1, 2)))
        once, same, twice = (Image.open(path).tobytes() for path in slid)
        assert once == same != twice
        *_, legend, curve = ask(0, None, 17, None, 0.25, name="between")
        assert legend.count("</b> ") == 3
        assert len(curve["data"] if "data" in curve else curve["value"]["data"]) == 3 * 41
        facts, *galleries = ask(name="measure")
        assert ", accuracy " in facts and [len(gallery) for gallery in galleries] == [12, 12]
        files = {entry["caption"].rpartition(", ")[2] for gallery in galleries for entry in gallery}
        assert files <= {f"{path.parent.name}/{path.name}" for path in Path(images_of(trained)).rglob("*.png")}
        _, verdict = ask(0, 0.8, "rfcm", 0, name="neighbours")
        assert "train split" in verdict
        for file, words in {"broken": "cannot be read as an image", "bomb": "11000 x 9100 pixels"}.items():
            with pytest.raises(client_module.exceptions.AppError, match=f"{file}.png .*{words}"):
                ask(0, client_module.handle_file(photos[file]), 2, "noise", 0.1, 0, *[0] * 5, name="move")

    visited([str(trained), images_of(trained)], visit, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_browser_on_every_tab(photos: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliders by the keyboard, uploads and their errors; nothing is asked of any other machine."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")

    def visit(url: str) -> None:
        asked: list[str] = []
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.on("request", lambda request: asked.append(request.url))
            page.set_default_timeout(60_000)
            page.goto(url)
            page.get_by_role("img", name="Samples").or_(page.locator("img:visible")).first.wait_for()
            page.get_by_role("tab", name="Move").click()
            page.get_by_text("which GLEMAugment uses").wait_for()
            assert page.get_by_text("The largest change of a pixel is 0 of 255.").count() == 0
            page.get_by_role("slider", name="Mode 1").focus()
            for _ in range(30):
                page.keyboard.press("ArrowLeft")
            page.get_by_text("The largest change of a pixel is 0 of 255.").wait_for()
            page.set_viewport_size({"width": 390, "height": 900})
            picture, slider = page.get_by_role("img", name="Moved"), page.get_by_role("slider", name="Mode 1")
            above, below = picture.bounding_box(), slider.bounding_box()
            assert above and below and above["y"] < below["y"]
            page.set_viewport_size({"width": 1280, "height": 900})
            for name, words in (("photo", None), ("broken", "cannot be read as an image"), ("bomb", "11000 x 9100")):
                page.locator("input[type=file]:not([disabled])").first.set_input_files(photos[name])
                if words is None:
                    page.wait_for_function("[...document.images].some(image => image.naturalWidth == 3 * 90)")
                else:
                    page.get_by_text(words).first.wait_for()
                page.get_by_label("Clear").first.click()
            page.get_by_role("tab", name="Between").click()
            page.get_by_text("Posterior along the line").wait_for()
            page.get_by_role("tab", name="Data").click()
            page.get_by_role("button", name="Measure the flow").click()
            page.get_by_text(", accuracy").wait_for()
            page.get_by_role("button", name="Find the real images").click()
            page.get_by_text("samples are nearer to a training image").wait_for()
            nameless = (
                "e => !e.labels?.length && !e.ariaLabel && !e.innerText.trim() && !e.querySelector('img')?.alt.trim()"
            )
            controls = "[...document.querySelectorAll('input:not([type=file]), select, textarea, button')]"
            assert page.evaluate(f"{controls}.filter({nameless}).map(e => e.outerHTML)") == []
            browser.close()
        assert all(address.startswith((url, "data:", "blob:")) for address in asked), asked

    visited(["--limit", "100"], visit, tmp_path, monkeypatch)
