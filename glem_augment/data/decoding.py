"""From image files to uint8 tensors of one shape: headers, decoding, resizing, and the threads that do it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from glem_augment.data.sources import Source
from glem_augment.errors import BadImageError

__all__ = [
    "FORMATS",
    "fit",
    "geometry",
    "in_threads",
    "probe",
    "read_image",
    "ready_pixels",
    "to_tensor",
    "usable_cpus",
]

GREY_MODES = ("L", "1", "LA")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_DEEP_RAW = (";16B", ";16L", ";16N")
# What the extensions that are looked for stand for, and GIF, which likes to hide behind them. PIL goes by content, and
# knows formats that run other programs (EPS) or that nobody has looked at for years.
FORMATS = frozenset({"JPEG", "MPO", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP"})
_LONGEST = 16  # times what is kept: how much of a very long image is resized before the centre is cut out
_PROBES = 64  # images spread over the set whose headers are read besides the first of each class
_BLOCK = 32  # images per task of the decoding threads


def read_image(source: Source, index: int, channels: int) -> Image.Image:
    """Decode image ``index`` in mode L (``channels`` 1) or RGB (3). Of an animation, the first frame.

    Raises:
        BadImageError: the file is missing, empty, truncated, no image, larger than Pillow's limit, or holds more than 8
            bits per channel.
    """
    try:
        with source.open(index) as image:
            _check(image, source.where(index))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # PIL cannot go from here to RGB directly without a warning
            return image.convert("L" if channels == 1 else "RGB")
    except BadImageError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
        raise _unreadable(source, index, error) from error


def _check(image: Image.Image, where: str) -> None:
    """Refuse, from the header alone, what must not be decoded.

    16- and 32-bit images: PIL would clip them to white, or cut off the lower half of their bits, instead of scaling
    them.

    Raises:
        BadImageError: naming ``where``.
    """
    if image.format is not None and image.format not in FORMATS:
        raise BadImageError(
            f"{where} holds {image.format}, not one of {', '.join(sorted(FORMATS))}; convert or remove it"
        )
    limit = Image.MAX_IMAGE_PIXELS
    # PIL refuses twice as much, and only warns before.
    if limit is not None and image.width * image.height > limit:
        raise BadImageError(
            f"{where} has {image.width} x {image.height} pixels, more than PIL's limit of {limit}: it may be there to "
            "fill the memory; reduce or remove it"
        )
    raw = _raw_mode(image)
    if image.mode in DEEP_MODES or raw.endswith(_DEEP_RAW):
        raise BadImageError(
            f"{where} has more than 8 bits per channel (PIL mode {raw or image.mode}); convert it to 8 bits"
        )


def _raw_mode(image: Image.Image) -> str:
    """How the file holds the pixels, in PIL's words, such as RGB;16B, which PIL cuts down to RGB; empty if not said."""
    tiles = getattr(image, "tile", None)
    how = tiles[0][3] if tiles and len(tiles[0]) > 3 else ""
    how = how[0] if isinstance(how, tuple) and how else how
    return how if isinstance(how, str) else ""


def _unreadable(source: Source, index: int, error: Exception) -> BadImageError:
    """The error for an image that PIL cannot read."""
    where = source.where(index)
    if os.path.isfile(where) and os.path.getsize(where) == 0:
        return BadImageError(f"{where} is an empty file; remove or replace it")
    said = str(error).replace(f": {where!r}", "").replace(f" {where!r}", "")
    return BadImageError(f"{where} cannot be read as an image ({type(error).__name__}: {said}); remove or replace it")


def probe(source: Source, index: int) -> tuple[str, tuple[int, int]]:
    """Mode and (H,W) of image ``index``, from its header."""
    try:
        with source.open(index) as image:
            _check(image, source.where(index))
            return image.mode, (image.height, image.width)
    except BadImageError:
        raise
    except Exception as error:
        raise _unreadable(source, index, error) from error


