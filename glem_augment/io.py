"""Writing files so that a reader, or a run that was killed, never sees half of one."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

__all__ = ["atomic_write", "expand", "json_text", "save_png", "write_json"]

_HINTS = {
    errno.ENOSPC: "no space left on the disk; free some, or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another folder",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


class _RawFile(io.FileIO):
    """A file that remembers why a write failed: ``torch.save`` hides it behind "unexpected pos"."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for writing so that it appears complete or not at all.

    The content goes to a temporary file in the same folder (a rename is atomic only within one file system),
    is flushed to the disk (``fsync``), and takes the final name with ``os.replace``. On any error in the
    ``with`` block the temporary file is removed, and what stood at ``path`` before is untouched. Missing
    parent folders are made. A file that is replaced hands on its permissions, and a link is replaced itself; a device
    or a pipe (``/dev/stdout``) is written to as it is.

    Args:
        path: the file to write.
        mode: ``"wb"`` (bytes) or ``"w"`` (UTF-8 text).

    Yields:
        The open temporary file.

    Raises:
        ValueError: for another ``mode``.
        IsADirectoryError: ``path`` is a folder.
        OSError: the disk is full, the folder is not writable, ...; the message names ``path`` and ``errno``
            is kept, so a refused permission still arrives as ``PermissionError``.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {path}: it is a folder; give a file name")
    before = _status(path)
    if before is not None and not stat.S_ISREG(before.st_mode):
        with open(path, mode, encoding="utf-8" if mode == "w" else None) as special:
            yield special
        return
    # A random part, so that two processes writing the same file never share a temporary one.
    start = os.fsencode(path.name)[:100].decode("utf-8", "ignore")  # file systems count bytes
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
            os.fsync(file.fileno())
        finally:
            # A full disk can show itself again in the implicit flush; the first error is the one to report.
            with suppress(OSError):
                file.close()
        if before is not None:
            with suppress(OSError):  # some file systems have no permissions
                temporary.chmod(stat.S_IMODE(before.st_mode))
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        failure = raw.failure if raw is not None and isinstance(error, Exception) else None
        named = _named(failure or error, path, temporary)
        if named is None:
            raise
        raise named from error
    _sync_folder(path.parent)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # not there, or to be explained by the attempt to write it
        return None


def expand(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` and ``~user`` as folders. Raises ValueError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(path)}: there is no home folder of that user; for a name that begins with ~, write ./~..."
        ) from None


def _named(error: BaseException, path: Path, temporary: Path) -> OSError | None:
    """An error naming ``path`` where the system refused to write it; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _HINTS:
        return None
    # An error with a file name of its own that is not ours came from something else inside the with block.
    ours = {str(temporary), str(path), *(str(parent) for parent in path.parents)}
    if error.filename is not None and str(error.filename) not in ours:
        return None
    return OSError(error.errno, f"cannot write {path}: {_HINTS[error.errno]}")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be synced (not on Windows)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented UTF-8 JSON with a final newline, atomically.

    Args:
        path: the file to write.
        obj: anything ``json`` carries. Non-finite numbers are refused, since other readers cannot parse them.

    Raises:
        TypeError, ValueError: ``obj`` holds something that JSON cannot carry; nothing is written.
        OSError: see :func:`atomic_write`.
    """
    text = json_text(obj)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def json_text(obj: Any) -> str:
    """``obj`` as indented JSON that can be written as UTF-8: what is not UTF-8 in the names of files is escaped.

    Raises:
        TypeError, ValueError: see ``write_json``.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def save_png(image: Image.Image | np.ndarray | torch.Tensor, path: str | os.PathLike[str]) -> None:
    """Write one image as PNG, atomically.

    Args:
        image: a PIL image; a NumPy uint8 array [H,W], [H,W,1], [H,W,3] or [H,W,4]; or a tensor [H,W], [1,H,W]
            or [3,H,W], uint8 or floating point in [0,1] (clamped and rounded to 8 bits).
        path: the file to write.

    Raises:
        TypeError, ValueError: another type, dtype or shape; nothing is written.
        OSError: see :func:`atomic_write`.
    """
    picture = _to_pil(image)
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def _to_pil(image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float().clamp(0, 1).mul(255).round().to(torch.uint8)
        image = (tensor if tensor.ndim == 2 else tensor.movedim(0, -1)).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a PIL image, a NumPy array or a tensor, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"an image array must be uint8, got {image.dtype}")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[-1] in (3, 4)):
        raise ValueError(f"an image must have 1, 3 or 4 channels, got an array of shape {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image))
