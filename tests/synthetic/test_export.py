"""Exports in shards: the manifest, running one again, and runs that were killed."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from glem_augment import GLEM, ImageData, SyntheticDataset
from glem_augment.model.weights import WEIGHTS
from glem_augment.synthetic import export as _export
from glem_augment.synthetic.manifest import JOURNAL
from glem_augment.synthetic.provenance import PROVENANCE, REAL_IMAGES, class_folders, settings_of
from glem_augment.synthetic.stream import SyntheticStream

NAMES = ["Bag", "T-shirt/top", "Ankle boot"]

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(seed: int = 0) -> GLEM:
    torch.manual_seed(seed)
    model = GLEM.create("mef_tiny", (1, 8, 8), NAMES, depth=[1, 1], blocks=[1, 1], width=[4, 4])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def make(model: GLEM | None = None, **options: Any) -> SyntheticDataset:
    return SyntheticDataset(model or make_model(), **{"per_class": 10, "block": 4, "seed": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    """Everything in the folder, hidden files as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counting(data: SyntheticDataset, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The blocks that are decoded from now on."""
    decoded, real = [], data.decoded_block

    def decode(cls: int, number: int) -> torch.Tensor:
        decoded.append((cls, number))
        return real(cls, number)

    monkeypatch.setattr(data, "decoded_block", decode)
    return decoded


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    folder = make(model).export(tmp_path / "out", progress=False)
    manifest = json.loads((folder / PROVENANCE).read_text())
    assert manifest["complete"] is True and manifest["count"] == 30 and manifest["settings"]["seed"] == 1
    weights = (tmp_path / "model" / WEIGHTS).read_bytes()
    assert manifest["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    shards = manifest["shards"]
    expected = [
        (name, first, min(4, 10 - first)) for name in ("Bag", "T-shirt_top", "Ankle boot") for first in (0, 4, 8)
    ]
    assert [(s["folder"], s["first"], s["count"]) for s in shards] == expected
    for shard in shards:
        numbers = range(shard["first"], shard["first"] + shard["count"])
        data = b"".join((folder / shard["folder"] / f"{i:06d}.png").read_bytes() for i in numbers)
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    assert len(files(folder)) == 31  # and nothing else, the journal least of all


def test_running_it_again_checks_and_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    whole = files(folder)

    def again(expected: list[tuple[int, int]], **options: Any) -> None:
        data = make()
        decoded = counting(data, monkeypatch)
        data.export(folder, progress=False, **options)
        assert decoded == expected and files(folder) == whole

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again([])
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}  # not a byte was written

    (folder / "Bag" / "000005.png").unlink()
    path = folder / "T-shirt_top" / "000009.png"
    path.write_bytes(path.read_bytes()[:-20])
    path = folder / "Ankle boot" / "000000.png"
    path.write_bytes(path.read_bytes()[:-20] + bytes([path.read_bytes()[-20] ^ 1]) + path.read_bytes()[-19:])
    again([(0, 1), (1, 2), (2, 0)])
    # Two images of a class in each other's place are damage too.
    first, second = (folder / "Bag" / f"00000{i}.png" for i in (0, 1))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    again([(0, 0)], overwrite=True)
    for path in (folder / "Bag").iterdir():
        path.unlink()
    (folder / "Bag").rmdir()
    again([(0, 0), (0, 1), (0, 2)])


def test_other_settings_are_never_mixed(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    before = files(folder)
    for options, words in (
        ({"seed": 2}, r"seed 1 \(not 2\)"),
        ({"temperature": 0.5}, r"temperature 0.8 \(not 0.5\)"),
        ({"block": 5}, r"block 4 \(not 5\)"),
        ({"per_class": 11}, r"count 30 \(not 33\)"),
        ({"model": make_model(1)}, "weights"),
    ):
        with pytest.raises(FileExistsError, match=f"other images.*{words}.*overwrite=True"):
            make(**options).export(folder, progress=False)
        assert files(folder) == before
    manifest = folder / PROVENANCE
    manifest.write_text(manifest.read_text().replace('"generator": "glem-augment ', '"generator": "glem-augment 0.'))
    with pytest.raises(FileExistsError, match=r"generator glem-augment 0\.\S+ \(not glem-augment"):
        make().export(folder, progress=False)
    # Only asked for, and then nothing of the other is left.
    fresh = files(make(per_class=5, seed=2).export(tmp_path / "fresh", progress=False))
    assert files(make(per_class=5, seed=2).export(folder, progress=False, overwrite=True)) == fresh
    # The record of the training makes no image.
    model = make_model()
    model.config.training = {"note": "the same weights"}
    make(model, per_class=5, seed=2).export(folder, progress=False)
    manifest = json.loads((folder / PROVENANCE).read_text())
    assert manifest["model"]["training"] == model.config.training and len(manifest["shards"]) == 6


@pytest.mark.parametrize(
    "name", ["Bag/20240101.png", "Bag/000010.png", "Bag/0000001.png", "Bag/notes.txt", "notes.txt"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_removed(tmp_path: Path, name: str, overwrite: bool) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    (folder / name).write_bytes(b"mine")
    before = files(folder)
    for options in [{}, {"per_class": 5}, {"per_class": 20}]:  # the last would have an image 10
        other = "" if overwrite or not options else "other images"
        with pytest.raises(FileExistsError, match=other or f"{folder} holds '{name}'.*move it away"):
            make(**options).export(folder, progress=False, overwrite=overwrite)
        assert files(folder) == before


def test_a_folder_that_no_export_has_written_is_not_overwritten(tmp_path: Path) -> None:
    """It has the name of a class, for which the earlier export had no image."""
    folder = make(per_class=[3, 0, 3]).export(tmp_path / "out", progress=False)
    (folder / "T-shirt_top").mkdir()
    (folder / "T-shirt_top" / "000000.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds 'T-shirt_top/000000.png'"):
        make(per_class=3).export(folder, progress=False, overwrite=True)
    assert (folder / "T-shirt_top" / "000000.png").read_bytes() == b"mine"


@pytest.mark.parametrize("point", ["left over", "journal", "manifest", "images"])
def test_a_smaller_export_cut_off_while_it_overwrites(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that is, it is known afterwards whose the images of the larger one are, and none of them is left."""
    fresh = files(make(per_class=[5, 0, 5], seed=2).export(tmp_path / "fresh", progress=False))
    folder = make().export(tmp_path / "out", progress=False)
    data = make(per_class=[5, 0, 5], seed=2)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    unlink, unlinked = Path.unlink, []

    def cut_third(path: Path, **options: Any) -> None:
        if len(unlinked) == 2:
            cut()
        unlinked.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        owner, name = {
            "left over": (Path, "unlink"),
            "journal": (_export.Journal, "start"),
            "manifest": (_export, "write_json"),
            "images": (data, "decoded_block"),
        }[point]
        patch.setattr(owner, name, cut_third if point == "left over" else cut)
        with pytest.raises(KeyboardInterrupt):
            data.export(folder, progress=False, overwrite=True)
    (folder / "Bag" / ".000007.png.123-0123abcd.tmp").write_bytes(b"half")
    make(per_class=[5, 0, 5], seed=2).export(folder, progress=False, overwrite=point != "images")
    assert files(folder) == fresh and not (folder / "T-shirt_top").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:100],
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
        lambda text: json.dumps({**json.loads(text), "shards": 5, "complete": True}),
        lambda text: json.dumps({**json.loads(text), "shards": [1, {"folder": "../../x"}, None], "complete": "yes"}),
        lambda text: text.replace('"first": 4', '"first": "4"'),
        lambda text: text.replace('"folder": "Bag"', '"folder": ["Bag"]').replace('"count": 4', '"count": -4'),
        lambda text: text.replace('"settings"', '"settings_"'),
    ],
)
def test_damaged_manifests(tmp_path: Path, change: Callable[[str], str]) -> None:
    """Never believed, never a crash: either the shards it does not vouch for are written again, or it is refused."""
    folder = make().export(tmp_path / "out", progress=False)
    whole = files(folder)
    path = folder / PROVENANCE
    path.write_text(change(path.read_text()))
    try:
        make().export(folder, progress=False)
    except FileExistsError as error:
        assert "overwrite" in str(error)
        make().export(folder, progress=False, overwrite=True)
    assert files(folder) == whole


