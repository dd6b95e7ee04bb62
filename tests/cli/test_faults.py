"""Training and exporting that are killed, starved of disk and fed with NaN: the end is that of an undisturbed run."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from test_cli import TINY, write_images
from test_training import comparable, tiny_trainer

from glem_augment import GLEM, SyntheticDataset
from glem_augment.errors import TrainingError
from glem_augment.images.sources import PROVENANCE
from glem_augment.model.weights import CONFIG, WEIGHTS
from glem_augment.training.checkpoint import GOOD, NEWEST, from_bytes, has_checkpoint, load_checkpoint

# In the fast suite, and in the slow one.
SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))


def every(stride: int) -> pytest.MarkDecorator:
    """A fault at every so many operations on files in the fast suite, and at each operation in the slow one."""
    return pytest.mark.parametrize("stride", [stride, pytest.param(1, marks=SLOW)])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    write_images(folder, ("bird", "cat", "dog"), (8, 8), 12)
    return folder


def train_argv(images: Path, out: Path, *options: str) -> list[str]:
    """28 steps; --resume starts where there is nothing to resume."""
    argv = ["train", str(images), "--out", str(out), "--resume", "--quiet", "--epochs", "4", "--batch-size", "4", *TINY]
    argv += ["--warmup-steps", "5", "--objective", "glem", "--modes-rank", "2"]
    # The flow's settings in no order of the alphabet, which is that of the checkpoint.
    return [*argv, "--flow", "blocks=[1,1]", "--sample-every", "2", *options]


def run(argv: list[str], notes: Path, *codes: int, **how: Any) -> int:
    """The exit code of a command in a new process: one of `codes`, or 0. See `faulty.start`."""
    code = faulty.finish(faulty.start(argv, notes, **how))
    assert code in (0, *codes), Path(f"{notes}.log").read_text()
    return code


class Undisturbed:
    """Runs that nobody disturbed, and the seconds that they took."""

    def __init__(self, root: Path, images: Path) -> None:
        self.root, self.images, self.seconds = root, images, dict[Path, float]()

    def run(self, *options: str, poison: bool = False, every_step: bool = True) -> Path:
        out = self.root / f"run{poison}{'-'.join(options)}"
        if out not in self.seconds:
            notes = self.root / f"{out.name}.notes"
            process = faulty.start(train_argv(self.images, out, *options), notes, poison=poison, every_step=every_step)
            began = time.monotonic()
            assert faulty.finish(process) == 0, Path(f"{notes}.log").read_text()
            self.seconds[out] = time.monotonic() - began
        return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), images)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def all_whole(out: Path) -> None:
    """Nothing stands half-written under its final name."""
    for name in (NEWEST, GOOD):
        if (out / name).exists():
            from_bytes((out / name).read_bytes())
    if (out / CONFIG).exists():
        GLEM.from_pretrained(out)


def same_end(out: Path, whole: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert comparable(out) == comparable(whole)
    assert names(out) == names(whole)
    for path in (whole / "samples").iterdir():
        assert (out / "samples" / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (load_checkpoint(folder) for folder in (out, whole))
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
    assert {**ours.facts, "seconds": 0} == {**theirs.facts, "seconds": 0}


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kills", "poison"), [(3, True), pytest.param(50, False, marks=SLOW), pytest.param(50, True, marks=SLOW)]
)
def test_training_killed_at_random_moments(
    tmp_path: Path, images: Path, undisturbed: Undisturbed, kills: int, poison: bool
) -> None:
    whole, rng, notes = undisturbed.run(poison=poison), random.Random(kills), tmp_path / "notes"
    if poison:
        returns = [row for row in comparable(whole) if row["kind"] == "rollback"]
        assert [(row["step"], row["lr_scale"], row["number"]) for row in returns] == [(7, 0.5, 1)]
        said = (whole.parent / f"{whole.name}.notes.log").read_text()
        assert "glem: step 11: 3 steps in a row were not finite. Returned to step 7, at 0.5 times" in said
    killed, runs, out = 0, 0, tmp_path / "0"
    while killed < kills or out.exists():
        process = faulty.start(train_argv(images, out), notes, poison=poison)
        # The last piece is left alone.
        span = undisturbed.seconds[whole]
        code = faulty.kill_at_random(process, span, rng, killed) if killed < kills else faulty.finish(process)
        # SIGTERM ends the step at hand, and only before or after all steps the process.
        assert code in (0, *((-15, 130) if killed % 2 else (-9,))), Path(f"{notes}.log").read_text()
        all_whole(out)
        if code == 0:
            same_end(out, whole)
            runs, out = runs + 1, tmp_path / str(runs + 1)
            continue
        killed += 1
        if (last := faulty.steps_noted(notes)) >= 0:
            # Nothing is lost but the step at hand; unless the run had just returned to an earlier one.
            checkpoint = load_checkpoint(out)
            assert checkpoint.facts["step"] >= last or checkpoint.facts["rollbacks"] > 0
    assert runs >= 1


@every(29)
def test_training_killed_before_operations_on_files(
    tmp_path: Path, images: Path, undisturbed: Undisturbed, stride: int
) -> None:
    """Kills between two renames, or in the middle of a write, are rare at random moments; here they are certain."""
    options = ("--epochs", "2")
    how = dict(poison=True, every_step=False)  # the start, an epoch, a return, an epoch, the end
    whole, notes, deaths = undisturbed.run(*options, **how), tmp_path / "notes", 0
    for at in range(0, 10_000, stride):
        out = tmp_path / str(at)
        code = run(train_argv(images, out, *options), notes, faulty.DIED, die_at=at, **how)
        all_whole(out)
        if code == faulty.DIED:
            deaths += 1
            run(train_argv(images, out, *options), notes, **how)
        same_end(out, whole)
        shutil.rmtree(out)
        if code == 0:
            break
    assert deaths >= 40 // stride


def export_argv(model: Path, out: Path, per_class: int) -> list[str]:
    return ["generate", str(model), "--per-class", str(per_class), "--seed", "3", "--out", str(out)]


def exported(folder: Path) -> dict[str, bytes]:
    """Every file under its final name."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not re.search(r"(^|/)\.", name)}


