"""Safetensors files, validated in two steps: the header before memory is allocated, then every value."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glem_augment.errors import ModelFileError

_FLOATS = {"F64", "F32", "F16", "BF16"}
_EXACT = {torch.bool: {"BOOL"}, torch.int64: {"I64"}, torch.int32: {"I32"}}
_CHUNK = 2**18  # numbers per check, which bounds the memory
Limits: TypeAlias = tuple[float, float]
_ANY: Limits = (-math.inf, math.inf)


@contextmanager
def open_tensors(path: Path, most_header: int) -> Iterator[Any]:
    """An open safetensors file with a header of at most `most_header` bytes. All errors become ModelFileErrors."""
    try:
        header = header_bytes(path)
        if header > most_header:
            raise ModelFileError(f"{path} has a header of {header} bytes, more than the {most_header} that it can need")
        with safe_open(path, framework="pt") as file:
            yield file
    except ModelFileError:
        raise
    except ValueError as error:  # from the `with` block: the file does not describe its model
        raise ModelFileError(f"{path} can't be read: {error}") from None
    except (SafetensorError, OSError, RuntimeError, LookupError, OverflowError) as error:
        raise ModelFileError(f"{path} can't be read: {error}; it is truncated or no safetensors file") from None


def header_bytes(path: Path) -> int:
    """The length of a safetensors header. ModelFileError: the file is shorter than that."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 10 or header > size - 8:
        raise ModelFileError(f"{path} can't be read: its {size} bytes are truncated, or no safetensors file")
    return header


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
        limits: lowest and highest value of some of them.

    Raises:
        ModelFileError: missing, extra or misshapen tensors; values that are not finite, or outside their limits.
    """
    _check_header(path, file, stored(module.state_dict()))
    for part in module.modules():
        if any(t.is_meta for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            part.to_empty(device="cpu", recurse=False)
    for name, target in stored(module.state_dict()).items():
        _copy_checked(path, name, file.get_tensor(name), target, (limits or {}).get(name, _ANY))


def _check_header(path: Path, file: Any, expected: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and types in an open safetensors file with the `expected` tensors. ModelFileError: unequal.

    Floating-point tensors may be stored in any floating-point type.
    """
    names = set(file.keys())
    missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
    if missing or extra:
        raise ModelFileError(
            f"{path} does not fit its model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unknown {[name[:80] for name in extra[:3]]}"
        )
    for name, wanted in expected.items():
        entry, allowed = file.get_slice(name), _EXACT.get(wanted.dtype, _FLOATS)
        shape, dtype = list(entry.get_shape()), entry.get_dtype()
        if shape != list(wanted.shape) or dtype not in allowed:
            raise ModelFileError(
                f"{path}: {name} is {dtype} {shape}, its model needs {'/'.join(sorted(allowed))} {[*wanted.shape]}"
            )


@torch.no_grad()
def _copy_checked(path: Path, name: str, source: Tensor, target: Tensor, limits: Limits) -> None:
    """Copy `source`, a view of the mapped file, into `target`, and check the values."""
    if source.dtype is torch.bool and bool((source.view(torch.uint8) > 1).any()):
        raise ModelFileError(f"{path}: {name} holds bytes that are neither true nor false")
    target.copy_(source)
    # The target is checked, because a finite float64 may have become an infinite float32.
    for part in target.reshape(-1).split(_CHUNK):
        if not bool(torch.isfinite(part).all()):
            raise ModelFileError(f"{path}: {name} holds values that are not finite")
        if limits != _ANY and not limits[0] <= float(part.min()) <= float(part.max()) <= limits[1]:
            low, high = float(part.min()), float(part.max())
            raise ModelFileError(
                f"{path}: {name} holds values from {low:g} to {high:g}, allowed are {limits[0]:g} to {limits[1]:g}"
            )