def _slowly(data: SyntheticDataset, folder: Path) -> None:
    """In a process of its own; a block takes long enough that a kill comes in the middle."""
    os.setpgrp()
    real = data.decoded_block

    def decode(cls: int, number: int) -> torch.Tensor:
        time.sleep(0.03)
        return real(cls, number)

    data.decoded_block = decode  # type: ignore[method-assign]
    data.export(folder, progress=False)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_run_again(tmp_path: Path, stop: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files(make().export(tmp_path / "whole", progress=False))
    folder = tmp_path / "out"
    for pngs in (1, 13):
        process = multiprocessing.get_context("fork").Process(target=_slowly, args=(make(), folder))
        process.start()
        deadline = time.monotonic() + 60
        while len(list(folder.rglob("0*.png"))) < pngs and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, stop)
        process.join(30)
        assert process.exitcode == -stop
        there = {name: data for name, data in files(folder).items() if not Path(name).name.startswith(".")}
        assert json.loads(there.pop(PROVENANCE))["complete"] is False
        assert all(data == whole[name] for name, data in there.items())  # whole or absent
    # What a kill can leave in the worst of moments.
    (folder / "Bag" / ".000007.png.123-0123abcd.tmp").write_bytes(b"half")
    (folder / f".{PROVENANCE}.123-0123abcd.tmp").write_bytes(b"{")
    journal = (folder / JOURNAL).read_bytes()
    assert journal.count(b"\n") >= 2
    (folder / JOURNAL).write_bytes(journal + b'{"folder": "Ankle bo')
    data = make()
    decoded = counting(data, monkeypatch)
    data.export(folder, progress=False)
    assert files(folder) == whole
    assert 0 < len(decoded) <= 9 - (journal.count(b"\n") - 1)  # no shard that was finished is decoded again