def geometry(
    source: Source, size: tuple[int, int] | None, channels: int | None, skip_bad: bool = False
) -> tuple[tuple[int, int, int], str | None]:
    """The shape (C,H,W) to give all images, and the two images that disagree, if any do.

    Raises:
        BadImageError: one of the images looked at can't be read; with ``skip_bad``, none of them can.
    """
    if source.arrays is not None:
        grey, found, mixed = source.arrays.ndim == 3, tuple(source.arrays.shape[1:3]), None
    else:
        # The first image of each class, where sets glued together from several sources differ, and some more.
        first = np.unique(source.targets, return_index=True)[1]
        spread = np.linspace(0, len(source) - 1, min(_PROBES, len(source))).astype(np.int64)
        seen = _probed(source, [int(i) for i in np.union1d(first, spread)], skip_bad)
        grey, found = all(mode in GREY_MODES for _, mode, _ in seen), seen[0][2]
        other = next((entry for entry in seen if entry[2] != found), None)
        mixed = None
        if other is not None and size is None:
            where, there = source.where(seen[0][0]), source.where(other[0])
            mixed = f"{where} is {found[0]}x{found[1]}, {there} is {other[2][0]}x{other[2][1]}"
    height, width = size or found
    return ((1 if grey else 3) if channels is None else channels, int(height), int(width)), mixed


def _probed(source: Source, indices: list[int], skip_bad: bool) -> list[tuple[int, str, tuple[int, int]]]:
    """Index, mode and (H,W) of images; without those that can't be read, if any can."""
    seen, failure = [], None
    for index in indices:
        try:
            if skip_bad:  # the size of an image that is cut off is nobody's
                read_image(source, index, 1)
            seen.append((index, *probe(source, index)))
        except BadImageError as error:
            if not skip_bad:
                raise
            failure = failure or error
    if not seen:
        assert failure is not None
        raise BadImageError(f"none of the {len(indices)} images looked at can be used: {failure}")
    return seen


def ready_pixels(source: Source, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """The arrays of a source as [N,C,H,W], where they need neither resizing nor conversion."""
    arrays = source.arrays
    if arrays is None or tuple(arrays.shape[1:3]) != shape[1:]:
        return None
    if arrays.ndim == 3 and shape[0] == 1:
        # Copies, here and below: idx arrays are read-only views of the bytes of their file.
        return torch.from_numpy(np.array(arrays[:, None]))
    if arrays.ndim == 4 and shape[0] == 3:
        return torch.from_numpy(np.array(arrays.transpose(0, 3, 1, 2), order="C"))
    return None


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image in mode L or RGB as uint8 [C,H,W]."""
    return F.pil_to_tensor(image).contiguous()


def fit(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [C,H,W] so that it just covers height x width, then crop the centre."""
    h, w = pixels.shape[-2:]
    scale = max(height / h, width / w)
    # Resized as a whole, an image of 1 x 50 million pixels would take gigabytes for what is cut off afterwards.
    most = [math.ceil(_LONGEST * height / scale), math.ceil(_LONGEST * width / scale)]
    if h > most[0] or w > most[1]:
        h, w = min(h, most[0]), min(w, most[1])
        pixels = F.center_crop(pixels, [h, w])
    target = [max(height, round(h * scale)), max(width, round(w * scale))]
    if target != [h, w]:
        pixels = F.resize(pixels, target, antialias=True)
    return F.center_crop(pixels, [height, width])


def usable_cpus() -> int:
    """How many CPUs this process may run on, where the system says; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_threads(task: Callable[[int], None], count: int, title: str, progress: bool) -> None:
    """Run ``task(i)`` for i < count on a few threads (PIL and torch let go of the GIL while they decode)."""

    def block(start: int) -> int:
        stop = min(start + _BLOCK, count)
        for i in range(start, stop):
            task(i)
        return stop - start

    threads = min(8, usable_cpus())
    starts = iter(range(0, count, _BLOCK))
    bar = tqdm(total=count, desc=title, unit="img", delay=2, disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            # In waves, so that an error (the first one in order) stops the rest.
            while wave := list(islice(starts, threads * 8)):
                for done in pool.map(block, wave):
                    bar.update(done)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
