"""Files, written atomically or validated on load.

A safetensors file is validated in two steps: the header before memory is allocated, then every value.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glem_augment.errors import ModelFileError

__all__ = ["atomic_write", "finite", "json_text", "save_png", "write_json"]  # for applications

# Temporary files of `atomic_write`, which a killed process leaves behind.
LEFT_OVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_EXACT = {torch.bool: {"BOOL"}, torch.int64: {"I64"}, torch.int32: {"I32"}}
_CHUNK = 2**18  # numbers per check, which bounds the memory
Limits: TypeAlias = tuple[float, float]
# Larger weights overflow in products, and the results are not finite.
_WEIGHTS: Limits = (-1e9, 1e9)


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "wb", sync: bool = True) -> Iterator[IO[Any]]:
    """Open `path` for writing so that it appears complete or not at all. Text (`mode="w"`) is UTF-8.

    The content goes to a temporary file in the same folder, because a rename is atomic only within one file system. It
    is flushed to the disk with `fsync`, unless `sync` is False, and renamed. On any error in the `with` block the
    temporary file is removed, and the old file at `path` stays. Missing parent folders are made. Permissions of a
    replaced file are kept. A link is replaced, not its target. A device or a pipe (`/dev/null`) is written directly.

    Raises:
        OSError, PermissionError, ...: the disk is full, the folder is not writable, ...; the message names `path`.
    """
    path = Path(path)
    text: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    if path.exists() and not path.is_file():
        with open(path, mode, **text) as device:
            yield device
        return
    # The random part keeps two processes that write the same file apart. File systems limit the length of names.
    temporary = path.parent / f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        with suppress(OSError):  # a new file, or a file system without permissions
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # System errors name the temporary file, or none.
        if isinstance(error, OSError) and error.errno and str(error.filename or temporary) == str(temporary):
            error.filename = str(path)
        raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it, in little memory."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # can't be mapped
            return hashlib.sha256().hexdigest()
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def remove_left_overs(found: Iterable[Path]) -> None:
    """Remove the unfinished files that killed processes left, among `found`; each may be as large as a checkpoint."""
    for path in found:
        if LEFT_OVER.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


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


# ---- paths ---------------------------------------------------------------------------------------------------------


def expand(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` and `~user` replaced by home folders."""
    return Path(os.path.expanduser(path))


# ---- weights ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file. All errors become ModelFileErrors."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except ModelFileError:
        raise
    except (SafetensorError, OSError, RuntimeError, LookupError, OverflowError, ValueError) as error:
        raise ModelFileError(f"{path} can't be read: {error}; it is truncated or no safetensors file") from None


def load_weights(
    path: Path,
    file: Any,
    module: nn.Module,
    stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    limits: Mapping[str, Limits] | None = None,
) -> None:
    """Fill `module` on the CPU from an open safetensors file (see `open_tensors`).

    Args:
        module: its tensors on the meta device get memory once the header fits; the rest keep their values' memory.
        stored: the tensors of a state dict that the file holds, by their names there.
        limits: lowest and highest value of some of them; -1e9 to 1e9 of the rest.

    Raises:
        ModelFileError: missing, extra or misshapen tensors; values that are not finite, or outside their limits.
    """
    expected, names = stored(module.state_dict()), set(file.keys())
    if wrong := sorted(names ^ set(expected)):
        raise ModelFileError(f"{path} does not fit its model: {len(wrong)} tensors are missing or unknown {wrong[:3]}")
    for name, wanted in expected.items():
        entry, allowed = file.get_slice(name), _EXACT.get(wanted.dtype, _FLOATS)
        shape, dtype = list(entry.get_shape()), entry.get_dtype()
        if shape != list(wanted.shape) or dtype not in allowed:
            raise ModelFileError(f"{path}: {name} is {dtype} {shape}, its model needs {wanted.dtype} {[*wanted.shape]}")
    for part in module.modules():
        if any(t.is_meta for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            part.to_empty(device="cpu", recurse=False)
    for name, target in stored(module.state_dict()).items():
        _copy_checked(path, name, file.get_tensor(name), target, (limits or {}).get(name, _WEIGHTS))


@torch.no_grad()
def _copy_checked(path: Path, name: str, source: Tensor, target: Tensor, limits: Limits) -> None:
    """Copy `source`, a view of the mapped file, into `target`, and check the values."""
    target.copy_(source)
    # The target is checked, because a finite float64 may have become an infinite float32.
    for part in target.reshape(-1).split(_CHUNK) if target.numel() else ():
        low, high = float(part.min()), float(part.max())  # both NaN if one value is
        if not (limits[0] <= low <= high <= limits[1] and math.isfinite(high)):
            raise ModelFileError(
                f"{path}: {name} holds values from {low:g} to {high:g}, allowed are finite ones from {limits[0]:g} to "
                f"{limits[1]:g}"
            )
