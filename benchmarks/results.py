"""Make the tables of README.md, docs/ and benchmarks/results/STUDY.md from the stored rows, and check them.

    python benchmarks/results.py            # writes all tables; so does `make numbers`
    python benchmarks/results.py --check    # exit status 1 if something differs; so does `make test`
    python benchmarks/results.py --accept   # writes benchmarks/results/manifest.json, whose diff a reviewer reads

A page includes a table between `<!-- table: STUDY/NAME -->` and `<!-- /table -->`, each alone on a line. `tables.py`
has the tables. The manifest has the digests of stored rows, runs and pictures, and of the text of README.md and of the
pages in docs/. Only --accept writes it, so that a missing or changed row, a picture or a sentence is found even after
the tables were written again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks import tables
from benchmarks.common import RESULTS, ROOT, interval, read_csv, run_id
from glem_augment.io import atomic_write, json_text

STUDIES = {
    "augmentation": "Moves of training images beside other augmentations",
    "drawn": "Images drawn from a fit, beside few real ones",
    "samples": "Classifiers trained on samples alone",
    "private": "Private sets",
    "fit": "Classes estimated from few images and from many",
    "models": "Accuracy, likelihood and calibration of models",
    "speed": "Time of flows and moves",
    "paper": "The tables of the paper",
}
MANIFEST = RESULTS / "manifest.json"
TABLE = re.compile(r"^<!-- table: (\S+) -->\n.*?^<!-- /table -->$", re.M | re.S)
BESIDE = "± is half the 95 % interval of the mean (Student's t) over seeds."


def digest(*parts: str | bytes) -> str:
    whole = b"\n".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(whole).hexdigest()[:16]


# ---- tables and pages ------------------------------------------------------------------------------------------------


def markdown(head: str, lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table.

    Raises:
        ValueError: a line has too few or too many cells.
    """
    columns, found = head.split(" | "), []
    for line in lines:
        found.append([text.replace("|", ",") for text in line])
        if len(found[-1]) != len(columns):
            raise ValueError(f"{len(columns)} columns, but the line {found[-1]}")
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *found))


def made(name: str) -> str:
    """A table between its markers.

    Raises:
        ValueError: no table has this name.
    """
    if name not in tables.TABLES:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(tables.TABLES)}")
    _, head, lines = tables.TABLES[name]
    return f"<!-- table: {name} -->\n\n{markdown(head, lines())}\n\n<!-- /table -->"


def every_arm(study: str) -> Iterable[Iterable[str]]:
    """A line for each setting, arm, split and metric of the store, without the trials on validation images."""
    for setting in tables.rows(study).settings():
        found = tables.rows(study).arms(setting)
        for arm, split, metric, values in (each for each in found if not each[1].startswith("validation")):
            few = {"": f"{next(iter(values.values())):.4g}"} if len(values) == 1 else {}
            yield [setting, arm, split, metric, few.get("") or interval(values.values()).text(4), str(len(values))]


def study_page(study: str) -> str:
    """All tables of a study, the commands that measured its rows, and every arm."""
    parts = [f"# {STUDIES[study]}", f"{BESIDE} The rows are in `{study}.csv`."]
    for name, (title, *_) in tables.TABLES.items():
        if name.startswith(f"{study}/"):
            parts += [f"## {title}", made(name)]
    counts: dict[str, int] = {}
    for row in tables.rows(study).all:
        counts[row["run"]] = counts.get(row["run"], 0) + 1
    runs = [run for run in read_csv(RESULTS / "runs.csv") if run["run"] in counts]
    lines = ([f"`{r['command']}`", r["code"], r["processor"], r["versions"], str(counts[r["run"]])] for r in runs)
    parts += ["## Commands", "A commit stands beside a command whose code is no longer in this tree."]
    parts += [markdown("command | commit | processor | versions | rows", lines), "## Every arm"]
    parts.append(markdown("setting | arm | split | metric | value | seeds", every_arm(study)))
    return "\n\n".join(parts) + "\n"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """A page with its tables.

    Raises:
        ValueError: a marker is damaged, or names no table.
    """
    if wrong := re.search(r"<!-- */?table.*", TABLE.sub("", text)):
        raise ValueError(f"a marker is damaged or not alone on its line: {wrong[0]!r}")
    return TABLE.sub(lambda found: made(found[1]), text)


