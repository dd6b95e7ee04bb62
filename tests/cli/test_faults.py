"""Training and exporting that are killed or find the disk full: the end is that of an undisturbed run."""

from __future__ import annotations

import errno
import random
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from test_cli import TINY, write_images
from test_training import comparable, tiny_trainer

from glem_augment import GLEM
from glem_augment.model.files import CHECKPOINT, CONFIG, WEIGHTS
from glem_augment.training.checkpoint import has_checkpoint, load_checkpoint

# A fault at one operation on a file in the fast suite, and at each operation in the slow one.
SLOW = pytest.param(range(3, 10_000), marks=(pytest.mark.slow, pytest.mark.timeout(3600)))
PLACES = pytest.mark.parametrize("places", [[25], SLOW])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    write_images(folder, ("bird", "cat", "dog"), (8, 8), 12)
    return folder


def train_argv(images: Path, out: Path) -> list[str]:
    """14 steps; --resume starts where there is nothing to resume."""
    argv = ["train", str(images), "--out", str(out), "--resume", "--epochs", "2", "--batch-size", "4", *TINY]
    argv += ["--warmup-steps", "5", "--objective", "glem", "--modes-rank", "2"]
    return [*argv, "--flow", "blocks=[1,1]", "--sample-every", "2"]


def run(argv: list[str], notes: Path, *codes: int, **how: Any) -> int:
    """The exit code of a command in a new process: one of `codes`, or 0. See `faulty.start`."""
    code = faulty.finish(faulty.start(argv, notes, **how))
    assert code in (0, *codes), Path(f"{notes}.log").read_text()
    return code


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Path, float]:
    """A run that nobody disturbed, and its seconds."""
    root = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    run(train_argv(images, root / "run"), root / "notes")
    return root / "run", time.monotonic() - began


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def all_whole(out: Path) -> None:
    """Nothing stands half-written under its final name."""
    if (out / CHECKPOINT).exists():
        load_checkpoint(out)
    if (out / CONFIG).exists():
        GLEM.from_pretrained(out)


def same_end(out: Path, whole: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert comparable(out) == comparable(whole) and names(out) == names(whole)
    for path in (whole / "samples").iterdir():
        assert (out / "samples" / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (load_checkpoint(folder) for folder in (out, whole))
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_killed_at_random_moments(tmp_path: Path, images: Path, undisturbed: tuple[Path, float]) -> None:
    (whole, seconds), rng, notes, kills = undisturbed, random.Random(0), tmp_path / "notes", 50
    killed, runs, out = 0, 0, tmp_path / "0"
    while killed < kills or out.exists():
        process = faulty.start(train_argv(images, out), notes)
        # The last piece is left alone.
        code = faulty.kill_at_random(process, seconds, rng, killed) if killed < kills else faulty.finish(process)
        # SIGTERM ends the step at hand, and only before or after all steps the process.
        assert code in (0, *((-15, 130) if killed % 2 else (-9,))), Path(f"{notes}.log").read_text()
        all_whole(out)
        if code == 0:
            same_end(out, whole)
            runs, out = runs + 1, tmp_path / str(runs + 1)
            continue
        killed += 1
        if (last := faulty.steps_noted(notes)) >= 0:  # nothing is lost but the step at hand
            assert load_checkpoint(out)["step"] >= last
    assert runs >= 1


@PLACES
def test_training_killed_before_operations_on_files(
    tmp_path: Path, images: Path, undisturbed: tuple[Path, float], places: Sequence[int]
) -> None:
    """Kills between two renames, or in the middle of a write, are rare at random moments; here they are certain."""
    notes, deaths = tmp_path / "notes", 0
    for at in places:
        out = tmp_path / str(at)
        code = run(train_argv(images, out), notes, faulty.DIED, die_at=at, every_step=False)
        all_whole(out)
        if code == faulty.DIED:
            deaths += 1
            run(train_argv(images, out), notes, every_step=False)
        same_end(out, undisturbed[0])
        shutil.rmtree(out)
        if code == 0:
            break
    assert deaths >= min(20, len(places))


def exported(folder: Path) -> dict[str, bytes]:
    """Every file under its final name."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not re.search(r"(^|/)\.", name)}


@PLACES
def test_an_export_killed_in_the_middle_of_operations_on_files(
    tmp_path: Path, undisturbed: tuple[Path, float], places: Sequence[int]
) -> None:
    def argv(out: Path) -> list[str]:
        return ["generate", str(undisturbed[0]), "--per-class", "10", "--seed", "3", "--out", str(out)]

    notes, deaths = tmp_path / "notes", 0
    run(argv(tmp_path / "whole"), notes)
    whole = exported(tmp_path / "whole")
    for at in places:
        out = tmp_path / str(at)
        code = run(argv(out), notes, faulty.DIED, die_at=at)
        if code == faulty.DIED:
            deaths += 1
            run(argv(out), notes)
        assert exported(out) == whole
        if code == 0:
            break
    assert deaths >= 1


@pytest.mark.slow
def test_training_where_any_operation_on_a_file_may_find_the_disk_full(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny_trainer(tmp_path / "whole", every_step=True).fit()
    failures = 0
    for at in range(10_000):
        out = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in faulty.writing_operations():
                patch.setattr(owner, name, getattr(owner, name))  # to be undone
            done = faulty.die_before(at, full, faulty.writing_operations())
            try:
                tiny_trainer(out).fit()
            except OSError as error:
                failures += 1
                assert error.errno == errno.ENOSPC
        all_whole(out)
        tiny_trainer(out, resume=has_checkpoint(out)).fit()
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
        if done() <= at:
            break
    assert failures >= 20
