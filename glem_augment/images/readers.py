"""One image: read from a file (an .npy file runs no code), as a tensor, and resized and cropped to a size."""

from __future__ import annotations

import threading
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

from glem_augment.codec.pixel_range import DTYPES
from glem_augment.errors import BadImageError

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
# PIL goes by content rather than by extension, and some of its formats run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
MOST_CHANNELS, _FEW_COLUMNS = 16, 4
_READ_AS = {"float16": "float32", "float64": "float32"}
# NumPy parses headers as Python, and several threads at once make Python's parser count wrong (SystemError in 3.11).
_PARSING = threading.Lock()


def read(file: str | IO[bytes]) -> Image.Image | Tensor:
    """A PIL image, of which only the header is read yet, or the array of an .npy file as a tensor [C,H,W]."""
    if isinstance(file, str) and file.lower().endswith(".npy"):
        return read_array(file)
    return with_its_bits(Image.open(file, formats=_FORMATS))


def with_its_bits(image: Image.Image) -> Image.Image:
    """The image. ValueError: it has more than 8 bits per channel, of which PIL keeps 8."""
    tiles = getattr(image, "tile", []) if image.format in ("PNG", "TIFF") else []  # ";16" of a BMP are bits of a pixel
    if dtype_of(image) == "uint8" and (image.mode == "I" or any(";16" in str(tile[-1]) for tile in tiles)):
        raise ValueError("it has more than 8 bits per channel, which PIL drops: save it as .npy")
    return image


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


def dtype_of(image: Image.Image | Tensor) -> str:
    """The dtype of the values of an image."""
    if isinstance(image, Tensor):
        return str(image.dtype).removeprefix("torch.")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older versions of PIL say I
        return "uint16"
    return "float32" if image.mode == "F" else "uint8"


def shape_of(image: Image.Image | Tensor) -> tuple[int, int, int]:
    """(C, H, W) of an image; C is 3 for all 8-bit PIL images that are not grey."""
    if isinstance(image, Tensor):
        return len(image), image.shape[1], image.shape[2]
    grey = image.mode in ("L", "1", "LA") or dtype_of(image) != "uint8"
    return 1 if grey else 3, image.height, image.width


def to_tensor(image: Image.Image | Tensor, channels: int) -> Tensor:
    """An image as [C,H,W]: 8-bit PIL images as grey (1 channel) or RGB (3), other images as they are.

    Of an animation, the first frame.
    """
    if isinstance(image, Tensor):
        return image
    if (dtype := dtype_of(image)) != "uint8":
        return torch.from_numpy(np.asarray(image).astype(dtype))[None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way to RGB
    mode = "L" if channels == 1 else "RGB"
    return F.pil_to_tensor(image if image.mode == mode else image.convert(mode)).contiguous()


def as_pil(image: Tensor) -> Image.Image | Tensor:
    """uint8 [1,H,W] or [3,H,W] as a PIL image, which can be converted; other images as they are."""
    return F.to_pil_image(image) if image.dtype == torch.uint8 and image.shape[0] in (1, 3) else image


def resize_and_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize an image [C,H,W] so that it just covers height x width, then crop the centre."""
    h, w = pixels.shape[-2:]
    scale = max(height / h, width / w)
    target = [max(height, round(h * scale)), max(width, round(w * scale))]
    if target != [h, w]:
        if pixels.dtype == torch.uint16:  # torchvision truncates it
            pixels = F.resize(pixels.float(), target, antialias=True).round().to(pixels.dtype)
        else:
            pixels = F.resize(pixels, target, antialias=True)
    return F.center_crop(pixels, [height, width])
