"""The range of images: from black to white, in the images' dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glem_augment.errors import DataError

# The lowest and the highest value of each dtype. float32 could hold more, but not the width of a range of them.
_ENDS = {"uint8": (0, 255), "uint16": (0, 65535), "int16": (-32768, 32767), "float32": (-1e30, 1e30)}
DTYPES = tuple(_ENDS)
_NARROWEST = 1e-4  # a range's width over its largest number: float32 keeps 10 bits of such values
MARGIN = 1.0  # decoded images that leave their range by more than its width are out of range


@dataclass(frozen=True)
class PixelRange:
    """The dtype of images and the range of their values.

    Images of integers are integers from `low` to `high`. As floats they are in [0, 1], with 0 for `low` and 1 for
    `high`. Images of float32 are floats from `low` to `high`.

    Args:
        dtype: "uint8", "uint16", "int16" or "float32". uint8 images always go from 0 to 255.
        low, high: by default all values of uint8.

    Raises:
        ValueError: another dtype, or numbers that are no range of it.
    """

    dtype: str = "uint8"
    low: float = 0
    high: float = 255

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"the dtype of images must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        (lowest, highest), ends = _ENDS[self.dtype], (self.low, self.high)
        good = all(type(end) in (int, float) and lowest <= end <= highest for end in ends) and self.low < self.high
        good = good and (self.continuous or all(end == int(end) for end in ends))
        if not good or (self.dtype == "uint8" and ends != (lowest, highest)):
            wanted = "0 and 255" if self.dtype == "uint8" else f"low < high, from {lowest:g} to {highest:g}"
            kind = "numbers" if self.continuous else "whole numbers"
            raise ValueError(f"the range of {self.dtype} images must be two {kind}, {wanted}; got {str(ends)[:80]}")
        if self.high - self.low < max(_NARROWEST * max(abs(self.low), abs(self.high)), 1e-30):
            raise ValueError(f"the range {ends} is too narrow for float32: subtract an offset from the images")

    def __str__(self) -> str:
        return f"{self.dtype} from {self.low:.6g} to {self.high:.6g}"

    @property
    def continuous(self) -> bool:
        """Whether the images are floats, which have no levels."""
        return self.dtype == "float32"

    @property
    def whole(self) -> bool:
        """Whether the range has all values of the dtype."""
        return (self.low, self.high) == _ENDS[self.dtype]

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def bits(self) -> int:
        """Bits of a value: 8, 16 or 32."""
        return 8 * self.torch_dtype.itemsize

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value of the images as floats: (0, 1) for integers."""
        return (float(self.low), float(self.high)) if self.continuous else (0.0, 1.0)

    def ends(self, x: Tensor) -> tuple[float, float]:
        """The lowest and the highest value that images `x` may have, integers or floats."""
        return self.limits if x.is_floating_point() else (self.low, self.high)

    def to_floats(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Images of integers as floats in [0, 1]; other images as they are, in `dtype`."""
        if x.is_floating_point():
            return x.to(dtype)
        x = x.to(dtype)
        return (x - self.low if self.low else x) / (self.high - self.low)

    def from_floats(self, x: Tensor) -> Tensor:
        """Float images of any values as images of the dtype: clamped, and rounded to the nearest integer."""
        x = self.clamp(x)
        if self.continuous:
            return x.float()
        # By way of int32 it takes half as long.
        x = x.mul_(self.high - self.low)
        return (x.add_(self.low) if self.low else x).round_().to(torch.int32).to(self.torch_dtype)

    def clamp(self, x: Tensor) -> Tensor:
        """Float images in their range: NaN becomes the middle, other values are clamped. Differentiable."""
        low, high = self.limits
        return x.nan_to_num(nan=(low + high) / 2, posinf=high, neginf=low).clamp(low, high)

    def near(self, x: Tensor) -> Tensor:
        """Which float images [n, C, H, W] are finite and leave the range by `MARGIN` widths at most: bool [n]."""
        (bottom, top), low, high = self.limits, x.flatten(1).amin(1), x.flatten(1).amax(1)  # faster than aminmax
        away = MARGIN * (top - bottom)
        return (low >= bottom - away) & (high <= top + away)  # NaN compares false

    def need_8_bits(self, what: str, channels: int | None = None) -> None:
        """DataError unless images are uint8, and grey or RGB if `channels` are given: `what` takes no others."""
        if self.dtype != "uint8" or channels not in (None, 1, 3):
            of = "" if channels is None else f", {channels} channel{'s' * (channels > 1)}"
            kind = "8-bit images" if channels is None else "8-bit grey or RGB images"
            raise DataError(f"{what} needs {kind}, and these are {self}{of}: convert them, or leave it out")


UINT8 = PixelRange()
# The ranges of images of which none is stated.
DEFAULT_RANGES = {each.dtype: each for each in (UINT8, PixelRange("uint16", 0, 65535), PixelRange("float32", 0, 1))}
