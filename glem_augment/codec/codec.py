"""The contract of a codec, image <-> the numbers that a flow models, with the checks of its images."""

from __future__ import annotations

import math
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.parts import register

# Where dequantisation noise comes from, see `levels.to_levels`.
Dequantisation: TypeAlias = torch.Generator | int | Tensor | None
_RANGE_TOLERANCE = 1e-3  # resizing with antialias leaves [0, 1] by rounding only
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which PIL turns RGB into "L"


class Codec(nn.Module):
    """Image <-> numbers. A new codec is a subclass with `encode` and `decode`, both differentiable.

    A subclass `__init__(image_shape, ...)`, whose further arguments have defaults, can have the decorator
    `register_codec(name)`: `autoencoder=name` and saved models then mean this codec.

    Args:
        image_shape: (C, H, W) of the images.
        shape: (c, h, w) of the numbers.
        pixel_range: of the images.

    Attributes:
        levels: whether `encode` uses dequantisation noise, and likelihoods are bits/dim.
        exact: whether `decode` undoes `encode`; it is tried. If not, a moved image is x + decode(z') - decode(z).
        key, unit: the name of a likelihood in metrics, and its unit in words.
        most: images per pass, which bounds the memory of activations.
    """

    _like: Tensor
    levels = exact = False
    key, unit = "nats_per_number", "nats per number"
    most = 256

    def __init__(
        self, image_shape: tuple[int, int, int], shape: tuple[int, int, int], pixel_range: PixelRange = UINT8
    ) -> None:
        super().__init__()
        self.image_shape, self.shape, self.pixel_range = image_shape, shape, pixel_range
        # It has the device and the dtype of the model.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        """Images [B, C, H, W], integers or floats of `pixel_range`, to numbers [B, c, h, w].

        `noise` dequantises images on levels, see `levels.to_levels`; a codec without levels ignores it.
        """
        raise NotImplementedError

    def decode(self, h: Tensor) -> Tensor:
        """Numbers [B, c, h, w] to float images [B, C, H, W]; values may leave the range."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers."""
        return self._like.dtype

    def target(self, x: Tensor) -> Tensor:
        """The floats that `decode(encode(x))` should give: x, unless the codec leaves out bits on purpose."""
        return self.pixel_range.to_floats(x, torch.float64)

    def logdet(self) -> Tensor | float:
        """log|det dh/dv| in nats, the same for all images; v are the values over which densities are stated."""
        return 0.0

    @property
    def divisor(self) -> float:
        """Nats per image divided by this number have the unit `unit`."""
        return float(math.prod(self.shape))

    def check(self, x: Tensor) -> None:
        """TypeError, ValueError: images of another dtype, shape or (on the CPU) range."""
        check_images(x, self.image_shape, self.pixel_range)

    def fit(self, x: Tensor) -> None:
        """Take what the codec needs from images [B, C, H, W], once; nothing by default."""

    @property
    def ready(self) -> bool:
        """Whether `fit` has been called, or has nothing to do."""
        return True


register_codec = partial(register, "codec", base=Codec)


def check_images(x: Tensor, image_shape: tuple[int, int, int], pixel_range: PixelRange | None = None) -> None:
    """TypeError or ValueError unless `x` is a batch of images of `image_shape` (C, H, W).

    The range of images is not checked without `pixel_range`, nor on an accelerator, where the host would wait.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a Tensor [B,C,H,W], got {type(x).__name__}")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        c, h, w = image_shape
        raise ValueError(f"images must have shape [B,{c},{h},{w}] for this model, got {list(x.shape)}")
    wanted = pixel_range or UINT8
    if x.dtype != wanted.torch_dtype and not x.is_floating_point():
        either = "floating point" if wanted.continuous else f"{wanted.dtype}, or float in [0,1]"
        raise TypeError(f"images must be {either}; got {x.dtype}")
    if x.dtype != torch.uint8 and pixel_range is not None and x.device.type == "cpu" and x.numel():
        (low, high), (bottom, top) = value_range(x), pixel_range.ends(x)
        slack = _RANGE_TOLERANCE * (top - bottom) if x.is_floating_point() else 0
        if low < bottom - slack or high > top + slack:
            raise ValueError(
                f"images of {x.dtype} must lie in [{bottom:.6g},{top:.6g}], got values from {low:.4g} to {high:.4g}: "
                "clip or scale them, undo a normalisation, or open them with value_range=model.pixel_range"
            )


def value_range(x: Tensor) -> tuple[float, float]:
    """The lowest and the highest value of images. ValueError: a value is not finite."""
    x = x.detach() if x.is_floating_point() else x.float()  # torch has no minimum of uint16
    low, high = (float(v) for v in torch.aminmax(x))
    if not math.isfinite(high - low):
        raise ValueError("images must be finite, but some of their values are NaN or infinite")
    return low, high


def to_unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Images, uint8 or float in [0,1], as floats of `dtype` in [0,1]."""
    return UINT8.to_floats(x, dtype)