def outputs() -> dict[Path, str]:
    """The text of all files that the tables make or change."""
    found = {RESULTS / f"{study}.md": study_page(study) for study in STUDIES}
    for page in pages():
        try:
            found[page] = written(page.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{page.relative_to(ROOT)}: {error}") from None
    return found


# ---- the manifest ----------------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """Digests of a page's text outside of tables, without regard to white space, by heading."""
    found: dict[str, list[str]] = {"": []}
    code, heading = False, ""
    for line in TABLE.sub("", text).splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            heading = line.strip("# ")
        found.setdefault(heading, []).extend(line.split())
    return {heading: digest(" ".join(words)) for heading, words in found.items() if words}


def present() -> dict[str, Any]:
    """The manifest of the files as they are."""
    studies: dict[str, Any] = {}
    for study in STUDIES:
        groups: dict[str, list[dict[str, str]]] = {}
        for row in tables.rows(study).all:
            groups.setdefault(row["setting"], []).append(row)
        studies[study] = {
            setting: f"{len({row['arm'] for row in group})} arms, {len({row['seed'] for row in group})} seeds, "
            f"{len(group)} rows, {digest(*sorted(json.dumps(list(row.values())) for row in group))}"
            for setting, group in groups.items()
        }
    pictures = sorted([*(ROOT / "docs").rglob("*.png"), *RESULTS.rglob("*.png")])
    texts: dict[str, Any] = {}
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
        names = [found[1] for found in TABLE.finditer(text)]
        texts[name] = {"tables": names, "text": sections(text)}
    return {
        "studies": studies,
        "runs": {run["run"]: run["command"] for run in read_csv(RESULTS / "runs.csv")},
        "pictures": {path.relative_to(ROOT).as_posix(): digest(path.read_bytes()) for path in pictures},
        "pages": texts,
    }


def changes(before: Any, now: Any, where: str = "") -> list[str]:
    """The entries of the manifest that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys((*before, *now)))
        return [line for key in keys for line in changes(before.get(key), now.get(key), f"{where}/{key}")]
    return [] if before == now else [f"{where.lstrip('/')}: {before} in the manifest, {now} now"]


def faults() -> list[str]:
    """What a reader should know before any table is believed."""
    found = []
    for run in read_csv(RESULTS / "runs.csv"):
        if run["run"] != run_id(run):
            found.append(f"runs.csv: {run['run']} is not the run of {run['command']!r}: a fact of it was changed")
    known = {run["run"] for run in read_csv(RESULTS / "runs.csv")}
    for study in STUDIES:
        lost = {row["run"] for row in tables.rows(study).all} - known
        found += [f"{study}.csv: no run {run!r} in runs.csv" for run in sorted(lost)]
    for page in pages():
        text = TABLE.sub("", page.read_text(encoding="utf-8"))
        typed = re.findall(r"[^|.\n]*\d ?(?:±|\+/-) ?\d[^|.\n]*|.*<!--.*", re.sub(r"```.*?```", "", text, flags=re.S))
        found += [f"{page.relative_to(ROOT)}: a computed number or a comment in a sentence: {line!r}" for line in typed]
    before = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.is_file() else {}
    return found + changes(before, present())


# ---- the command -----------------------------------------------------------------------------------------------------


def check() -> list[str]:
    """All differences between pages, stored rows and the manifest."""
    stale = [page for page, text in outputs().items() if not page.is_file() or page.read_text(encoding="utf-8") != text]
    return [
        f"{page.relative_to(ROOT)}: its tables differ from the rows: run `make numbers`" for page in stale
    ] + faults()


def write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path, "w") as file:
            file.write(text)
        print(f"results: wrote {path.relative_to(ROOT)}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something differs")
    arguments.add_argument("--accept", action="store_true", help="also write the manifest, whose diff a reviewer reads")
    args = arguments.parse_args()
    try:
        if args.check:
            found = check()
            raise SystemExit("results: " + "\nresults: ".join(found) if found else 0)
        for path, text in outputs().items():
            write(path, text)
        if args.accept:
            write(MANIFEST, json_text(present()) + "\n")
    except ValueError as error:
        raise SystemExit(f"results: {error}") from error
    left = faults()
    print("results: the manifest agrees" if not left else "results: " + "\nresults: ".join(left))


if __name__ == "__main__":
    main()
