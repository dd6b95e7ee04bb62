"""Atomic writing of files, and locks of folders."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout
from PIL import Image

_HINTS = {
    errno.ENOSPC: "no space left on the disk; free some, or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
}


# ---- writing ---------------------------------------------------------------------------------------------------------


class _RawFile(io.FileIO):
    """A file that keeps the error of a failed write, because `torch.save` raises "unexpected pos" instead."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "wb", sync: bool = True) -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears complete or not at all.

    The content goes to a temporary file in the same folder, because a rename is atomic only within one file system. It
    is flushed to the disk with `fsync`, unless `sync` is False, and renamed. On any error in the `with` block the
    temporary file is removed, and the old file at `path` stays. Missing parent folders are made. Permissions of a
    replaced file are kept. A link is replaced, not its target. A device or a pipe (`/dev/stdout`) is written to
    directly. Text (`mode="w"`) is UTF-8.

    Raises:
        OSError: the disk is full, the folder is not writable, ...; the message names `path`, and `errno` is kept, so a
            refused permission still arrives as `PermissionError`.
    """
    path = Path(path)
    try:
        before = path.stat()
    except OSError:  # no such file; any other reason shows when the file is written
        before = None
    if before is not None and not stat.S_ISREG(before.st_mode):
        with open(path, mode, encoding="utf-8" if mode == "w" else None) as special:
            yield special
        return
    # The random part keeps two processes that write the same file apart. File systems count bytes, not characters.
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    temporary = path.parent / f".{start}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    raw: _RawFile | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _RawFile(temporary, "x")
        buffer = io.BufferedWriter(raw)
        file = buffer if mode == "wb" else io.TextIOWrapper(buffer, encoding="utf-8", newline="\n")
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        finally:
            # The implicit flush may fail again; the first error is the one to report.
            with suppress(OSError):
                file.close()
        if before is not None:
            with suppress(OSError):  # some file systems have no permissions
                temporary.chmod(stat.S_IMODE(before.st_mode))
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        failure = (raw.failure if raw is not None and isinstance(error, Exception) else None) or error
        if isinstance(failure, OSError) and failure.errno in _HINTS:
            # The `with` block may also raise errors about other files.
            ours = {str(temporary), str(path), *map(str, path.parents)}
            if failure.filename is None or str(failure.filename) in ours:
                raise OSError(failure.errno, f"cannot write {path}: {_HINTS[failure.errno]}") from error
        raise
    if not sync:
        return
    with suppress(OSError):  # makes the rename itself durable; Windows cannot sync folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it, in little memory. ValueError: an empty file."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON with a final newline, atomically; errors as in `json_text`, `atomic_write`."""
    text = json_text(obj)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def json_text(obj: Any) -> str:
    """`obj` as indented JSON that can be written as UTF-8; file names that are not UTF-8 are escaped.

    Raises:
        TypeError, ValueError: `obj` holds something that JSON cannot carry, for example a number that is not finite.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PIL image as PNG, atomically."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


# ---- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path, again: bool = False) -> Iterator[None]:
    """Lock a folder, which is made if it is missing, against other processes and other calls.

    The system releases the lock of a killed process. A folder that is empty at the end is removed.

    Args:
        again: allow a lock that this thread holds already.

    Raises:
        BlockingIOError: the folder is locked. OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path, timeout=0, is_singleton=True)
    outer = lock.is_locked
    try:
        if outer and not again:
            raise Timeout(str(path))
        with lock:
            try:
                yield
            finally:
                if not outer:
                    with suppress(OSError):
                        path.unlink()
                        folder.rmdir()  # succeeds only if the folder is empty
    except Timeout:
        raise BlockingIOError(
            f"another process is at work in {folder}: wait for it, or choose another folder"
        ) from None


def expand(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~user` replaced by home folders; ValueError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(path)}: that user has no home folder; write ./~... for a name that begins with ~"
        ) from None
