"""Images in, numbers for the flow out, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.devices import move

# Antialiased resizing overshoots by rounding only; more than this is another kind of image (0..255, normalised).
_RANGE_TOLERANCE = 1e-3


def check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise TypeError or ValueError unless ``x`` is a batch of images of ``image_shape`` (C, H, W).

    The value range of float images is checked on the CPU only: on an accelerator it would stall the queue.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a torch.Tensor [B,C,H,W], got {type(x).__name__}")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        c, h, w = image_shape
        raise ValueError(f"images must have shape [B,{c},{h},{w}] for this flow, got {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"images must be uint8, or float in [0,1]; got {x.dtype}")
    if x.is_floating_point() and x.device.type == "cpu" and x.numel():
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if low != low or high != high:
            row = int(x.detach().flatten(1).isnan().any(1).nonzero()[0])
            raise ValueError(f"images must be numbers, but image {row} of the batch has NaN pixels")
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise ValueError(
                f"float images must lie in [0,1], got values from {low:.4g} to {high:.4g}; pass uint8 images, divide "
                "by 255, or undo the normalisation"
            )


def to_levels(x: Tensor, bits: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """``(level + u) / 2^bits - 1/2`` with u = 1/2, or uniform noise for uint8 images when a generator is given.

    Args:
        x: uint8, of which the top ``bits`` bits are kept, or float in [0,1], which is scaled to levels unrounded.
        generator: on a CPU or CUDA; the noise is drawn there and moved.
    """
    if x.dtype == torch.uint8:
        # As floats first: adding integers to them takes ten times as long on a CPU.
        h = (x if bits == 8 else x >> (8 - bits)).to(dtype)
        h.add_(0.5 if generator is None else _noise(x, dtype, generator))
    else:
        h = (x.to(dtype) * (2**bits - 1)).add_(0.5)
    return h.mul_(2.0**-bits).sub_(0.5)


def _noise(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), in the shape of ``x``: multiples of 2^-16, the same for every dtype.

    Between the upper levels of 8 bits float32 has no others, and it does not round these up to the next level. Four are
    drawn at once: on a CPU in a sixth of the time of ``torch.rand``.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    noise = move(words, x.device).view(torch.int16)[: x.numel()].to(dtype)
    return noise.mul_(2.0**-16).add_(0.5).view(x.shape)


def from_levels(h: Tensor, bits: int) -> Tensor:
    """Inverse of ``to_levels`` for bin middles: float with 0 and 1 at the lowest and highest level."""
    return ((h + 0.5) * 2.0**bits - 0.5) / (2**bits - 1)


def in_range(x: Tensor) -> Tensor:
    """Decoded images as they can be shown: not a number becomes grey, all else lies in [0,1]. Differentiable."""
    return x.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def in_range_(x: Tensor) -> Tensor:
    """``in_range``, in place."""
    return x.nan_to_num_(nan=0.5, posinf=1.0, neginf=0.0).clamp_(0.0, 1.0)


def to_uint8_(x: Tensor) -> Tensor:
    """Decoded images, float of any values, as uint8; ``x`` is overwritten on the way."""
    return in_range_(x).mul_(255).round_().to(torch.uint8)
