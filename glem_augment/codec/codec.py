"""The contract of a codec, image <-> the numbers that a flow models, with the checks of its images."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

# Where dequantisation noise comes from, see `levels.to_levels`.
Dequantisation: TypeAlias = torch.Generator | int | Tensor | None
_RANGE_TOLERANCE = 1e-3  # resizing with antialias leaves [0, 1] by rounding only
MARGIN = 1.0  # decoded images that leave [0, 1] by more are not plausible
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which PIL turns RGB into "L"


class Codec(nn.Module):
    """Image <-> numbers. A new codec is a subclass with `encode` and `decode`, both differentiable.

    Args:
        image_shape: (C, H, W) of the images.
        shape: (c, h, w) of the numbers.

    Attributes:
        levels: whether `encode` uses dequantisation noise, and likelihoods are bits/dim.
        exact: whether `decode` undoes `encode`. If not, a moved image is x + decode(z') - decode(z).
        key, unit: the name of a likelihood in metrics, and its unit in words.
        most: images per pass, which bounds the memory of activations.
    """

    _like: Tensor
    levels = exact = False
    key, unit = "nats_per_number", "nats per number"
    most = 256

    def __init__(self, image_shape: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape, self.shape = image_shape, shape
        # It has the device and the dtype of the model.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        """Images [B, C, H, W], uint8 or float in [0, 1], to numbers [B, c, h, w].

        `noise` dequantises images on levels, see `levels.to_levels`; a codec without levels ignores it.
        """
        raise NotImplementedError

    def decode(self, h: Tensor) -> Tensor:
        """Numbers [B, c, h, w] to images [B, C, H, W], float; values may leave [0, 1]."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers."""
        return self._like.dtype

    def logdet(self) -> Tensor | float:
        """log|det dh/dv| in nats, the same for all images; v are the values over which densities are stated."""
        return 0.0

    @property
    def divisor(self) -> float:
        """Nats per image divided by this number have the unit `unit`."""
        return float(math.prod(self.shape))

    def check(self, x: Tensor) -> None:
        """TypeError, ValueError: images of another dtype, shape or (on the CPU) range."""
        check_images(x, self.image_shape)

    def fit(self, x: Tensor) -> None:
        """Take what the codec needs from images [B, C, H, W], once; nothing by default."""

    @property
    def ready(self) -> bool:
        """Whether `fit` has been called, or has nothing to do."""
        return True


def check_images(x: Tensor, image_shape: tuple[int, int, int], any_range: bool = False) -> None:
    """TypeError or ValueError unless `x` is a batch of images of `image_shape` (C, H, W).

    The range of float images is not checked with `any_range`, nor on an accelerator, where the host would wait.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a Tensor [B,C,H,W], got {type(x).__name__}")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        c, h, w = image_shape
        raise ValueError(f"images must have shape [B,{c},{h},{w}] for this model, got {list(x.shape)}")
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