def test_killed_before_the_first_word(tmp_path: Path) -> None:
    """The folder and the journal are there, the manifest is not yet."""
    folder = tmp_path / "out"
    whole = files(make().export(folder, progress=False))
    for path in folder.rglob("*.png"):
        path.unlink()
    for path in list(folder.iterdir()):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / JOURNAL).write_bytes(b'{"export": "')
    (folder / f".{PROVENANCE}.7-0123abcd.tmp").write_bytes(b"{")
    make().export(folder, progress=False)
    assert files(folder) == whole


def test_images_that_are_not_finite_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.gaussians.mu[1] = 3e38
    folder = make(model).export(tmp_path / "out", progress=False)
    manifest = json.loads((folder / PROVENANCE).read_text())
    assert manifest["images_not_finite"] == 10
    (folder / "Bag" / "000005.png").unlink()
    data = make(model)
    data.images(range(12))  # some of it has been looked at before
    data.export(folder, progress=False)
    assert json.loads((folder / PROVENANCE).read_text()) == manifest


@pytest.mark.parametrize("format", ["imagefolder", "webdataset"])
def test_both_formats_state_the_licence(tmp_path: Path, format: str) -> None:  # noqa: A002
    for name, licence in (("a", None), ("b", "mit")):
        folder = make().export(tmp_path / name, format, progress=False, license=licence)
        found = json.loads((folder / PROVENANCE).read_text())
        assert found["synthetic"] is True and found["license"] == (licence or found["license"])
        assert licence or found["license"].startswith("not stated")
        assert (folder / "data").is_dir() == (format == "webdataset")
    with pytest.raises(FileExistsError, match="overwrite"):
        make(per_class=2).export(tmp_path / "a", format, progress=False)


def test_a_repaired_export_keeps_the_licence_that_was_stated(tmp_path: Path) -> None:
    folder, before = make().export(tmp_path, progress=False, license="mit"), "mit"
    for licence in (None, "cc0-1.0", None):
        (folder / "Bag" / "000003.png").unlink()
        make().export(folder, progress=False, license=licence)
        stated = json.loads((folder / PROVENANCE).read_text())["license"]
        assert stated == (licence or before)
        before = stated


def test_a_journal_that_the_disk_cuts_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("glem_augment.synthetic.manifest.os.write", lambda file, data: write(file, data[:-1]))
    with pytest.raises(OSError, match=f"cannot write .*{JOURNAL}: the disk is full"):
        make().export(tmp_path, progress=False)
    monkeypatch.undo()
    make().export(tmp_path, progress=False)
    assert files(tmp_path) == files(make().export(tmp_path / "fresh", progress=False))


