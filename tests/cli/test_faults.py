"""Training and exporting that are killed or find the disk full: the end is that of an undisturbed run."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

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


def died(argv: list[str], log: Path, die_at: int | None = None) -> bool:
    """Whether a command in a new process died before operation `die_at` on a file; otherwise it ended well."""
    code = faulty.run(argv, log, die_at)
    assert code == 0 or (code == faulty.DIED and die_at is not None), log.read_text()
    return code == faulty.DIED


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert not died(train_argv(images, root / "run"), root / "log")
    return root / "run"


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


@PLACES
def test_training_killed_before_operations_on_files(
    tmp_path: Path, images: Path, undisturbed: Path, places: Sequence[int]
) -> None:
    """Also between two renames, and in the middle of a write."""
    log, deaths = tmp_path / "log", 0
    for at in places:
        out = tmp_path / str(at)
        dead = died(train_argv(images, out), log, at)
        all_whole(out)
        if dead:
            deaths += 1
            assert not died(train_argv(images, out), log)
        same_end(out, undisturbed)
        shutil.rmtree(out)
        if not dead:
            break
    assert deaths >= min(20, len(places))


def exported(folder: Path) -> dict[str, bytes]:
    """Every file under its final name."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not re.search(r"(^|/)\.", name)}


@PLACES
def test_an_export_killed_in_the_middle_of_operations_on_files(
    tmp_path: Path, undisturbed: Path, places: Sequence[int]
) -> None:
    def argv(out: Path) -> list[str]:
        return ["generate", str(undisturbed), "--per-class", "10", "--seed", "3", "--out", str(out)]

    log, deaths = tmp_path / "log", 0
    assert not died(argv(tmp_path / "whole"), log)
    whole = exported(tmp_path / "whole")
    for at in places:
        out = tmp_path / str(at)
        dead = died(argv(out), log, at)
        if dead:
            deaths += 1
            assert not died(argv(out), log)
        assert exported(out) == whole
        if not dead:
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
