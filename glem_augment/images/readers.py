"""Sources of labelled images, each of which opens one image at a time as a uint8 tensor.

A source has the labels and opens one image; `dataset` decides on sizes and channels.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from glem_augment.errors import BadImageError
from glem_augment.images.matching import check_targets

GREY_MODES = ("L", "1", "LA")
# PIL goes by content rather than by extension, and some of its formats run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Pixels of an image that is decoded as it is, and of a JPEG, which is decoded at a quarter of its width and height from
# the first number on. At these limits decoding takes up to 600 MiB; a JPEG needs 6 bytes per pixel at any scale.
MOST_PIXELS, MOST_JPEG_PIXELS, _SMALLER = 2**25, 2**26, 4


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later."""
    return Image.open(file, formats=_FORMATS)


def check_header(image: Image.Image, where: str) -> None:
    """BadImageError for images that must not be decoded: too many pixels, or over 8 bits, which PIL clips to white.

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
    if image.mode in _DEEP_MODES:
        raise BadImageError(f"{where} has more than 8 bits per channel (PIL mode {image.mode}); convert it to 8 bits")


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """A PIL image as uint8 [C,H,W], grey (1 channel) or RGB (3). Of an animation, the first frame."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way to RGB
    mode = "L" if channels == 1 else "RGB"
    return F.pil_to_tensor(image if image.mode == mode else image.convert(mode)).contiguous()


@dataclass
class Source(Dataset, ABC):
    """Labelled images that can be opened one by one; for the attributes see `ImageData`.

    Item i is (PIL image in mode L or RGB, int). Without class names the lists are empty, and numbers become the names.
    """

    name: str
    classes: list[str]
    class_ids: list[str]
    targets: np.ndarray
    threads = 8  # how many may open images at the same time

    def __post_init__(self) -> None:
        self.named = bool(self.classes)
        self.targets = check_targets(self.targets, len(self.targets), len(self.classes) or None)
        if not self.named:
            self.classes = self.class_ids = [str(i) for i in range(self.targets.max(initial=-1) + 1)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self._checked(index) as image:
            return image.convert("L" if image.mode in GREY_MODES else "RGB"), int(self.targets[index])

    def where(self, index: int) -> str:
        """The name of image `index` in errors."""
        return f"image {index} of {self.name}"

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image `index` with its header read."""

    def header(self, index: int) -> tuple[bool, int, int]:
        """Whether image `index` is grey, and its height and width. Raises BadImageError."""
        with self._checked(index) as image:
            return image.mode in GREY_MODES, image.height, image.width

    def pixels(self, index: int, channels: int) -> Tensor:
        """Image `index` as uint8 [C,H,W], not resized. Raises BadImageError."""
        with self._checked(index) as image:
            return to_tensor(image, channels)

    @contextmanager
    def _checked(self, index: int) -> Iterator[Image.Image]:
        """Open image `index`. An error in the `with` block becomes a BadImageError that names the image."""
        where = self.where(index)
        try:
            with self.open(index) as image:
                check_header(image, where)
                yield image
        except BadImageError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
            raise BadImageError(
                f"{where} cannot be read as an image ({type(error).__name__}: {error}); remove or replace it"
            ) from error


@dataclass
class FolderSource(Source):
    """Image files on disk."""

    paths: Sequence[str]

    def where(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        path = self.paths[index]
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for a writer
            raise OSError("it is no regular file")
        return open_image(path)


@dataclass
class TensorSource(Source):
    """Images of one shape in memory: uint8 [N,C,H,W]."""

    images: Tensor

    def open(self, index: int) -> Image.Image:
        return F.to_pil_image(self.images[index])

    def header(self, index: int) -> tuple[bool, int, int]:
        return self.images.shape[1] == 1, self.images.shape[2], self.images.shape[3]

    def pixels(self, index: int, channels: int) -> Tensor:
        if self.images.shape[1] != channels:
            return super().pixels(index, channels)
        return self.images[index].clone(memory_format=torch.contiguous_format)  # PIL images have 1 or 3 channels


@dataclass
class ItemSource(Source):
    """A data set whose items hold a PIL image, or a uint8 tensor [C,H,W], at `key`."""

    items: Any
    key: int | str
    threads = 1  # items may share one file handle

    def open(self, index: int) -> Image.Image:
        image = self.items[index][self.key]
        if getattr(image, "dtype", None) in (torch.uint8, np.uint8):
            return F.to_pil_image(image)
        if not isinstance(image, Image.Image):
            found = getattr(image, "dtype", type(image).__name__)
            raise TypeError(f"it is {found}, no PIL image or uint8 tensor: give the data set without its transform")
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