def test_shards_that_could_not_take_the_folders_place_are_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted folder, such as a container's volume, can't be renamed."""
    data, folder = make(), tmp_path / "volume"
    folder.mkdir()
    monkeypatch.setattr(data, "images", None)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == folder)
    with pytest.raises(OSError, match="volume is a mount point.*say in it"):
        data.export(folder, "webdataset", progress=False)
    monkeypatch.undo()
    data.export(folder / "in", "webdataset", progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["in"]


def test_numpys_numbers_can_be_written_down(tmp_path: Path) -> None:
    model = make_model()
    real = ImageData.from_tensors(torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 2, NAMES)
    model.fit_modes(real, rank=1)
    options: dict[str, Any] = {"min_confidence": np.float32(0.1), "max_attempts": np.int64(2), "modes": np.int64(1)}
    data = make(model, per_class=np.int64(2), source="mixup", real=real, **options)
    for format in ("imagefolder", "webdataset"):  # noqa: A001
        folder = data.export(tmp_path / format, format, progress=False)
        assert json.loads((folder / PROVENANCE).read_text())["settings"]["max_attempts"] == 2
    SyntheticStream(model, length=np.int64(5))


def test_the_card_tells_mixtures_of_real_images_from_draws(tmp_path: Path) -> None:
    model = make_model()
    x, y = torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 2
    real = ImageData.from_tensors(x, y, NAMES, name="somewhere/photos")
    model.fit_modes(real, rank=1)
    drawn, mixed = make(model, min_confidence=0.1), make(model, source="mixup", real=real, oracle=None, per_class=2)
    cards = []
    for name, data in (("a", drawn), ("b", mixed)):
        folder = data.export(tmp_path / name, "webdataset", progress=False)
        cards.append((folder / "README.md").read_text())
        code = next(line for line in cards[-1].splitlines() if line.startswith("SyntheticDataset(model"))
        again = eval(code, {"SyntheticDataset": SyntheticDataset, "model": model, "real": real})
        assert torch.equal(again.images(range(len(data))), data.images(range(len(data))))
    assert "None is a photograph" in cards[0] and "temperature" in cards[0]
    assert "None is a photograph" not in cards[1] and "temperature" not in cards[1]
    assert "each is a real image, moved" in cards[1] and "| photos |" in cards[1]
    note = json.loads((tmp_path / "b" / PROVENANCE).read_text())["license"]
    assert "and of the real images that were mixed" in note
    # The hash is of the images, not of latents, whose last bits are the machine's.
    same = make(model, source="mixup", real=ImageData.from_tensors(x, y, NAMES), per_class=2)
    other = make(model, source="mixup", real=ImageData.from_tensors(255 - x, y, NAMES), per_class=2)
    hashes = [settings_of(data)[REAL_IMAGES] for data in (mixed, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_shards_take_the_place_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    make().export(tmp_path / "link", "webdataset", progress=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "big" / "README.md").is_file()


def test_shards_are_what_tarfile_would_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images at a time, so that shards are appended to; the bytes are those of an archive made in one go."""
    whole = files(make().export(tmp_path / "a", "webdataset", progress=False))
    monkeypatch.setattr("glem_augment.synthetic.publish._BLOCK", 7)
    monkeypatch.setattr("glem_augment.synthetic.publish.SMALL_SHARD", 10)
    make().export(tmp_path / "b", "webdataset", progress=False)
    names = sorted((tmp_path / "b" / "data").glob("*.tar"))
    assert len(names) == 3
    found: dict[str, bytes] = {}
    for name in names:
        with tarfile.open(name) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
    with tarfile.open(tmp_path / "a" / "data" / "train-00000-of-00001.tar") as archive:
        assert found == {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in sorted(found, key=lambda name: (name[:8], name[-3:] != "png")):
            entry = tarfile.TarInfo(name)
            entry.size = len(found[name])
            archive.addfile(entry, io.BytesIO(found[name]))
    assert made.getvalue().rstrip(b"\0") == whole["data/train-00000-of-00001.tar"].rstrip(b"\0")


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)
    data = make()
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=4096))
    for format in ("imagefolder", "webdataset"):  # noqa: A001
        with pytest.raises(OSError, match=f"{tmp_path}.* has 0 MiB free, the export of 30 images"):
            data.export(tmp_path / format, format, progress=False)
    monkeypatch.undo()
    folder = data.export(tmp_path / "again", progress=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=4096))
    make(seed=2).export(folder, progress=False, overwrite=True)  # what is written over gives its space back


