"""One file that holds tensors and JSON together: safetensors, with the JSON in its metadata and a digest over both.

Nothing in such a file is ever executed: safetensors holds plain numbers. The digest finds damage (a bad disk, a copy
that was cut short); it is no signature, so whoever reads a file of unknown origin has to check what it says.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

_KEY = "glem-augment-state"
VERSION = 2


class DamagedFileError(ValueError):
    """The bytes are not a state file of this version, or not the ones that were written."""


def to_bytes(facts: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Serialise a state.

    Args:
        facts: anything that JSON can carry; NaN and infinity are refused.
        tensors: of any dtype and device, none sharing memory with another.

    Raises:
        ValueError, TypeError: ``facts`` holds what JSON can't carry.
    """
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # The facts as text inside the JSON, so that the digest is over exactly what is read back. One entry, since
    # safetensors writes several in random order, and equal states should be equal files.
    record = json.dumps({"version": VERSION, "sha256": _digest(text, plain), "facts": text})
    return safetensors_save(plain, metadata={_KEY: record})


def from_bytes(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors (on the CPU) that ``to_bytes`` was given.

    Tensors can't be larger than the file that holds them, so the memory that this takes is bounded by ``len(data)``.

    Raises:
        DamagedFileError: truncated, changed, foreign, of another version, or with numbers that are not finite.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise DamagedFileError("it is truncated, or no safetensors file")
        record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        if record["version"] != VERSION:
            raise DamagedFileError(f"it is of format {record['version']!r}, this version reads {VERSION}")
        text, digest = record["facts"], record["sha256"]
        tensors = safetensors_load(data)
        if _digest(text, tensors) != digest:
            raise DamagedFileError("its contents do not match its checksum")
        facts = json.loads(text)
    except (DamagedFileError, MemoryError):
        raise
    except Exception as error:  # safetensors, json and torch each have their own for bytes that make no sense
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedFileError(f"it is no file of this kind ({first[:200]})") from None
    if not isinstance(facts, dict):
        raise DamagedFileError("its facts are no table")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DamagedFileError(f"{name} holds values that are not finite")
    return facts, tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the JSON, and over the name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
