"""Arrays as images: their layout, and .npy files, which never run code."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from glem_augment.codec.pixel_range import DTYPES
from glem_augment.errors import BadImageError

MOST_CHANNELS, _FEW_COLUMNS = 16, 4
_READ_AS = {"float16": "float32", "float64": "float32"}
# NumPy parses headers as Python, and several threads at once make Python's parser count wrong (SystemError in 3.11).
_PARSING = threading.Lock()


def read_array(path: str) -> Tensor:
    """The image [C,H,W] in an .npy file; [H,W] has one channel, float16 and float64 become float32.

    BadImageError: another layout or dtype. ValueError, OSError, ...: a damaged file, or Python objects.
    """
    with _PARSING:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # only the header is read
    read_as = _READ_AS.get(array.dtype.name, array.dtype.name)
    if read_as not in DTYPES:
        raise BadImageError(f"{path} holds {array.dtype.name}: save it as {', '.join(DTYPES)}")
    array = array[None] if array.ndim == 2 else array
    check_layout(array.shape, path)
    with np.errstate(over="ignore"):  # a float64 that is too large becomes infinite, which is refused later
        return torch.from_numpy(np.array(array, dtype=read_as, order="C"))


def check_layout(shape: tuple[int, ...], where: str) -> None:
    """BadImageError unless `shape` is [C,H,W] with 1 to 16 channels.

    More than 4 channels of at most 4 columns are taken for [H,W,C] and refused, as are more than 16 channels.
    """
    if len(shape) != 3 or min(shape) == 0:
        raise BadImageError(f"{where} has the shape {list(shape)[:8]}: an image is [C,H,W] or [H,W]")
    channels, _, columns = shape
    if channels > MOST_CHANNELS or columns <= _FEW_COLUMNS < channels:
        raise BadImageError(
            f"{where} has the shape {list(shape)}, but an image is [C,H,W] of at most {MOST_CHANNELS} channels: if "
            "they are last, give x.permute(0, 3, 1, 2), or numpy.moveaxis(x, -1, 0) of one array"
        )
