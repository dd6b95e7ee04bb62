"""The tables of the documentation against the stored rows, and what the check of both finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import common, results, tables


def test_pages_have_the_tables_of_the_stored_rows_and_the_manifest_agrees() -> None:
    """`make numbers` writes the tables; `python benchmarks/results.py --accept` writes the manifest."""
    assert results.check() == []


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of README.md, docs/ and the results, which the check reads in place of the repository's."""
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(results.ROOT / name, tmp_path / name)
    shutil.copy(results.ROOT / "README.md", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", folder)
    monkeypatch.setattr(results, "MANIFEST", folder / "manifest.json")
    return tmp_path


def read_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Forget the rows that were read, and read the copy's."""
    found = {study: common.Rows(study, folder) for study in results.STUDIES}
    monkeypatch.setattr(tables, "rows", found.__getitem__)
    tables.tasks.cache_clear()
    tables.compared.cache_clear()


def edit(path: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        before = (root / path).read_text(encoding="utf-8")
        after = change(before)
        assert after != before
        (root / path).write_text(after, encoding="utf-8")

    return apply


def without_row(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[:1] + lines[2:])


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing row": (edit("benchmarks/results/private.csv", without_row), "rows, "),
    "a renamed seed": (edit("benchmarks/results/samples.csv", lambda t: t.replace(",real,2,", ",real,7,", 1)), "seeds"),
    "a lower opponent": (edit("benchmarks/results/private.csv", lambda t: t.replace(",88.", ",81.")), "rows, "),
    "a changed command": (
        edit("benchmarks/results/runs.csv", lambda t: t.replace("--seeds 3", "--seeds 9")),
        "runs.csv",
    ),
    "a swapped picture": (
        lambda root: (root / "docs" / "front.png").write_bytes(b"another picture"),
        "pictures/docs/front.png",
    ),
    "a sentence": (edit("README.md", lambda t: t.replace("gained little", "gained much", 1)), "pages/README.md/text"),
    "a marker that left": (edit("README.md", lambda t: results.TABLE.sub("", t, count=1)), "pages/README.md/tables"),
    "a number in a sentence": (edit("docs/privacy.md", lambda t: t + "\nIt reaches 93.1 ± 0.2 there.\n"), "computed"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found_even_after_the_tables_were_written_again(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt, words = CORRUPTIONS[name]
    corrupt(copy)
    read_again(monkeypatch, copy / "benchmarks" / "results")
    for path, text in results.outputs().items():
        results.write(path, text)
    found = results.check()
    assert found and all("make numbers" not in line for line in found) and words in "\n".join(found)


def test_a_changed_cell_of_a_table_is_found_and_written_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_again(monkeypatch, copy / "benchmarks" / "results")
    page = copy / "README.md"
    right = page.read_text(encoding="utf-8")
    page.write_text(right.replace("| CIFAR-10 | 5,000 |", "| CIFAR-10 | 200 |", 1), encoding="utf-8")
    assert any("README.md" in line and "make numbers" in line for line in results.check())
    results.write(page, results.outputs()[page])
    assert page.read_text(encoding="utf-8") == right


@pytest.mark.parametrize(
    "page", ["<!-- table: models/brief -->\n| a |\n", "text <!-- table: models/brief -->\n<!-- /table -->\n"]
)
def test_a_damaged_marker_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="marker"):
        results.written(page)
    with pytest.raises(ValueError, match="'models/none'"):
        results.written("<!-- table: models/none -->\n<!-- /table -->\n")


def test_rows_are_unique_and_kept_in_order(tmp_path: Path) -> None:
    rows = common.Rows("study", tmp_path)
    rows.add("a, b", "x", 0, "test", {"accuracy": 1.5, "n": 3})
    assert rows.once("a, b", "x", 0, "test", lambda: pytest.fail("measured again")) == {"accuracy": 1.5, "n": 3.0}
    rows.add("a, b", "x", 1, "test", {"accuracy": 2.5})
    rows.add("a, b", "x", 0, "test", {"accuracy": 4.0})
    again = common.Rows("study", tmp_path)
    assert again.values("a, b", "x") == {"0": 4.0, "1": 2.5} and again.settings() == ["a, b"]
    (run,) = common.read_csv(tmp_path / "runs.csv")
    assert run["run"] == common.run_id(run) == again.all[0]["run"] and run["date"]
    lines = (tmp_path / "study.csv").read_text().splitlines(keepends=True)
    (tmp_path / "study.csv").write_text("".join([*lines, lines[-1]]))
    with pytest.raises(ValueError, match="remove one of them"):
        common.Rows("study", tmp_path)
