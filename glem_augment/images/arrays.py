"""Image files of .npy and .npz arrays, read without trust: plain numbers of known size, never Python objects."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
from torch import Tensor

from glem_augment.codec.pixel_range import DTYPES
from glem_augment.errors import BadImageError

EXTENSIONS = (".npy", ".npz")
MOST_CHANNELS = 16
_MOST_VALUES = 2**25  # of an image: 128 MiB of float32
_READ_AS = {"float16": "float32", "float64": "float32"}


def is_array(path: str) -> bool:
    """Whether a path is one of an array."""
    return path.lower().endswith(EXTENSIONS)


def array_header(path: str) -> tuple[tuple[int, int, int], str]:
    """(C, H, W) of an array file, and the dtype of `read_array`. Errors as there, or of a damaged file."""
    with _opened(path) as file:
        shape, _, dtype = _header(file, path)
    return shape, _READ_AS.get(dtype.name, dtype.name)


def read_array(path: str) -> Tensor:
    """The image [C,H,W] in an array file, float16 and float64 as float32.

    BadImageError: another layout or dtype, or NaN. ValueError, OSError, zipfile.BadZipFile, ...: a damaged file.
    """
    with _opened(path) as file:
        shape, fortran, dtype = _header(file, path)
        size = int(np.prod(shape)) * dtype.itemsize
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"it ends after {len(data)} of {size} bytes")
    read_as = _READ_AS.get(dtype.name, dtype.name)
    with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(read_as, order="C")
    check_values(torch.from_numpy(array), path)
    return torch.from_numpy(array)


def check_values(image: Tensor, where: str) -> None:
    """BadImageError unless `image` is [C,H,W] with 1 to 16 channels, a known dtype and finite numbers."""
    _check_layout(tuple(image.shape), where)
    if image.is_floating_point() and not bool(image.isfinite().all()):
        raise BadImageError(f"{where} has values that are NaN or infinite: replace them")


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The stream of an .npy file, or of the only array of an .npz file."""
    if not path.lower().endswith(".npz"):
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise BadImageError(f"{path} holds {len(names)} arrays: give each image a file with one array")
        with archive.open(names[0]) as file:
            yield file


def _header(file: IO[bytes], path: str) -> tuple[tuple[int, int, int], bool, np.dtype]:
    """Shape, whether it is in Fortran's order, and dtype. Nothing else has been read, and no object is ever made."""
    if np.lib.format.read_magic(file) != (1, 0):  # its headers are shorter than 64 KiB
        raise BadImageError(f"{path} has a header of an array that is no image: save it with numpy.save")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise BadImageError(f"{path} holds Python objects, which are never loaded: save an array of numbers")
    if _READ_AS.get(dtype.name, dtype.name) not in DTYPES:
        raise BadImageError(f"{path} holds {ascii(dtype.name)[:40]}: save it as {', '.join(DTYPES)}")
    return _check_layout((1, *shape) if len(shape) == 2 else shape, path), fortran, dtype


def _check_layout(shape: tuple[int, ...], where: str) -> tuple[int, int, int]:
    good = len(shape) == 3 and min(shape) > 0
    if good and shape[0] > MOST_CHANNELS >= shape[2]:
        raise BadImageError(
            f"{where} has the shape {list(shape)}, but channels come first: save numpy.moveaxis(x, -1, 0)"
        )
    if not good or shape[0] > MOST_CHANNELS or shape[0] * shape[1] * shape[2] > _MOST_VALUES:
        raise BadImageError(
            f"{where} has the shape {list(shape)[:8]}: an image is [C,H,W] or [H,W], with at most {MOST_CHANNELS} "
            f"channels and {_MOST_VALUES / 1e6:.1f} million values"
        )
    return shape[0], shape[1], shape[2]
