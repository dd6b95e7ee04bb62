"""The documentation against the code: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_hub
import torch
from test_cli import TINY, write_images
from test_custom import GainAndShift

from glem_augment.cli import build_parser, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
server = test_hub.server  # the fixture: a Hub on the loopback interface


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every block of code, in order. Lines that a backslash continues are joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The command lines in its shell code, without comments and without settings of the environment."""
    lines = [line for language, text in blocks(page) if language == "bash" for line in text.splitlines()]
    split = [[word for word in shlex.split(line, comments=True)] for line in lines]
    return [argv for words in split if (argv := words[next((i for i, w in enumerate(words) if "=" not in w), 0) :])]


# ---- code and commands ---------------------------------------------------------------------------------------------

# What makes a page's code small enough for a test, and options added to its commands.
SMALLER: dict[str, dict[str, str]] = {
    "docs/fit.md": {
        "--image-size 128": "--image-size 16",
        "(3, 32, 32)": "(3, 8, 8)",
        "glem fit photos/ --autoencoder taef2 --image-size 64": "#",
    },
    "docs/flows.md": {"(3, 32, 32)": "(3, 8, 8)"},
    "README.md": {
        "glem fit private/": "# glem fit private/",  # a few images are noise
        "glem generate runs/shareable": "# glem generate runs/shareable",
        "glem info runs/shareable": "# glem info runs/shareable",
        "--image-size 64": "--image-size 16",
    },
    "docs/index.md": {
        "--per-class 100": "--per-class 1",
        "batch_size=64": "batch_size=4",
        "--image-size 128": "--image-size 16",
        "glem preview bundled:fashion-mnist": "# glem preview bundled:fashion-mnist",
    },
    "docs/privacy.md": {  # a few images are noise, so the model is another one
        "glem fit private/": "# glem fit private/",
        "glem generate runs/shareable": "# glem generate runs/shareable",
        'open_data("private/", image_size=64, channels=3)': "None",
        'GLEM.fit(data, autoencoder="taef2", privacy=Privacy(epsilon=1, delta=1e-6))': "None",
        "runs/shareable": "runs/photos",
        "2000": "20",
    },
    "docs/synthetic.md": {"--per-class 500": "--per-class 1"},
    "docs/train.md": {
        '"train")': '"train").subset(range(0, 1000, 40))',
        "epochs=20": 'epochs=1, preset="identity"',
        "--image-size 64": "--image-size 16",
        "--preset latent": "--preset latent --flow blocks=[1,1]",
    },
}
OPTIONS = {
    "train": [*TINY, "--epochs", "1"],
    "eval": ["--limit", "9", "--round-trip", "3"],
}

WITH_CODE = [
    "README.md", "docs/arrays.md", "docs/fit.md", "docs/flows.md", "docs/hub.md", "docs/index.md",
    "docs/privacy.md", "docs/synthetic.md", "docs/train.md",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs(
    name: str, server: test_hub.HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python and glem commands, in order, on small images and flows under the names that the pages use. (The code of
    docs/plugin.md is run in tests/augment/test_loops.py.)"""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "photos-test"):
        write_images(tmp_path / folder, ("ant", "cat", "dog"), (20, 24), 6)
    (tmp_path / "photos" / "dog" / "0.png").unlink()  # so that there is something to balance
    write_images(tmp_path / "unsorted", ("images",), (20, 24), 20)
    model = test_hub.tiny_model(data="photos", images=17)
    model.fit_modes((torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8), torch.arange(30) % 3), rank=4)
    for repo in ("org/model", "org/name"):
        server.put(repo, test_hub.files_of(model, tmp_path / repo))
        server.repos[repo]["v1.0"] = server.repos[repo]["main"]
    if name in ("docs/hub.md", "docs/privacy.md", "docs/synthetic.md"):  # the other pages make this one
        model.save(tmp_path / "runs" / "photos")
    shutil.rmtree(tmp_path / "org")  # a folder would win over the Hub
    space: dict[str, Any] = {"flow": GainAndShift()}  # for docs/flows.md without FrEIA
    ran = 0
    for language, text in blocks(ROOT / name):
        for old, new in SMALLER.get(name, {}).items():
            text = text.replace(old, new)
        if "import FrEIA" in text and importlib.util.find_spec("FrEIA") is None:
            continue
        if language == "python":
            exec(compile(text, name, "exec"), space)
            ran += 1
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line.removeprefix("HF_HUB_OFFLINE=1 "), comments=True)
            if words[:1] == ["glem"] and "NAME" not in words:
                assert main([*words[1:], *OPTIONS.get(words[1], [])]) == 0, line
                ran += 1
    assert ran


def test_commands_exist_and_links_lead_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for page in PAGES:
        for argv in commands(page):
            if argv[0] == "make":
                assert argv[1] in targets, argv
            elif argv[0] == "glem":
                with monkeypatch.context() as patch:  # tables in files are read at once
                    patch.setattr(Path, "read_text", lambda *_, **__: "{}")
                    assert build_parser(argv[1:]).parse_args(argv[1:]).run
            elif argv[0] == "python":
                shared = (ROOT / "benchmarks" / "common.py", ROOT / "examples" / "_common.py")
                source = "".join(path.read_text() for path in (ROOT / argv[1], *shared))
                for option in argv[2:]:
                    assert not option.startswith("--") or f'"{option}"' in source, (argv, option)
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """As `make docs` does, with warnings as errors; nothing in it is loaded from elsewhere."""
    for module in ("material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(module, reason=f"the extra [docs] is not installed: no {module}")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site"): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > len(PAGES) and "<math" in pages[Path("method.html")]
    for path, text in pages.items():
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(?:https?:)?//", text), path
