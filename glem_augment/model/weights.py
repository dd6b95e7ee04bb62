"""Reading ``model.safetensors`` with suspicion: the header is judged before anything is built, and a file never makes
the reader take more memory than twice its own size (and a few MiB of Python objects).

The order matters. A config is a few hundred bytes and can describe a model of any size; the weights are honest about
theirs, since the bytes have to be there. So the sizes that the config implies are compared with the size of the file,
then with its header, and only then is memory taken.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glem_augment.errors import ModelFileError
from glem_augment.latent.densities import Parametrisation

if TYPE_CHECKING:
    from glem_augment.model.config import GLEMConfig
    from glem_augment.model.glem import GLEM

__all__ = ["check_round_trip", "check_weights", "load_model"]

_FLOATS = {"F64", "F32", "F16", "BF16"}
_EXACT = {torch.bool: "BOOL", torch.int64: "I64"}
# The shortest entry of a header is `"a":{"dtype":"F16","shape":[],"data_offsets":[0,2]}`.
_LEAST_ENTRY = 50
# Beside its name an entry has a type, up to eight sizes and two offsets; the rest is for the metadata.
_MOST_ENTRY, _MOST_METADATA = 320, 2**16
_LEAST_WIDTH = 2  # bytes of a floating-point number
_PART = 2**18  # numbers looked at together: what that takes beside the model is a few MiB
# Of the images that `check_round_trip` sends through the flow.
_CHECKED, _SEED, _LEAST_SHARE = 8, 0, 0.99


def load_model(path: Path, config: GLEMConfig, build: Callable[[GLEMConfig], GLEM]) -> GLEM:
    """The model that ``config`` describes, with the weights in ``path``.

    Args:
        path: a safetensors file. Any floating-point type is taken for a floating-point tensor.
        config: checked already.
        build: makes the model, on the device of the surrounding ``torch.device``.

    Returns:
        A model on the CPU.

    Raises:
        ModelFileError: a truncated or foreign file; missing, extra or misshapen tensors; values that are not finite;
            variances that are not positive.
    """
    _check_size(path, config)
    with torch.device("meta"):
        try:
            model = build(config)
        except (RuntimeError, OverflowError) as error:  # sizes beyond what a tensor can have
            raise ModelFileError(f"the config beside {path} describes no model that can be built: {error}") from None
    expected = model.state_dict()
    try:
        with _opened(path, expected) as file:
            # Nothing but these tensors has memory: a second model, made to be overwritten, would double it.
            model.to_empty(device="cpu")
            with torch.no_grad():
                for name, target in model.state_dict().items():
                    _copy(path, name, file.get_tensor(name), target)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    _check_values(path, model)
    return model


def check_weights(path: Path, expected: dict[str, Tensor]) -> None:
    """Refuse a file that `load_model` would refuse for its names, shapes, types or values that are not finite."""
    try:
        with _opened(path, expected) as file:
            for name in expected:
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise _not_finite(path, name)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


# ---- before anything is built ------------------------------------------------------------------------------------


def _check_size(path: Path, config: GLEMConfig) -> None:
    """Lower bounds that need no model: what the config announces has to be in the file."""
    try:
        size = os.stat(path).st_size
        header = _header_length(path, size)
    except OSError as error:
        raise _unreadable(path, error) from None
    classes, dim, rank = len(config.class_ids), math.prod(config.image_shape), config.modes_rank
    numbers = 2 * classes * dim + (0 if rank is None else (classes + 1) * rank * dim)
    tensors = 2 + sum(d * b for d, b in zip(config.flow.get("depth", ()), config.flow.get("blocks", ()), strict=True))
    if size < _LEAST_WIDTH * numbers or header < _LEAST_ENTRY * tensors:
        raise ModelFileError(
            f"{path} has {size} bytes, of which {header} describe tensors; its config asks for more than {numbers} "
            f"numbers in {tensors} tensors: the two files do not belong together, or one of them is damaged"
        )


def _header_length(path: Path, size: int) -> int:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise ModelFileError(f"{path} can't be read: its {size} bytes are truncated, or no safetensors file")
    return length


def _opened(path: Path, expected: dict[str, Tensor]) -> safe_open:
    """The file, after its header has been found to be that of ``expected`` (name -> a tensor of that shape and kind,
    on any device).

    Raises:
        ModelFileError, SafetensorError, OSError.
    """
    size = os.stat(path).st_size
    most = _MOST_METADATA + sum(len(json.dumps(name)) + _MOST_ENTRY for name in expected)
    header = _header_length(path, size)
    if header > most:
        raise ModelFileError(f"{path} has a header of {header} bytes; {most} are more than its config can need")
    file = safe_open(path, framework="pt")
    _check_header(path, file, expected)
    return file


def _check_header(path: Path, file: safe_open, expected: dict[str, Tensor]) -> None:
    names = set(file.keys())
    missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
    if missing or extra:
        raise ModelFileError(
            f"{path} does not fit its config: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unknown {[name[:80] for name in extra[:3]]}"
        )
    for name, wanted in expected.items():
        header = file.get_slice(name)
        if tuple(header.get_shape()) != tuple(wanted.shape):
            raise ModelFileError(
                f"{path}: {name} has shape {tuple(header.get_shape())}, its config asks for {tuple(wanted.shape)}"
            )
        allowed = _FLOATS if wanted.is_floating_point() else {_EXACT[wanted.dtype]}
        if header.get_dtype() not in allowed:
            raise ModelFileError(
                f"{path}: {name} is of type {header.get_dtype()}, expected {' or '.join(sorted(allowed))}"
            )


# ---- values ------------------------------------------------------------------------------------------------------


def _copy(path: Path, name: str, source: Tensor, target: Tensor) -> None:
    """``source`` is a view of the mapped file: the only memory is the target's."""
    if source.dtype is torch.bool and bool((source.view(torch.uint8) > 1).any()):
        raise ModelFileError(f"{path}: {name} holds bytes that are neither true nor false")
    target.copy_(source)
    # Not of the source: what was a finite float64 may have become an infinite float32.
    if target.is_floating_point() and not all(bool(torch.isfinite(part).all()) for part in _parts(target)):
        raise _not_finite(path, name)


