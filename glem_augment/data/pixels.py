"""Pixels: from image files to uint8 tensors, and from these to the levels that a flow sees (dequantisation)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from glem_augment.devices import send
from glem_augment.distributed import Share
from glem_augment.errors import BadImageError

GREY_MODES = ("L", "1", "LA")
# PIL goes by content rather than by extension, and some of its formats run other programs (EPS).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which PIL turns RGB into "L"
_LONGEST = 16  # how many times longer than needed an image may be when it is resized
_BLOCK = 32  # images per task of the decoding threads
# The constants of SplitMix64, as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
# Resizing with antialias overshoots by rounding only; a wider range belongs to other images (0..255, normalised).
_RANGE_TOLERANCE = 1e-3

Noise: TypeAlias = torch.Generator | int | Tensor | None  # where dequantisation noise comes from, see `to_levels`


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Open an image and read its header; the pixels are decoded when they are needed."""
    return Image.open(file, formats=_FORMATS)


def check_header(image: Image.Image, where: str) -> None:
    """BadImageError for images that must not be decoded: too many pixels, or over 8 bits, which PIL clips to white."""
    limit = Image.MAX_IMAGE_PIXELS  # PIL itself only warns, up to twice as many
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


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
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
    """How many CPUs this process may run on, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_threads(task: Callable[[int], None], count: int, title: str, progress: bool, threads: int = 8) -> None:
    """Run `task(i)` for i < count on up to `threads` threads, because PIL and torch release the GIL while they decode.

    The first error, in the order of i, is raised and stops the rest. With `progress` a bar appears on stderr after two
    seconds.
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
    """Raise TypeError or ValueError unless `x` is a batch of images of `image_shape` (C, H, W).

    The value range of float images is checked on the CPU only, because on an accelerator the check would wait for it;
    with `any_range` not at all.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a torch.Tensor [B,C,H,W], got {type(x).__name__}")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        c, h, w = image_shape
        raise ValueError(f"images must have shape [B,{c},{h},{w}] for this flow, got {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"images must be uint8, or float in [0,1]; got {x.dtype}")
    if x.is_floating_point() and not any_range and x.device.type == "cpu" and x.numel():
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not math.isfinite(high - low):
            raise ValueError("images must be finite, but some of their values are NaN or infinite")
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise ValueError(
                f"float images must lie in [0,1], got values from {low:.4g} to {high:.4g}; pass uint8 images, divide "
                "by 255, or undo the normalisation"
            )


def to_levels(x: Tensor, bits: int, dtype: torch.dtype, noise: Noise = None) -> Tensor:
    """`(level + u) / 2^bits - 1/2`, the flow's input; float images are scaled to levels unrounded.

    With noise, a float image whose pixels all are k / 255, or all k / (2^bits - 1), for whole k up to rounding is the
    uint8 image of these levels, to the last bit. Any other is a point between the levels: it gets no noise, u = 1/2.

    Args:
        x: [B,C,H,W], uint8, of which the top `bits` bits are kept, or float in [0,1].
        noise: where u in [0, 1) comes from. None: u = 1/2, the middle of the bin. A generator: it draws u, on its own
            device. A seed: u is a function of the seed and the image alone, whatever the batch and the device. A
            tensor: u itself, from `draw_noise`.
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
    """Float `levels` of images x, rounded where all of an image lies on levels; and where that is, bool [B,1,1,1].

    `eps` is the precision in which the images came. The rounding passes gradients on.
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

    Float32 has no finer ones beside the upper levels of 8 bits, and it does not round these up to the next level.
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
    """The dequantisation noise of the images x [b,C,H,W], int16 in x's shape, in the form that `encode` takes.

    With a `share`, x is one rank's part of a batch. The noise of the whole batch is drawn, and of it the part returned,
    so that an image has the same noise whatever the number of ranks. Four numbers are drawn at once, which on a CPU
    takes a sixth of the time of `torch.rand`.
    """
    each = x.shape[1:].numel()
    first, last, total = share or (0, len(x), len(x))
    words = torch.empty((total * each + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.int16)[first * each : last * each].reshape(x.shape)


def _words_of_images(levels: Tensor, seed: int) -> Tensor:
    """Pseudo-random int64 [B, ceil(d / 4)], a function of the seed and of each row of `levels` [B, d].

    They are SplitMix64's (Steele et al., OOPSLA 2014), from a hash of the row: a sum of its levels with random weights.
    Whole numbers wrap alike on every device, and their sum does not depend on the order.
    """
    count = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    hashed = (levels.round().to(torch.int64) * _splitmix(count * _GOLDEN + seed)).sum(1, keepdim=True)
    # The seed once more, since the sum is 0 for a black image.
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


def in_range(x: Tensor) -> Tensor:
    """Decoded images as they can be shown: NaN becomes grey, all else is clamped to [0,1]. Differentiable."""
    return x.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Decoded images, float of any values, as uint8."""
    return in_range(x).mul_(255).round_().to(torch.uint8)
