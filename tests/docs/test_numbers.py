"""The numbers of the documentation against the stored results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import write_numbers as numbers
from glem_augment.io import write_json


def test_pages_have_the_numbers_of_the_stored_results() -> None:
    """`make numbers` writes them."""
    numbers.update(check=True)
    scripts = {report["command"].split()[1] for report in numbers.reports().values()}
    for page in numbers.pages():
        text = page.read_text(encoding="utf-8")
        typed = scripts.intersection(re.findall(r"`python (benchmarks/\S+\.py)", numbers.MARK.sub("", text)))
        assert not typed, f"{page.name}: mark the stored command, <!-- number: RESULT: command -->, of {typed}"
        at_start = re.findall(r"^ *<!-- number: .+? -->", text, flags=re.M)
        assert not at_start, f"{page.name}: a comment at the start of a line is a block of HTML: {at_start}"
        by_hand = re.findall(r"[^|.\n]*\d ± \d[^|.\n]*", numbers.MARK.sub("", text))
        assert not by_hand, f"{page.name}: mark these numbers: {by_hand}"


def test_a_row_changes_the_pages_and_a_change_by_hand_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in numbers.pages():
        (tmp_path / page.relative_to(numbers.ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(page, tmp_path / page.relative_to(numbers.ROOT))
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(numbers.RESULTS, results)
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    monkeypatch.setattr(numbers, "RESULTS", results)
    page, rows = tmp_path / "docs" / "numbers.md", json.loads((results / "private.json").read_text(encoding="utf-8"))
    by_hand = re.sub(r"\d\.\d(?= ± | %|<!--| \|)", "9.9", page.read_text(encoding="utf-8"), count=1)
    page.write_text(by_hand, encoding="utf-8")
    with pytest.raises(SystemExit, match="docs/numbers.md"):
        numbers.update(check=True)
    write_json(results / "private.json", [*rows, rows[0] | {"seed": 9, "accuracy": 12.3}])
    before = (results / "private.md").read_text(encoding="utf-8")
    numbers.update(check=False)
    assert (results / "private.md").read_text(encoding="utf-8") != before
    assert page.read_text(encoding="utf-8") != by_hand


@pytest.mark.parametrize(
    "page",
    ["<!-- number: a -->1<!-- /number -->9", "-<!-- number: a -->1<!-- /number -->", "<!-- number: a -->1 %",
     "<!-- number: a -->1<!-- /number --> ± 2"],
)  # fmt: skip
def test_a_damaged_marker_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="marker"):
        numbers.written(page, {"a": "1.0"})
    with pytest.raises(ValueError, match="'b'"):
        numbers.written("<!-- number: b -->1<!-- /number -->", {"a": "1.0"})


def test_a_changed_number_is_written_again() -> None:
    page = "| a <!-- number: a b -->1.0 ± 2.0<!-- /number --> % |\n<!-- table: t -->\n<!-- /table -->\n"
    text = numbers.written(page, {"a b": "3.0 ± 0.1", "t": numbers.table("x | y", [["1", "2"]])})
    assert "-->3.0 ± 0.1<!--" in text and "\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n<!-- /table -->" in text


def test_two_rows_of_one_seed_are_an_error() -> None:
    rows: list[dict[str, Any]] = [{"arm": "flow", "seed": 0, "value": 1.0}, {"arm": "flow", "seed": 0, "value": 2.0}]
    with pytest.raises(ValueError, match="flow and seed 0"):
        numbers.by_seed(rows, "arm")
