"""Image files of .npy and .npz arrays, read without trust: plain numbers of bounded size, never Python objects."""

from __future__ import annotations

import threading
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
MOST_CHANNELS, _MOST_VALUES = 16, 2**25  # of an image: 128 MiB of float32
_READ_AS = {"float16": "float32", "float64": "float32"}
# NumPy parses headers as Python, and several threads at once make Python's parser count wrong (SystemError in 3.11).
_PARSING = threading.Lock()


def read_array(path: str) -> Tensor:
    """The image [C,H,W] in an array file; float16 and float64 become float32.

    BadImageError: another layout or dtype. ValueError, OSError, zipfile.BadZipFile, ...: a damaged file.
    """
    with _opened(path) as file:
        if np.lib.format.read_magic(file) != (1, 0):  # headers of version 1 are shorter than 64 KiB
            raise BadImageError(f"{path} has a header that no image has: save it with numpy.save")
        with _PARSING:
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        read_as = _READ_AS.get(dtype.name, dtype.name)
        if dtype.hasobject or read_as not in DTYPES:
            found = "Python objects, which are never loaded" if dtype.hasobject else dtype.name
            raise BadImageError(f"{path} holds {found}: save it as {', '.join(DTYPES)}")
        shape = (1, *shape) if len(shape) == 2 else shape
        check_layout(shape, path)
        size = int(np.prod(shape)) * dtype.itemsize
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"it ends after {len(data)} of {size} bytes")
    with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite, which is refused later
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(read_as, order="C")
    return torch.from_numpy(array)


def check_layout(shape: tuple[int, ...], where: str) -> None:
    """BadImageError unless `shape` is [C,H,W] with 1 to 16 channels, and not too large."""
    good = len(shape) == 3 and min(shape) > 0
    if good and shape[0] > MOST_CHANNELS >= shape[2]:
        raise BadImageError(
            f"{where} has the shape {list(shape)}, but channels come first, at most {MOST_CHANNELS}: if they are last, "
            "save numpy.moveaxis(x, -1, 0)"
        )
    if not good or shape[0] > MOST_CHANNELS or shape[0] * shape[1] * shape[2] > _MOST_VALUES:
        raise BadImageError(
            f"{where} has the shape {list(shape)[:8]}: an image is [C,H,W] or [H,W], with at most {MOST_CHANNELS} "
            f"channels and {_MOST_VALUES / 1e6:.1f} million values"
        )


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
