"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from glem_augment import io as glem_io
from glem_augment.io import atomic_write, expand, json_text, write_json

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX files")


def test_files_and_their_folders_appear_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    for content, before in ((b"old", None), (b"new", b"old")):
        with atomic_write(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    with atomic_write(tmp_path / "b.txt", "w") as file:
        file.write("é\n")
    assert (tmp_path / "b.txt").read_bytes() == "é\n".encode()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("plain")])
def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_as_the_system_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object, mode: str, **text: Any) -> Any:
        return open("/dev/full", mode.replace("x", "w"), **text)

    monkeypatch.setattr(glem_io, "open", full, raising=False)
    for name, mode, write in (
        ("b.bin", "wb", lambda file: file.write(bytes(1 << 20))),
        ("d.txt", "w", lambda file: file.write("text")),
    ):
        with pytest.raises(OSError, match=name), atomic_write(tmp_path / name, mode) as file:
            write(file)
    assert os.listdir(tmp_path) == []


def test_the_file_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[list[str]] = []
    monkeypatch.setattr(glem_io.os, "fsync", lambda descriptor: synced.append(os.listdir(tmp_path)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"abc")
    assert len(synced) == 1 and "a.bin" not in synced[0] and os.listdir(tmp_path) == ["a.bin"]


def test_errors_about_other_files_are_not_relabelled_and_bad_targets_are_named(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, atomic_write(tmp_path / "a.bin"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/b.bin")
    assert caught.value.filename == "/elsewhere/b.bin"
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "a"):
        with pytest.raises(OSError, match=str(tmp_path)), atomic_write(path):
            pass


@posix
def test_permissions_follow_the_umask_or_the_old_file(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "new.json"
    plain.write_bytes(b"")
    write_json(path, [])
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o600)
    write_json(path, [1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {"a": 1})
    assert os.read(reader, 100) == b'{\n  "a": 1\n}\n' and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)


def test_json_refuses_what_others_cannot_read(tmp_path: Path) -> None:
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "a.json", {"a": value})
    assert os.listdir(tmp_path) == []
    assert json_text("é\udcff") == '"é\\udcff"'  # a file name that is not UTF-8
    write_json(tmp_path / ("猫" * 80 + ".json"), [1])  # 245 bytes of the 255 that file systems take


def test_homes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x" and expand("a/~") == Path("a/~")