@pytest.mark.parametrize(
    "name", ["notes.txt", "data/val-00000.tar", "data/train-00007-of-00009.tar", "data/more/a.txt"]
)
def test_shards_are_not_written_over_files_of_others(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make().export(tmp_path / "out", "webdataset", progress=False)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"mine")
    before, data = files(folder), make(seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(data, "images", None)  # refused before any work
        with pytest.raises(FileExistsError, match=f"{folder} holds '{name[:9]}.*move it away"):
            data.export(folder, "webdataset", progress=False, overwrite=True)
    assert files(folder) == before
    (folder / name).unlink()
    if name.startswith("data/more"):
        (folder / "data" / "more").rmdir()
    # Put there while the images are made: the user's file counts more than the work.
    images = data.images

    def meanwhile(indices: Any) -> torch.Tensor:
        (folder / "late.txt").write_bytes(b"mine")
        return images(indices)

    with monkeypatch.context() as patch:
        patch.setattr(data, "images", meanwhile)
        with pytest.raises(FileExistsError, match="late.txt"):
            data.export(folder, "webdataset", progress=False, overwrite=True)
    assert (folder / "late.txt").read_bytes() == b"mine" and list(tmp_path.iterdir()) == [folder]
    (folder / "late.txt").unlink()
    data.export(folder, "webdataset", progress=False, overwrite=True)
    assert files(folder) == files(make(seed=2).export(tmp_path / "fresh" / "out", "webdataset", progress=False))


def test_a_card_that_was_edited_is_not_written_over(tmp_path: Path) -> None:
    """Its last line is there for that."""
    folder = make().export(tmp_path / "out", "webdataset", progress=False)
    (folder / "README.md").write_text("# My own card\n")
    with pytest.raises(FileExistsError, match="README.md"):
        make(seed=2).export(folder, "webdataset", progress=False, overwrite=True)
    assert (folder / "README.md").read_text() == "# My own card\n"


def _stuck(data: SyntheticDataset, folder: Path, begun: Any) -> None:
    """In a process of its own: an export that never comes to its end."""

    def images(_: Any) -> torch.Tensor:
        begun.set()
        threading.Event().wait()
        raise AssertionError

    data.images = images  # type: ignore[method-assign]
    data.export(folder, "webdataset", progress=False)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_what_a_killed_export_of_shards_leaves_goes_with_the_next(tmp_path: Path) -> None:
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "out"
    (tmp_path / ".out.backup_1").mkdir()  # somebody else's, for all that anybody knows
    others = {folder, tmp_path / ".out.backup_1"}
    begun = fork.Event()
    process = fork.Process(target=_stuck, args=(make(), folder, begun))
    process.start()
    assert begun.wait(60)
    (place,) = set(tmp_path.iterdir()) - others
    make().export(folder, "webdataset", progress=False)
    assert place.is_dir()  # somebody is still at work there
    process.kill()
    process.join(30)
    assert set(tmp_path.iterdir()) - others == {place}
    make().export(tmp_path / "another", "webdataset", progress=False)
    assert place.is_dir()  # of an export to another folder
    make(seed=2).export(folder, "webdataset", progress=False, overwrite=True)
    assert set(tmp_path.iterdir()) == {*others, tmp_path / "another"}
    assert not any(name.startswith(".") for name in files(folder))


def test_an_export_of_shards_killed_between_its_two_moves(tmp_path: Path) -> None:
    """The earlier one is whole and comes back."""
    folder = make().export(tmp_path / "out", "webdataset", progress=False)
    before, place = files(folder), tmp_path / ".out.0123abcd"
    (place / "new").mkdir(parents=True)
    (place / ".glem-lock").touch()
    folder.rename(place / "old")
    with pytest.raises(FileExistsError, match="not empty"):
        make(seed=2).export(folder, "webdataset", progress=False)
    assert files(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_large_exports_have_shards_for_several_workers(tmp_path: Path) -> None:
    folder = make(per_class=50).export(tmp_path / "out", "webdataset", progress=False)
    assert len(list((folder / "data").glob("*.tar"))) == 5  # 150 images, 30 each


def test_a_class_of_no_images_has_no_folder(tmp_path: Path) -> None:
    """torchvision refuses empty class folders; those of an earlier, larger export go too."""
    for counts in ([2, 3, 0], [0, 3, 0], [0, 3, 1]):
        data = make(per_class=counts)
        folder = data.export(tmp_path / "out", overwrite=True)
        found, folders = ImageFolder(folder), class_folders(data.class_ids, data.classes)
        assert sorted(found.classes[y] for y in found.targets) == sorted(folders[y] for y in data.targets)
        assert data.export(folder) == folder  # nothing is missing


def test_another_judge_is_another_export(tmp_path: Path) -> None:
    """A lambda has a name but no identity: what it calls may have been trained since."""

    def judged(rule: Callable[[torch.Tensor], torch.Tensor]) -> SyntheticDataset:
        return make(
            per_class=4, min_confidence=0.5, max_attempts=2,
            oracle=lambda x: torch.nn.functional.one_hot(rule(x).long(), 3).float(),
        )  # fmt: skip

    first = judged(lambda x: x.mean((1, 2, 3)) < 0.5)
    first.export(tmp_path / "out", progress=False)
    before = files(tmp_path / "out")
    first.export(tmp_path / "out", progress=False)  # the same one goes on
    assert files(tmp_path / "out") == before
    with pytest.raises(FileExistsError, match="other images"):
        judged(lambda x: x.mean((1, 2, 3)) > 0.5).export(tmp_path / "out", progress=False)
