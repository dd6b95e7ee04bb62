"""Decoding: from image files to uint8 tensors of one shape, and the threads that do it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from glem_augment.errors import BadImageError

GREY_MODES = ("L", "1", "LA")
# PIL goes by content rather than by extension, and some of its formats run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_LONGEST = 16  # how many times longer than needed an image may be when it is resized
_BLOCK = 32  # images per task of the decoding threads


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Open an image and read its header; the pixels are decoded when they are needed."""
    return Image.open(file, formats=_FORMATS)


def check_header(image: Image.Image, where: str) -> None:
    """Refuse images that must not be decoded: too many pixels, or more than 8 bits, which PIL would clip to white.

    Raises:
        BadImageError: naming `where`.
    """
    limit = Image.MAX_IMAGE_PIXELS  # PIL itself only warns, up to twice as many
    if limit is not None and image.width * image.height > limit:
        raise BadImageError(
            f"{where} has {image.width} x {image.height} pixels, more than PIL's limit of {limit}: it may be there to "
            "fill the memory; reduce or remove it"
        )
    if image.mode in _DEEP_MODES:
        raise BadImageError(f"{where} has more than 8 bits per channel (PIL mode {image.mode}); convert it to 8 bits")


def to_tensor(image: Image.Image, channels: int) -> torch.Tensor:
    """A PIL image as uint8 [C,H,W], grey (1 channel) or RGB (3). Of an animation, the first frame."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way to RGB
    return F.pil_to_tensor(image.convert("L" if channels == 1 else "RGB")).contiguous()


def fit(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [C,H,W] so that it just covers height x width, then crop the centre."""
    h, w = pixels.shape[-2:]
    scale = max(height / h, width / w)
    # Resized as a whole, an image of 1 x 50 million pixels would take gigabytes for what is cropped afterwards.
    h = min(h, math.ceil(_LONGEST * height / scale))
    w = min(w, math.ceil(_LONGEST * width / scale))
    pixels = F.center_crop(pixels, [h, w])
    target = [max(height, round(h * scale)), max(width, round(w * scale))]
    if target != [h, w]:
        pixels = F.resize(pixels, target, antialias=True)
    return F.center_crop(pixels, [height, width])


def usable_cpus() -> int:
    """How many CPUs this process may run on; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_threads(task: Callable[[int], None], count: int, title: str, progress: bool) -> None:
    """Run `task(i)` for i < count on a few threads, because PIL and torch release the GIL while they decode.

    The first error, in the order of i, is raised and stops the rest. With `progress` a bar appears on stderr after two
    seconds.
    """

    def block(start: int) -> int:
        stop = min(start + _BLOCK, count)
        for i in range(start, stop):
            task(i)
        return stop - start

    bar = tqdm(total=count, desc=title, unit="img", delay=2, disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        for done in pool.map(block, range(0, count, _BLOCK)):
            bar.update(done)