def whole_or_absent(out: Path, whole: dict[str, bytes]) -> None:
    there = exported(out)
    manifest = json.loads(there.pop(PROVENANCE, b'{"complete": false}'))
    assert all(data == whole[name] for name, data in there.items())
    assert not manifest["complete"] or len(there) == len(whole) - 1


def finished(out: Path, whole: dict[str, bytes]) -> dict[Path, int]:
    """The files of complete blocks, and their inodes; a class of ten images is one block."""
    blocks: dict[Path, list[Path]] = {}
    for name in whole:
        if name.endswith(".png"):
            blocks.setdefault((out / name).parent, []).append(out / name)
    assert len(blocks) == 3 and all(len(paths) == 10 for paths in blocks.values())
    complete = [paths for paths in blocks.values() if all(path.exists() for path in paths)]
    return {path: path.stat().st_ino for paths in complete for path in paths}


@every(29)
def test_an_export_killed_in_the_middle_of_operations_on_files(
    tmp_path: Path, undisturbed: Undisturbed, stride: int
) -> None:
    model, notes, deaths, spared = undisturbed.run(), tmp_path / "notes", 0, 0
    run(export_argv(model, tmp_path / "whole", 10), notes)
    whole = exported(tmp_path / "whole")
    for at in range(0, 10_000, stride):
        out = tmp_path / str(at)
        code = run(export_argv(model, out, 10), notes, faulty.DIED, die_at=at)
        whole_or_absent(out, whole)
        if code == faulty.DIED:
            deaths += 1
            kept = finished(out, whole)
            spared += len(kept)
            run(export_argv(model, out, 10), notes)
            assert all(path.stat().st_ino == number for path, number in kept.items())
        assert exported(out) == whole and names(out) == names(tmp_path / "whole")
        if code == 0:
            break
    assert deaths >= 70 // stride and spared >= 10  # else no block was complete at any death


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def cut_off(out: Path, at: int = 6, **options: object) -> None:
    """A run of test_training's, stopped at a step, with a checkpoint after each."""
    trainer = tiny_trainer(out, every_step=True, **options)
    e_step = trainer.e_step.take

    def stopping(*batch: Any) -> tuple[float, float]:
        if trainer.step == at:
            raise KeyboardInterrupt
        return e_step(*batch)

    trainer.e_step.take = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def damage(path: Path) -> None:
    """One bit off in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "run"
    tiny_trainer(out, every_step=True).fit()
    return out


def test_with_a_damaged_newest_checkpoint_a_run_goes_on_from_the_end_of_an_epoch(tmp_path: Path, toy_run: Path) -> None:
    out = tmp_path / "run"
    cut_off(out)
    assert load_checkpoint(out).facts["step"] == 6
    damage(out / NEWEST)
    said = rf"{out / NEWEST} can't be used: .*Going on from {out / GOOD} \(step 4\)"
    with pytest.warns(UserWarning, match=said):
        tiny_trainer(out, resume=True).fit()
    assert (out / WEIGHTS).read_bytes() == (toy_run / WEIGHTS).read_bytes()
    assert comparable(out) == comparable(toy_run)
    for name in (NEWEST, GOOD):
        damage(out / name)
    with pytest.raises(TrainingError, match=rf"{NEWEST} can't.*{GOOD} can't.*start over"):
        tiny_trainer(out, resume=True)


# ---- disks -----------------------------------------------------------------------------------------------------------


def full_disks(tmp_path: Path, stride: int, work: Callable[[Path], object]) -> Iterator[tuple[Path, bool]]:
    """Folders in which `work` found the disk full at operation 0, `stride`, 2 `stride`, ..., and whether it failed."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for at in range(0, 10_000, stride):
        out, failed = tmp_path / str(at), False
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in faulty.writing_operations():
                patch.setattr(owner, name, getattr(owner, name))  # to be undone
            done = faulty.die_before(at, full, faulty.writing_operations())
            try:
                work(out)
            except OSError as error:
                failed = True
                assert error.errno == errno.ENOSPC and str(out) in str(error), error
        yield out, failed
        if done() <= at:
            return


