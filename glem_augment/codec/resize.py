"""Conversion between images of any size and a model of one size.

The image x is resized to the model's size and moved there. The change is resized back and added, which keeps the fine
detail of x:

    x' = x + up(moved - down(x))
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.codec.codec import LUMA, value_range
from glem_augment.codec.pixel_range import UINT8, PixelRange

# Images of a model's scale fill more than this part of its range, so many of them together.
NARROW, ENOUGH = 0.02, 8
RANGE_SLACK = 0.1  # bicubic filters leave [0, 1] by less; normalised images by more
UNIT_SLACK, FEW = 0.05, 0.05  # how far values leave [0, 1] once mean and std are undone: few do, from RandomErasing


class PixelAdapter:
    """Converts images to a model's `shape` (C, H, W) and `pixel_range`, and carries the changes back."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        pixel_range: PixelRange = UINT8,
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"give mean and std together, got mean={mean!r}, std={std!r}")
        self.shape, self.range = shape, pixel_range
        self.mean = None if mean is None else _numbers(mean)
        self.std = None if std is None else _numbers(std)
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {std!r}")
        # Of the first images of each dtype: how many, their lowest and their highest value.
        self._seen: dict[torch.dtype, tuple[int, float, float]] = {}

    # ---- checks ----------------------------------------------------------------------------------------------

    def check(self, x: Tensor) -> None:
        """ValueError or TypeError unless x is a batch [B, C, H, W] that can be converted.

        The value range is checked in the first images of each dtype only, because an accelerator has to wait for it.
        """
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x must be a tensor of images [B, C, H, W], got {got}: use torch.from_numpy(x) for an array, "
                "aug.as_transform() for single images, tuples and dicts"
            )
        channels, whole = x.shape[1], not x.is_floating_point()
        if channels != self.shape[0] and {channels, self.shape[0]} != {1, 3}:
            raise ValueError(
                f"images {list(x.shape)} have {channels} channels, the model's {self.shape[0]}: channels come first "
                "(x.permute(0, 3, 1, 2)), and only grey (1) and RGB (3) are converted into each other"
            )
        if whole and (x.dtype != self.range.torch_dtype or self.mean is not None):
            allowed = "" if self.range.continuous or self.mean is not None else f"{self.range.dtype} or "
            raise TypeError(f"x must be {allowed}floating point{', with mean and std' * (not allowed)}, got {x.dtype}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(for_channels(values, channels)) not in (1, channels):
                raise ValueError(f"{name} has {len(values)} values, the images {channels} channels")
        if x.numel() and x.dtype != torch.uint8 and self._seen.get(x.dtype, (0,))[0] < ENOUGH:
            self._check_range(x)

    def _check_range(self, x: Tensor) -> None:
        (low, high), (bottom, top) = value_range(x), self.range.ends(x)
        if self.mean is None or self.std is None:
            slack = RANGE_SLACK * (top - bottom) if x.is_floating_point() else 0
            if low < bottom - slack or high > top + slack:
                scaled = "" if self.range.continuous else f"divide 0 to {self.range.high} by {self.range.high}, "
                raise ValueError(
                    f"images must be in [{bottom:g}, {top:g}], got values from {low:.4g} to {high:.4g}: clip them, "
                    f"{scaled}or give mean and std if they are normalised"
                )
            count, lowest, highest = self._seen.get(x.dtype, (0, low, high))
            count, low, high = count + len(x), min(low, lowest), max(high, highest)
            if count >= ENOUGH and 0 < high - low < NARROW * (top - bottom):
                raise ValueError(
                    f"the first {count} images lie between {low:.4g} and {high:.4g}, which is next to nothing of the "
                    f"model's range, {bottom:g} to {top:g}, so moves would be far too large: give images on the "
                    "model's scale, before any normalisation"
                )
            self._seen[x.dtype] = count, low, high
            return
        unit = (self.to_floats(x.detach().float()) - bottom) / (top - bottom)
        share = float(((unit < -UNIT_SLACK) | (unit > 1 + UNIT_SLACK)).float().mean())
        if share > FEW:
            raise ValueError(
                f"with mean={self.mean} and std={self.std} undone, {100 * share:.3g} % of the values lie outside "
                "[0, 1]: give the mean and std by which the images in [0, 1] were normalised; for images that are "
                "still in [0, 1] leave them out, for 0 to 255 give uint8"
            )
        changes = min(self.mean) > 0 or max(self.std) < 1  # mean 0 and std 1 leave images as they are
        if changes and x.numel() >= 1000 and 0 <= low < high <= 1:
            warnings.warn(
                f"mean and std are given, but the images look as if they were still in [0, 1] ({low:.3g} to "
                f"{high:.3g}): if they are, leave mean and std out, or all moves are too large",
                stacklevel=4,
            )
        self._seen[x.dtype] = ENOUGH, low, high

    # ---- value range -----------------------------------------------------------------------------------------

    def to_floats(self, x: Tensor) -> Tensor:
        """Images as floats in the range (a little outside where the input was): float64 if x is, else float32."""
        if not x.is_floating_point():
            return self.range.to_floats(x, torch.float32)
        x = x if x.dtype == torch.float64 else x.float()
        return x if self.std is None else x * _per_channel(self.std, x) + _per_channel(self.mean, x)

    # ---- size and channels -----------------------------------------------------------------------------------

    def to_model(self, images: Tensor) -> Tensor:
        """Float images [n, C, H, W] in the range, at the model's size and with the model's channels."""
        small = resized(images, self.shape[1:])
        if small.shape[1] == 3 and self.shape[0] == 1:
            small = (small * _per_channel(LUMA, small)).sum(dim=1, keepdim=True)
        return small.clamp(*self.range.limits).expand(-1, self.shape[0], -1, -1)

    def from_model(self, images: Tensor, small: Tensor, moved: Tensor, dtype: torch.dtype) -> Tensor:
        """The results [n, C, H, W] of `to_floats` with the change from `small`, their `to_model`, to `moved`.

        The result has the form of the input, in its dtype; integers are rounded to the nearest level. It lies in the
        range, or leaves it no further than the original (RandomErasing fills with N(0, 1)).
        """
        change = moved - small
        if change.shape[1] != images.shape[1]:
            # A grey change is the same for every channel. A grey image takes the average of an RGB change.
            change = change.mean(dim=1, keepdim=True).expand(-1, images.shape[1], -1, -1)
        out = images + resized(change, images.shape[2:])
        if not dtype.is_floating_point:
            return self.range.from_floats(out)
        low, high = self.range.limits
        out = torch.clamp(out, images.clamp(max=low), images.clamp(min=high))
        if self.std is not None:
            out = (out - _per_channel(self.mean, out)) / _per_channel(self.std, out)
        return out.to(dtype)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Images [n, C, H, W] at another size (H, W); x itself if it has that size."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    # Without antialiasing, detail finer than the smaller grid would alias.
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or std for images of so many channels. For grey images the three of RGB are averaged, as timm does."""
    return (sum(values) / 3,) if channels == 1 and len(values) == 3 else values


def _per_channel(values: tuple[float, ...] | None, x: Tensor) -> Tensor:
    """The values for the channels of x [n, C, H, W], float32 [C, 1, 1] on its device."""
    assert values is not None
    return _constant(for_channels(values, x.shape[1]), x.device)[:, None, None]


@lru_cache(maxsize=64)  # a GPU would wait for each copy
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may need gradients
        return torch.tensor(values, dtype=torch.float32, device=device)


def _numbers(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(float(v) for v in ([value] if isinstance(value, Real) else value))  # type: ignore[union-attr]
