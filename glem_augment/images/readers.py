"""Sources of labelled images, each of which opens one image at a time as a tensor.

A source has the labels and opens one image; `dataset` decides on sizes and channels.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from glem_augment.codec.pixel_range import DTYPES, dtype_name
from glem_augment.errors import BadImageError
from glem_augment.images.arrays import EXTENSIONS, check_layout, read_array
from glem_augment.images.matching import check_targets

GREY_MODES = ("L", "1", "LA")
# PIL goes by content rather than by extension, and some of its formats run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
# Pixels of an image that is decoded as it is, and of a JPEG, which is decoded at a quarter of its width and height from
# the first number on. At these limits decoding takes up to 600 MiB; a JPEG needs 6 bytes per pixel at any scale.
MOST_PIXELS, MOST_JPEG_PIXELS, _SMALLER = 2**25, 2**26, 4


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later."""
    return Image.open(file, formats=_FORMATS)


def check_header(image: Image.Image, where: str) -> None:
    """BadImageError for images that must not be decoded: too many pixels, or bits that PIL would drop.

    A JPEG of more than `MOST_PIXELS` is set to be decoded at a smaller size.
    """
    pixels, jpeg = image.width * image.height, isinstance(image, JpegImageFile) and image.mode in ("L", "RGB")
    limit = MOST_JPEG_PIXELS if jpeg else MOST_PIXELS
    if pixels > min(limit, Image.MAX_IMAGE_PIXELS or limit):
        raise BadImageError(
            f"{where} has {image.width} x {image.height} pixels, at most {MOST_PIXELS / 1e6:.1f} million "
            f"({MOST_JPEG_PIXELS / 1e6:.1f} of a JPEG) are decoded: reduce or remove it"
        )
    if pixels > MOST_PIXELS:
        image.draft(image.mode, (image.width // _SMALLER, image.height // _SMALLER))
    tiles = getattr(image, "tile", []) if image.format in ("PNG", "TIFF") else []  # ";16" of a BMP are bits of a pixel
    colour = any(";16" in str(tile[-1]) for tile in tiles) and dtype_of(image) == "uint8"
    if colour or (image.mode == "I" and dtype_of(image) != "uint16"):
        raise BadImageError(
            f"{where} has more than 8 bits per channel, which PIL drops in its mode {image.mode}: save it as .npy, "
            "[C,H,W] of uint16 or float32"
        )


def dtype_of(image: Image.Image) -> str:
    """The dtype of the values of a PIL image."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older versions of PIL say I
        return "uint16"
    return "float32" if image.mode == "F" else "uint8"


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """A PIL image as uint8 [C,H,W], grey (1 channel) or RGB (3). Of an animation, the first frame.

    A grey image of 16 bits or floats keeps its dtype, uint16 or float32.
    """
    if (dtype := dtype_of(image)) != "uint8":
        return torch.from_numpy(np.asarray(image).astype(dtype))[None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way to RGB
    mode = "L" if channels == 1 else "RGB"
    return F.pil_to_tensor(image if image.mode == mode else image.convert(mode)).contiguous()


@dataclass
class Source(Dataset, ABC):
    """Labelled images that can be opened one by one; for the attributes see `ImageData`.

    Item i is (PIL image in mode L or RGB, int), or (tensor [C,H,W], int) for other images. Without class names the
    lists are empty, and numbers become the names.
    """

    name: str
    classes: list[str]
    class_ids: list[str]
    targets: np.ndarray
    threads = 8  # how many may open images at the same time
    # Facts of the same names of an `ImageData`, also of one that is inside.
    repeated = False
    unstated: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        self.named = bool(self.classes)
        self.classes_are_labels = not self.named  # the labels that occur, so that one image can add a class
        self.targets = check_targets(self.targets, len(self.targets), len(self.classes) or None)
        if not self.named:
            self.classes = self.class_ids = [str(i) for i in range(self.targets.max(initial=-1) + 1)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        with self._checked(index) as image:
            if isinstance(image, Image.Image):
                grey, deep = image.mode in GREY_MODES, dtype_of(image) != "uint8"
                image = to_tensor(image, 1) if deep else image.convert("L" if grey else "RGB")
            return image, int(self.targets[index])

    def repeats(self, rows: np.ndarray) -> bool:
        """Whether an image is several times among the images `rows`."""
        return self.repeated or len(np.unique(rows)) < len(rows)

    def where(self, index: int) -> str:
        """The name of image `index` in errors."""
        return f"image {index} of {self.name}"

    @abstractmethod
    def open(self, index: int) -> Image.Image | Tensor:
        """Image `index`: a PIL image with its header read, or a tensor [C,H,W]."""

    def header(self, index: int) -> tuple[int, int, int, str]:
        """(C, H, W) of image `index`, and the name of its dtype. Raises BadImageError."""
        with self._checked(index) as image:
            if isinstance(image, Tensor):
                return len(image), image.shape[1], image.shape[2], dtype_name(image)
            grey = image.mode in GREY_MODES or dtype_of(image) != "uint8"
            return 1 if grey else 3, image.height, image.width, dtype_of(image)

    def pixels(self, index: int, channels: int) -> Tensor:
        """Image `index` as [C,H,W] in its dtype, not resized. Raises BadImageError.

        8-bit grey and RGB images are converted to `channels` channels, other images are not.
        """
        with self._checked(index) as image:
            found = image if isinstance(image, Tensor) else to_tensor(image, channels)
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise BadImageError(f"{self.where(index)} has values that are NaN or infinite: replace them")
        return found

    @contextmanager
    def _checked(self, index: int) -> Iterator[Image.Image | Tensor]:
        """Open image `index`. An error in the `with` block becomes a BadImageError that names the image."""
        where = self.where(index)
        try:
            found = self.open(index)
            if isinstance(found, Tensor):
                check_layout(tuple(found.shape), where)
                yield found
                return
            with found as image:
                check_header(image, where)
                yield image
        except BadImageError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise BadImageError(
                f"{where} cannot be read as an image ({type(error).__name__}: {error}); remove or replace it"
            ) from error


@dataclass
class FolderSource(Source):
    """Image files on disk."""

    paths: Sequence[str]

    def repeats(self, rows: np.ndarray) -> bool:
        """Links to one file are one image, too."""
        paths = [self.paths[row] for row in rows]
        with suppress(OSError):
            return len({(file.st_dev, file.st_ino) for file in map(os.stat, paths)}) < len(paths)
        return len(set(paths)) < len(paths)

    def where(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> Image.Image | Tensor:
        path = self.paths[index]
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for a writer
            raise OSError("it is no regular file")
        return read_array(path) if path.lower().endswith(EXTENSIONS) else open_image(path)


@dataclass
class TensorSource(Source):
    """Images of one shape in memory: [N,C,H,W]."""

    images: Tensor

    def open(self, index: int) -> Image.Image | Tensor:
        return as_pil(self.images[index].clone(memory_format=torch.contiguous_format))


@dataclass
class ItemSource(Source):
    """A data set whose items hold a PIL image, or a tensor [C,H,W], at `key`."""

    items: Any
    key: int | str
    threads = 1  # items may share one file handle

    def open(self, index: int) -> Image.Image | Tensor:
        image = self.items[index][self.key]
        if isinstance(image, Tensor) and dtype_name(image) in DTYPES:
            return as_pil(image)
        if getattr(image, "dtype", None) == np.uint8:
            return F.to_pil_image(image)
        if not isinstance(image, Image.Image):
            found = getattr(image, "dtype", type(image).__name__)
            raise TypeError(
                f"it is {found}, no PIL image or tensor of {', '.join(DTYPES)}: give the data set without its transform"
            )
        return image.copy()  # the caller closes it


@dataclass
class ReaderSource(Source):
    """Images of one of timm's readers; its `ImageDataset` gives the next image in place of one that it can't read."""

    reader: Any

    def where(self, index: int) -> str:
        return str(self.reader.filename(index) or super().where(index))

    def open(self, index: int) -> Image.Image:
        with self.reader[index][0] as file:
            return open_image(io.BytesIO(file.read()))


def as_pil(image: Tensor) -> Image.Image | Tensor:
    """uint8 [1,H,W] or [3,H,W] as a PIL image, which can be converted; other images as they are."""
    return F.to_pil_image(image) if image.dtype == torch.uint8 and image.shape[0] in (1, 3) else image
