"""The dtype of images and the range of their values, shared by data, codecs and exports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glem_augment.errors import DataError

# For each dtype: the lowest and the highest value that it can have.
_LIMITS = {
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "float32": (-1e30, 1e30),
}
DTYPES = tuple(_LIMITS)
_NARROWEST = 1e-4  # width of a range of floats, of its largest number: float32 keeps 10 bits of such values


def dtype_name(x: Tensor) -> str:
    """The dtype of a tensor as text, such as "uint8"."""
    return str(x.dtype).removeprefix("torch.")


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
        lowest, highest = _LIMITS[self.dtype]
        numbers = (self.low, self.high)
        good = all(type(value) in (int, float) and lowest <= value <= highest for value in numbers)
        good = good and self.low < self.high and (self.continuous or all(value == int(value) for value in numbers))
        if not good:
            raise ValueError(
                f"a range of {self.dtype} must be two{'' if self.continuous else ' whole'} numbers, low < high, from "
                f"{lowest:g} to {highest:g}; got {ascii(numbers)[:80]}"
            )
        if self.dtype == "uint8" and numbers != (lowest, highest):
            raise ValueError(f"uint8 images go from 0 to 255, got {numbers}: leave the range out")
        if self.high - self.low < max(_NARROWEST * max(abs(self.low), abs(self.high)), 1e-30):
            raise ValueError(f"the range {numbers} is too narrow for float32: subtract an offset from the images")

    def __str__(self) -> str:
        return f"{self.dtype} from {self.low:.6g} to {self.high:.6g}"

    @property
    def continuous(self) -> bool:
        """Whether the images are floats, which have no levels."""
        return self.dtype == "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def bits(self) -> int:
        """Bits of a value: 8, 16 or 32."""
        return 8 * self.torch_dtype.itemsize

    @property
    def levels(self) -> int:
        """The number of values of integers."""
        return int(self.high - self.low) + 1

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value of the images as floats: (0, 1) for integers."""
        return (float(self.low), float(self.high)) if self.continuous else (0.0, 1.0)

    def fits_pil(self, channels: int) -> bool:
        """Whether images are 8-bit grey or RGB, which PIL, shards and networks of photographs take."""
        return self.dtype == "uint8" and channels in (1, 3)

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
        return x.mul_(self.high - self.low).add_(self.low).round_().to(self.torch_dtype)

    def clamp(self, x: Tensor) -> Tensor:
        """Float images in their range: NaN becomes the middle, other values are clamped. Differentiable."""
        low, high = self.limits
        return x.nan_to_num(nan=(low + high) / 2, posinf=high, neginf=low).clamp(low, high)

    def need_8_bits(self, what: str) -> None:
        """DataError, `what` takes no such images, unless they are uint8."""
        if self.dtype != "uint8":
            raise DataError(f"{what} needs 8-bit images, and these are {self}: convert them to 8 bits")


UINT8 = PixelRange()


def measured(dtype: str, low: float, high: float, name: str) -> PixelRange:
    """The range of images whose values go from `low` to `high`. DataError: NaN, infinity, or one value alone."""
    if not math.isfinite(high - low):
        raise DataError(f"{name} has values that are NaN or infinite: replace them")
    try:
        return PixelRange(dtype, low, high)
    except ValueError as error:
        raise DataError(f"{name}: {error}, or state the range with value_range=(low, high)") from None
