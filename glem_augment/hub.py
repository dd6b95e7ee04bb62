"""Model folders: ``model.safetensors`` + ``config.json``, written atomically and read with suspicion."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from glem_augment.config import GLEMConfig
from glem_augment.errors import ModelFileError
from glem_augment.io import atomic_write

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_MAX_CONFIG_BYTES = 16 * 2**20
_FLOATS = {"F64", "F32", "F16", "BF16"}
_EXACT = {torch.bool: "BOOL", torch.int64: "I64"}


def bundled_models() -> list[str]:
    """Names of the flows shipped inside the package, as used after ``bundled:``."""
    root = resources.files("glem_augment") / "bundled" / "models"
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []


def locate(name: str | Path) -> Path:
    """The folder of a model: ``bundled:<name>``, or a folder on disk.

    Raises:
        ModelFileError: no such bundled model or folder, or a file missing in it; the message says what is there.
    """
    text = str(name)
    if text.startswith("bundled:"):
        wanted = text.removeprefix("bundled:")
        if wanted not in bundled_models():
            raise ModelFileError(f"no bundled model {wanted!r}; bundled are: {', '.join(bundled_models()) or 'none'}")
        folder = Path(str(resources.files("glem_augment") / "bundled" / "models" / wanted))
    else:
        folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ModelFileError(
            f"no model at {text!r}: give a folder with {WEIGHTS} and {CONFIG}, or bundled:"
            f"{'|'.join(bundled_models()) or 'NAME'}"
        )
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise ModelFileError(f"{folder} is not a model folder: it has no {file}")
    return folder


def write_model(folder: str | Path, config: GLEMConfig, state: dict[str, Tensor]) -> None:
    """Write both files, each to a temporary name first, weights before the config that announces them.

    Both are on the disk in full before either takes its name, so that a save that fails leaves the old pair whole.
    """
    folder = Path(folder)
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    failure: OSError | None = None
    try:
        with atomic_write(folder / CONFIG, "w") as config_file:
            config_file.write(text)
            config_file.flush()
            os.fsync(config_file.fileno())
            try:
                with atomic_write(folder / WEIGHTS) as file:
                    # One entry: safetensors writes several in random order, and equal weights should be equal files.
                    file.write(safetensors_bytes(tensors, metadata={"format": "pt"}))
            except OSError as error:
                failure = error
                raise
    except OSError as error:
        raise failure or error from None  # the outer one would name the config


def read_config(folder: Path) -> GLEMConfig:
    """Read and check ``config.json``. Raises ModelFileError naming the file and the field."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelFileError(f"{path} has {path.stat().st_size} bytes, more than a model's config can need")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} can't be read as JSON: {error}; download or save the model again") from None
    try:
        return GLEMConfig.from_dict(values)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def read_weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read ``model.safetensors``, accepting exactly the tensors in ``expected`` (name -> a tensor of that shape
    and kind, on the meta device). Any floating-point type is taken for a floating-point tensor.

    Names, shapes and types are compared with the file's header before any tensor is loaded, so a file that does not
    belong to its config costs no memory. Safetensors holds no code.

    Raises:
        ModelFileError: truncated or foreign file; missing, extra or misshapen tensors; non-finite weights.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
            if missing or extra:
                raise ModelFileError(
                    f"{path} does not fit its config: {len(missing)} tensors missing {missing[:3]}, "
                    f"{len(extra)} unknown {extra[:3]}"
                )
            for name, wanted in expected.items():
                header = file.get_slice(name)
                if tuple(header.get_shape()) != tuple(wanted.shape):
                    raise ModelFileError(
                        f"{path}: {name} has shape {tuple(header.get_shape())}, its config asks for "
                        f"{tuple(wanted.shape)}"
                    )
                allowed = _FLOATS if wanted.is_floating_point() else {_EXACT[wanted.dtype]}
                if header.get_dtype() not in allowed:
                    raise ModelFileError(
                        f"{path}: {name} is of type {header.get_dtype()}, expected {' or '.join(sorted(allowed))}"
                    )
            state = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} can't be read: {error}; it is truncated or no safetensors file") from None
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{path}: {name} holds values that are not finite")
    return state
