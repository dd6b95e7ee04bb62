"""The numbers of the documentation against the stored results: a change by hand in either is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import write_numbers as numbers
from glem_augment.io import write_json


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages and results, which `numbers` reads."""
    for page in numbers.pages():
        (tmp_path / page.relative_to(numbers.ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(page, tmp_path / page.relative_to(numbers.ROOT))
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(numbers.RESULTS, results)
    for picture in (numbers.ROOT / "docs").glob("*.png"):
        shutil.copy(picture, tmp_path / "docs")
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    monkeypatch.setattr(numbers, "RESULTS", results)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(old, text)) >= 1, old
    path.write_text(re.sub(old, new, text, count=1), encoding="utf-8")


def change(name: str, changed: Callable[[list[Any]], object]) -> Callable[[Path], None]:
    """A change of rows, written as scripts write rows."""

    def write(root: Path) -> None:
        path = root / "benchmarks" / "results" / f"{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))
        changed(rows)
        write_json(path, rows)

    return write


def without_validation(rows: list[dict[str, Any]]) -> None:
    """Delete the rows of eight pairs of opponents."""
    pairs = [row for row in rows if row["stage"] == "pairs"]
    rows[:] = [row for row in rows if row not in pairs[:8]]


def zeros(rows: list[dict[str, Any]]) -> None:
    for row in rows[:23]:
        row["val_accuracy"] = 0.0


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bare number": (
        lambda root: edit(
            root / "docs/train.md", r"<!-- number: bundled_cifar10: accuracy -->(.*?)<!-- /number -->", r"\1"
        ),
        r"docs/train.md has other names .* without 'bundled_cifar10: accuracy'; restore it",
    ),
    "a digit behind a number": (
        lambda root: edit(root / "docs/train.md", r"(accuracy -->\d\d\.\d\d<!-- /number -->)", r"\g<1>9"),
        r"docs/train.md: .* stands beside or without",
    ),
    "a number without a name": (
        lambda root: edit(root / "docs/train.md", r"\Z", "\nIt is 91.2 ± 0.3 %.\n"),
        r"docs/train.md: .* stands beside or without one: '± 0'",
    ),
    "a sign before a number": (
        lambda root: edit(root / "docs/train.md", r"(<!-- number: bundled_cifar10: accuracy)", r"-\1"),
        r"docs/train.md: .* stands beside or without",
    ),
    "another picture": (
        lambda root: shutil.copy(root / "docs/moves.png", root / "docs/private.png"),
        r"docs/private.png differs from its digest",
    ),
    "a damaged marker": (
        lambda root: edit(root / "README.md", "<!-- /table -->", "<!-- table -->"),
        r"README.md has other names",
    ),
    "another name": (
        lambda root: edit(root / "docs/train.md", "number: bundled_cifar10: accuracy", "number: bundled_cifar10: ece"),
        r"docs/train.md has other names .* new 'bundled_cifar10: ece'",
    ),
    "exchanged names": (
        lambda root: (
            edit(root / "docs/synthetic.md", "number: bundled_flow: rfcm T=0.8", "number: X"),
            edit(
                root / "docs/synthetic.md", "number: bundled_flow: gaussian T=0.8", "number: bundled_flow: rfcm T=0.8"
            ),
            edit(root / "docs/synthetic.md", "number: X", "number: bundled_flow: gaussian T=0.8"),
        ),
        r"docs/synthetic.md has other names .* in another order",
    ),
    "a count in words": (
        lambda root: edit(root / "docs/numbers.md", "-->five<!--", "-->nine<!--"),
        r"docs/numbers.md differs from the stored results: run `make numbers`",
    ),
    "a table in README": (
        lambda root: edit(root / "README.md", r"\| mean of \d+ .*", "| mean of 9 comparisons | +9.9 |"),
        r"README.md differs from the stored results: run `make numbers`",
    ),
    "deleted validation rows": (
        change("augmentation_tuning", without_validation),
        r"results/augmentation_tuning.json differs from its digest .* restore it with git",
    ),
    "validation rows of 0": (
        change("augmentation_tuning", zeros),
        r"results/augmentation_tuning.json differs from its digest .* restore it with git",
    ),
    "a second row": (
        change("fine_tuned", lambda rows: rows.append(rows[-1] | {"accuracy": 0.99})),
        r'results/fine_tuned.json has 2 rows of one cell and seed, \["cifar10-50".*: remove all but one',
    ),
    "a second row of an audit": (
        change("private_audit", lambda record: record["rows"].append(record["rows"][0] | {"caught": "yes"})),
        r"results/private_audit.json has 2 rows of one cell",
    ),
    "a page of a result": (
        lambda root: edit(root / "benchmarks/results/no_network.md", r"\d\d\.\d", "99.9"),
        r"results/no_network.md differs from the stored results: run `make numbers`",
    ),
    "a page of the paper": (
        lambda root: edit(root / "benchmarks/results/paper/table3.cpu.md", r"\d\d\.\d", "99.9"),
        r"results/paper/table3.cpu.md differs from the stored results: run `make numbers`",
    ),
    "a page that is not made again": (
        lambda root: edit(root / "benchmarks/results/photographs.md", r"\d\d\.\d", "99.9"),
        r"results/photographs.md differs from its digest .* restore it with git",
    ),
    "a row of the paper": (
        change("paper/table2.cpu", lambda rows: rows[3].update(value=99.0)),
        r"results/paper/table2.cpu.json differs from its digest .* restore it with git",
    ),
    "a verdict": (
        change("paper/claims", lambda rows: rows[0].update(verdict="holds indeed")),
        r"results/paper/claims.json differs from the stored results: run `make numbers`",
    ),
    "another form": (
        lambda root: edit(root / "benchmarks/results/speed.json", r"\n  ", "\n\t"),
        r"results/speed.json is not as its script writes it: restore it with git, or run the script again",
    ),
    "a missing result": (
        lambda root: (root / "benchmarks/results/speed.json").unlink(),
        r"results/speed.json.*No such file.*restore it with git",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_change_by_hand_is_found(name: str, copy: Path) -> None:
    """One sentence with the file and the fix."""
    corrupt, message = CORRUPTIONS[name]
    corrupt(copy)
    with pytest.raises(SystemExit, match=message):
        numbers.update(check=True)


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
    readme = (numbers.ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- number" not in readme, "README.md: numbers stand in tables"


def test_new_rows_are_written_once(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make numbers` after a benchmark: pages, tables and digests follow; afterwards the check passes."""
    change("private", lambda rows: rows.append(rows[0] | {"seed": 9, "accuracy": 12.3}))(copy)
    numbers.update(check=False)
    printed = capsys.readouterr().out
    assert "private.json differs from its digest" in printed and "wrote README.md" in printed
    assert " 9`" in (copy / "benchmarks/results/private.md").read_text(encoding="utf-8")
    numbers.update(check=True)


def test_a_choice_without_validation_rows_is_an_error(copy: Path) -> None:
    """`make numbers` takes no such rows either."""

    def delete(rows: list[dict[str, Any]]) -> None:
        rows[:] = [row for row in rows if row["stage"] != "pairs" or row["setting"] != "fashion-10"]

    change("augmentation_tuning", delete)(copy)
    with pytest.raises(ValueError, match=r"augmentation_tuning.json has no accuracy of fashion-10.*restore the file"):
        numbers.update(check=False)


def test_a_changed_number_is_written_again_and_an_unknown_one_is_an_error() -> None:
    page = "| a <!-- number: a b -->1.0 ± 2.0<!-- /number --> % |\n<!-- table: t -->\n<!-- /table -->\n"
    text = numbers.written(page, {"a b": "3.0 ± 0.1", "t": numbers.table("x | y", [["1", "2"]])})
    assert "-->3.0 ± 0.1<!--" in text and "\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n<!-- /table -->" in text
    with pytest.raises(ValueError, match="no number is called 'a b'"):
        numbers.written(page, {})


def test_two_rows_of_one_seed_are_an_error() -> None:
    rows = [{"arm": "flow", "seed": 0, "value": 1.0}, {"arm": "flow", "seed": 0, "value": 2.0}]
    with pytest.raises(ValueError, match="two rows have flow and seed 0"):
        numbers.by_seed(rows, "arm")
