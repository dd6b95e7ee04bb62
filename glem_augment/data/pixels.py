"""One image of a source as a uint8 tensor, and uint8 tensors as the levels of a flow (dequantisation).

A source has the labels and opens one image; `dataset` decides on sizes and channels.
"""

from __future__ import annotations

import io
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from glem_augment.data.classes import check_targets
from glem_augment.devices import send
from glem_augment.distributed import Share
from glem_augment.errors import BadImageError

GREY_MODES = ("L", "1", "LA")
# PIL goes by content rather than by extension, and some of its formats run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which PIL turns RGB into "L"
_LONGEST = 16  # an image is cropped to this many times the needed length before it is resized
_BLOCK = 32  # images per task of the decoding threads
# The constants of SplitMix64, as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_RANGE_TOLERANCE = 1e-3  # resizing with antialias leaves [0, 1] by rounding only

MARGIN = 1.0  # decoded images that leave [0, 1] by more are not plausible
Noise: TypeAlias = torch.Generator | int | Tensor | None  # where dequantisation noise comes from, see `to_levels`


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later."""
    return Image.open(file, formats=_FORMATS)


def check_header(image: Image.Image, where: str) -> None:
    """BadImageError for images that must not be decoded: too many pixels, or over 8 bits, which PIL clips to white."""
    limit = Image.MAX_IMAGE_PIXELS  # PIL only warns, up to twice this limit
    if limit is not None and image.width * image.height > limit:
        raise BadImageError(
            f"{where} has {image.width} x {image.height} pixels, more than PIL's limit of {limit}: it may be there to "
            "fill the memory; reduce or remove it"
        )
    if image.mode in _DEEP_MODES:
        raise BadImageError(f"{where} has more than 8 bits per channel (PIL mode {image.mode}); convert it to 8 bits")


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """A PIL image as uint8 [C,H,W], grey (1 channel) or RGB (3). Of an animation, the first frame."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way to RGB
    return F.pil_to_tensor(image.convert("L" if channels == 1 else "RGB")).contiguous()


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


