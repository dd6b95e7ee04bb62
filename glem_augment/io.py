"""Files and folders of this machine: atomic writing, digests, locks."""

from __future__ import annotations

import errno
import hashlib
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

__all__ = ["atomic_write", "finite", "json_text", "save_png", "write_json"]  # for applications

# `atomic_write` rewrites these system errors, because they name a temporary file, or none.
_REFUSED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "wb", sync: bool = True) -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears complete or not at all. Text (`mode="w"`) is UTF-8.

    The content goes to a temporary file in the same folder, because a rename is atomic only within one file system. It
    is flushed to the disk with `fsync`, unless `sync` is False, and renamed. On any error in the `with` block the
    temporary file is removed, and the old file at `path` stays. Missing parent folders are made. Permissions of a
    replaced file are kept. A link is replaced, not its target. A device or a pipe (`/dev/stdout`) is written directly.

    Raises:
        OSError, PermissionError, ...: the disk is full, the folder is not writable, ...; the message names `path`.
    """
    path = Path(path)
    text: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    try:
        before = path.stat()
    except OSError:  # no such file; any other reason shows when the file is written
        before = None
    if before is not None and not stat.S_ISREG(before.st_mode):
        with open(path, mode, **text) as special:
            yield special
        return
    # The random part keeps two processes that write the same file apart. File systems count bytes, not characters.
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    temporary = path.parent / f".{start}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, mode.replace("w", "x"), **text)
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):  # closing flushes again, and may fail again: the first error is the one to report
                file.close()
        if before is not None:
            with suppress(OSError):  # some file systems have no permissions
                temporary.chmod(stat.S_IMODE(before.st_mode))
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # The `with` block may also raise errors about other files.
        ours = {str(temporary), str(path), *map(str, path.parents)}
        if isinstance(error, OSError) and error.errno in _REFUSED and str(error.filename or path) in ours:
            blocked = error.errno in (errno.ENOTDIR, errno.EEXIST)
            reason = "a part of it is a file, not a folder" if blocked else os.strerror(error.errno).lower()
            raise OSError(error.errno, f"cannot write {path}: {reason}; choose another folder") from error
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
    """SHA-256 of a file, as `sha256sum` prints it, in little memory."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # can't be mapped
            return hashlib.sha256().hexdigest()
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `json_text(obj)` atomically, with a final newline."""
    with atomic_write(path, "w") as file:
        file.write(json_text(obj) + "\n")


def json_text(obj: Any) -> str:
    """`obj` as indented JSON; file names that are not UTF-8 are escaped. TypeError, ValueError: no JSON, or NaN."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def finite(obj: Any) -> Any:
    """`obj` as JSON can hold it, with None in place of every NaN and infinity."""
    return json.loads(json.dumps(obj), parse_constant=lambda name: None)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PIL image as PNG, atomically."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


# ---- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, which is made if missing, against other processes and threads. BlockingIOError: it is locked.

    The system releases the lock of a killed process. A folder that is empty at the end is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path, timeout=0, is_singleton=True)
    nested = lock.is_locked  # this thread holds the lock already
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"another process is at work in {folder}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        if not nested:
            with suppress(OSError):
                path.unlink()
                folder.rmdir()  # succeeds only if the folder is empty
        lock.release()


def expand(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~user` replaced by home folders; ValueError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(path)}: that user has no home folder; write ./~... for a name that begins with ~"
        ) from None