@every(13)
def test_training_where_any_operation_on_a_file_may_find_the_disk_full(
    tmp_path: Path, toy_run: Path, stride: int
) -> None:
    def train(out: Path) -> None:
        tiny_trainer(out, resume=has_checkpoint(out)).fit()

    failures = 0
    for out, failed in full_disks(tmp_path, stride, train):
        failures += failed
        assert not list(out.glob(".*tmp"))
        all_whole(out)
        # A failure need not end a run: a folder that can't be synced, or a link in place of which a file is written.
        train(out)
        assert (out / WEIGHTS).read_bytes() == (toy_run / WEIGHTS).read_bytes()
        assert comparable(out) == comparable(toy_run)
    assert failures >= 20 // stride


@every(17)
def test_an_export_where_any_operation_on_a_file_may_find_the_disk_full(
    tmp_path: Path, toy_run: Path, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glem_augment.synthetic.dataset.BLOCK", 4)
    data = SyntheticDataset(GLEM.from_pretrained(toy_run), per_class=10, seed=1)
    whole = exported(data.export(tmp_path / "whole", progress=False))
    failures = 0
    for out, failed in full_disks(tmp_path, stride, partial(data.export, progress=False)):
        failures += failed
        whole_or_absent(out, whole)
        data.export(out, progress=False)
        assert exported(out) == whole and names(out) == names(tmp_path / "whole")
    assert failures >= 49 // stride


@pytest.mark.parametrize("how", ["removed", "renamed"])
@pytest.mark.parametrize("every_step", [True, False])
def test_a_folder_that_vanishes(tmp_path: Path, how: str, every_step: bool) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out, every_step=every_step)
    e_step = trainer.e_step.take

    def vanishing(*batch: Any) -> tuple[float, float]:
        if trainer.step == 6:
            shutil.rmtree(out) if how == "removed" else out.rename(tmp_path / "elsewhere")
        return e_step(*batch)

    trainer.e_step.take = vanishing
    with pytest.raises(FileNotFoundError, match=rf"output folder {out} has vanished"):
        trainer.fit()
    assert not out.exists()  # no half of a run in a new folder
    if how == "renamed":
        assert tiny_trainer(tmp_path / "elsewhere", resume=True).step == (6 if every_step else 4)
