from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glem_augment import io as glem_io
from glem_augment.io import atomic_write, expand, save_png, write_json


def test_writes_bytes_and_text_and_makes_folders(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new" / "folder" / "a.bin") as file:
        file.write(b"abc")
    with atomic_write(tmp_path / "b.txt", "w") as file:
        file.write("é")
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"abc"
    assert (tmp_path / "b.txt").read_text("utf-8") == "é"


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError("plain")])
def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_full_disk_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(glem_io.os, "fsync", full)
    with pytest.raises(OSError, match="a.json: no space left") as caught:
        write_json(path, {"a": 2})
    assert caught.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_as_the_system_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_file = glem_io._RawFile
    monkeypatch.setattr(glem_io, "_RawFile", lambda path, mode: raw_file("/dev/full", "w"))
    with pytest.raises(OSError, match="b.bin: no space left"), atomic_write(tmp_path / "b.bin") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(OSError, match="c.pt: no space left"), atomic_write(tmp_path / "c.pt") as file:
        torch.save({"weights": torch.zeros(1 << 18)}, file)
    with pytest.raises(OSError, match="d.txt: no space left"), atomic_write(tmp_path / "d.txt", "w") as file:
        file.write("text")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="folders can't be synced")
def test_the_rename_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if folder else "file", sorted(os.listdir(tmp_path)) == ["a.bin"]))
        real(descriptor)

    monkeypatch.setattr(glem_io.os, "fsync", fsync)
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"abc")
    assert synced == [("file", False), ("folder", True)]  # the file before it has its name, the folder after


def test_permission_error_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: object, target: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(glem_io.os, "replace", refused)
    with pytest.raises(PermissionError, match="a.bin: permission denied"), atomic_write(tmp_path / "a.bin"):
        pass
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_is_not_relabelled(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, atomic_write(tmp_path / "a.bin"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/b.bin")
    assert caught.value.filename == "/elsewhere/b.bin"


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="it is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(ValueError, match="mode must be"), atomic_write(tmp_path / "a", "ab"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file, not a folder"), atomic_write(tmp_path / "file" / "a"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "a.bin"):
        pass
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_json_refuses_what_others_cannot_read(tmp_path: Path) -> None:
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "a.json", {"a": value})
    assert os.listdir(tmp_path) == []


def test_long_names_of_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / ("猫" * 80 + ".json")  # 245 bytes of the 255 that file systems take
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


def test_save_png(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = np.stack([grey, grey + 1, grey + 2], -1)
    for image, expected in [
        (grey, grey),
        (grey[..., None], grey),
        (colour, colour),
        (torch.from_numpy(colour).movedim(-1, 0), colour),
        (torch.from_numpy(grey).float().div(255)[None], grey),
        (Image.fromarray(colour), colour),
    ]:
        save_png(image, tmp_path / "a.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        save_png(np.zeros((3, 4, 2), np.uint8), tmp_path / "b.png")
    with pytest.raises(TypeError, match="must be uint8"):
        save_png(np.zeros((3, 4)), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_what_is_no_file_is_written_to_and_a_file_hands_on_its_permissions(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(pipe, {"a": 1})
        assert os.read(reader, 100) == b'{\n  "a": 1\n}\n' and stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)
    private = tmp_path / "private.json"
    private.write_text("old")
    private.chmod(0o600)
    write_json(private, [])
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["pipe", "private.json"]


def test_homes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x" and expand("a/~") == Path("a/~")
    with pytest.raises(ValueError, match="~nobody-here/x: there is no home folder"):
        expand("~nobody-here/x")