def _check_values(path: Path, model: GLEM) -> None:
    """What has to be positive is: a Gaussian with another variance has no density."""
    gaussians, modes = model.gaussians, model.modes
    with torch.no_grad():
        for s in _parts(gaussians.s):
            variance = Parametrisation(gaussians.psi).variance(s)
            # In float32 a tiny variance has an infinite inverse, which is what densities use.
            if not bool(((variance > 0) & torch.isfinite(variance) & torch.isfinite(1 / variance)).all()):
                raise ModelFileError(f"{path}: gaussians.s gives variances that are not positive and finite")
        if modes is None:
            return
        for name in ("scales", "rest", "counts", "shared_scales"):
            values = getattr(modes, name, None)
            if isinstance(values, Tensor) and any(bool((part < 0).any()) for part in _parts(values)):
                raise ModelFileError(f"{path}: modes.{name} holds values below zero")


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.detach().reshape(-1).split(_PART))


def check_round_trip(model: GLEM, path: Path) -> None:
    """Send a few images through the flow and back: weights can be finite, and still too large to be inverted.

    The images are smooth (noise of 4x4 pixels, enlarged), plain, and of the flow's own Gaussians, from a fixed seed.

    Raises:
        ModelFileError: where more than a hundredth of the pixels come back wrong by half a step of 1/255 or more.
    """
    c, h, w = model.image_shape
    generator = torch.Generator().manual_seed(_SEED)
    coarse = torch.rand(_CHECKED, c, min(4, h), min(4, w), generator=generator)
    smooth = nn.functional.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)
    levels = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, c, h, w)
    images = torch.cat([smooth, levels]).mul(255).round().to(torch.uint8)
    with torch.no_grad():
        y = torch.arange(min(_CHECKED, model.num_classes))
        drawn = model.decode(model.gaussians.sample(y, 0.5, generator))
        images = torch.cat([images, torch.nan_to_num(drawn).mul(255).round().to(torch.uint8).cpu()])
        report = model.check_invertibility(images)
    if report["within_half_step"] < _LEAST_SHARE:
        raise ModelFileError(
            f"{path}: the flow can't be inverted: {1 - report['within_half_step']:.1%} of the pixels of {len(images)} "
            f"test images come back wrong ({report['non_finite']:.1%} not finite); its weights are damaged, or it "
            "diverged in training"
        )


def _not_finite(path: Path, name: str) -> ModelFileError:
    return ModelFileError(f"{path}: {name} holds values that are not finite")


def _unreadable(path: Path, error: Exception) -> ModelFileError:
    if isinstance(error, ModelFileError):
        return error
    return ModelFileError(f"{path} can't be read: {error}; it is truncated or no safetensors file")