# ---- sizes and threads --------------------------------------------------------------------------------------------


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [C,H,W] so that it just covers height x width, then crop the centre."""
    h, w = pixels.shape[-2:]
    scale = max(height / h, width / w)
    # Without this crop, resizing an image of 1 x 50 million pixels would take gigabytes.
    h = min(h, math.ceil(_LONGEST * height / scale))
    w = min(w, math.ceil(_LONGEST * width / scale))
    pixels = F.center_crop(pixels, [h, w])
    target = [max(height, round(h * scale)), max(width, round(w * scale))]
    if target != [h, w]:
        pixels = F.resize(pixels, target, antialias=True)
    return F.center_crop(pixels, [height, width])


def usable_cpus() -> int:
    """How many CPUs this process may run on, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_threads(task: Callable[[int], None], count: int, title: str, progress: bool, threads: int = 8) -> None:
    """Run `task(i)` for i < count on up to `threads` threads; the first error, in the order of i, stops the rest.

    PIL and torch release the GIL while they decode. With `progress` a bar appears on stderr after two seconds.
    """

    def block(start: int) -> int:
        stop = min(start + _BLOCK, count)
        for i in range(start, stop):
            task(i)
        return stop - start

    bar = tqdm(total=count, desc=title, unit="img", delay=2, disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(min(threads, usable_cpus())) as pool:
        for done in pool.map(block, range(0, count, _BLOCK)):
            bar.update(done)


# ---- pixels and the flow's levels --------------------------------------------------------------------------------


def check_images(x: Tensor, image_shape: tuple[int, int, int], any_range: bool = False) -> None:
    """TypeError or ValueError unless `x` is a batch of images of `image_shape` (C, H, W).

    The range of float images is not checked with `any_range`, nor on an accelerator, where the host would wait.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a Tensor [B,C,H,W], got {type(x).__name__}")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        c, h, w = image_shape
        raise ValueError(f"images must have shape [B,{c},{h},{w}] for this flow, got {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"images must be uint8, or float in [0,1]; got {x.dtype}")
    if x.is_floating_point() and not any_range and x.device.type == "cpu" and x.numel():
        low, high = value_range(x)
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise ValueError(
                f"float images must lie in [0,1], got values from {low:.4g} to {high:.4g}; pass uint8 images, divide "
                "by 255, or undo the normalisation"
            )


def value_range(x: Tensor) -> tuple[float, float]:
    """The lowest and the highest value of float images. ValueError: a value is not finite."""
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if not math.isfinite(high - low):
        raise ValueError("images must be finite, but some of their values are NaN or infinite")
    return low, high


def to_levels(x: Tensor, bits: int, dtype: torch.dtype, noise: Noise = None) -> Tensor:
    """`(level + u) / 2^bits - 1/2`, the flow's input; float images are scaled to levels unrounded.

    Noise is for images on levels. A float image is on levels if all its pixels are k / 255, or all k / (2^bits - 1),
    for whole k up to rounding. It is then treated as uint8. Any other float image gets no noise, u = 1/2.

    Args:
        x: [B,C,H,W], uint8, of which the top `bits` bits are kept, or float in [0,1].
        noise: the source of u in [0, 1). None: u = 1/2, the middle of the bin. A generator draws u on its device. With
            a seed, u is a function of the seed and the image. A tensor: u, from `draw_noise`.
    """
    is_float = x.dtype != torch.uint8
    levels = x.to(dtype) * (2**bits - 1) if is_float else (x >> (8 - bits)).to(dtype)
    if noise is None:
        u: Tensor | float = 0.5
    elif is_float:
        levels, on_levels = _snapped(levels, x.detach().to(dtype), bits, torch.finfo(x.dtype).eps)
        u = torch.where(on_levels, _dequantisation_noise(levels, noise), 0.5)
    else:
        u = _dequantisation_noise(levels, noise)
    return levels.add_(u).mul_(2.0**-bits).sub_(0.5)


def _snapped(levels: Tensor, x: Tensor, bits: int, eps: float) -> tuple[Tensor, Tensor]:
    """Float `levels`, rounded for images x whose pixels all lie on levels, and a mask of these images, bool [B,1,1,1].

    `eps` is the precision of the images as given. Gradients pass through the rounding.
    """
    on_levels = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for highest in {255, 2**bits - 1}:
        whole = (x * highest).round()
        tolerance = min(8 * max(eps, torch.finfo(x.dtype).eps) * highest, 0.25)
        on = ((x * highest - whole).abs() <= tolerance).flatten(1).all(1)[:, None, None, None]
        wanted = (whole * (2**bits / (highest + 1))).floor()
        levels, on_levels = levels + torch.where(on, wanted - levels.detach(), 0.0), on_levels | on
    return levels, on_levels


def _dequantisation_noise(levels: Tensor, source: torch.Generator | int | Tensor) -> Tensor:
    """Uniform in [0, 1), in the shape of `levels`: multiples of 2^-16, the same for every dtype.

    Float32 holds such multiples exactly up to the highest level of 8 bits, so none rounds up to the next level.
    """
    if isinstance(source, Tensor):
        numbers = source
    elif isinstance(source, torch.Generator):
        numbers = draw_noise(levels, source)
    else:
        numbers = _words_of_images(levels.detach().flatten(1), int(source)).view(torch.int16)
        numbers = numbers[:, : levels.shape[1:].numel()]
    return send(numbers, levels.device).to(levels).mul_(2.0**-16).add_(0.5).reshape(levels.shape)


def draw_noise(x: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """The dequantisation noise of the images x [b,C,H,W], for `encode`: int16 in x's shape.

    x may be one rank's `share` of a batch. The noise of the whole batch is drawn, so an image has the same noise for
    any number of ranks. Drawing four numbers at once takes a sixth of the time of `torch.rand` on a CPU.
    """
    each = x.shape[1:].numel()
    first, last, total = share or (0, len(x), len(x))
    words = torch.empty((total * each + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.int16)[first * each : last * each].reshape(x.shape)


def _words_of_images(levels: Tensor, seed: int) -> Tensor:
    """Pseudo-random int64 [B, ceil(d / 4)], a function of the seed and of each row of `levels` [B, d].

    SplitMix64 (Steele et al., OOPSLA 2014) draws them from a hash of the row, a sum of its levels with random weights.
    Sums of integers are the same on every device and in any order.
    """
    count = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    hashed = (levels.round().to(torch.int64) * _splitmix(count * _GOLDEN + seed)).sum(1, keepdim=True)
    # The seed is added again, since the sum is 0 for a black image.
    return _splitmix(_splitmix(hashed + seed) + count[: (len(count) + 3) // 4] * _GOLDEN)


def _splitmix(x: Tensor) -> Tensor:
    """SplitMix64's mixing of its counter, int64."""
    for shift, factor in _SPLITMIX:
        x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor  # the mask makes the shift a logical one
    return x


def from_levels(h: Tensor, bits: int) -> Tensor:
    """Inverse of `to_levels` for bin middles: float with 0 and 1 at the lowest and highest level."""
    return ((h + 0.5) * 2.0**bits - 0.5) / (2**bits - 1)


def to_unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Images, uint8 or float in [0,1], as floats of `dtype` in [0,1]."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)


def plausible(decoded: Tensor, margin: float) -> Tensor:
    """Which of the images [n, C, H, W] are finite and leave [0, 1] by `margin` at most: bool [n]."""
    low, high = decoded.flatten(1).aminmax(dim=1)
    return (low >= -margin) & (high <= 1.0 + margin)  # NaN compares false


def in_range(x: Tensor) -> Tensor:
    """Decoded images in [0,1]: NaN becomes grey, other values are clamped. Differentiable."""
    return x.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Decoded images, float of any values, as uint8."""
    return in_range(x).mul_(255).round_().to(torch.uint8)
