"""Between a user's images and a flow's: value range, size and channels, and the way back for a change.

A flow of 32-64 pixels changes images of 224-448 by its *change*: the image is resized to the flow's size,
changed there, and the upsampled difference is added to the full-size image, whose fine detail stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-R BT.601, the weights with which PIL turns RGB into "L".
LUMA = (0.299, 0.587, 0.114)
# Resizing with bicubic filters overshoots a little; more than this means that the input was normalised.
RANGE_SLACK = 0.1


class SmallImages(NamedTuple):
    """Images at the flow's size: `flow` with its channels, in [0, 1]; `own` with the images' channels."""

    flow: Tensor
    own: Tensor


class PixelAdapter:
    """Converts images to those of a flow of `shape` (C, H, W) and carries changes back.

    Args:
        shape: of the flow's images.
        mean, std: of normalised input, a number or one per channel, or None.
        detail: "keep", "mix" or "none", see GLEMAugment.

    Raises:
        ValueError: mean without std (or the reverse), or a std that is not positive.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        detail: str = "keep",
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"give mean and std together, got mean={mean!r}, std={std!r}")
        self.shape = shape
        self.mean = None if mean is None else _numbers("mean", mean)
        self.std = None if std is None else _numbers("std", std)
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {std!r}")
        self.detail = detail
        self._range_seen: set[tuple[torch.device, torch.dtype]] = set()
        self._constants: dict[tuple[str, torch.device, int], Tensor] = {}

    def check(self, x: Tensor) -> None:
        """Raise ValueError or TypeError for a batch [B, C, H, W] that can't be converted.

        The value range is looked at once per device and dtype, since it makes an accelerator wait.
        """
        channels, height, width = x.shape[1:]
        if channels != self.shape[0] and {channels, self.shape[0]} != {1, 3}:
            raise ValueError(
                f"images have {channels} channels, the flow's {self.shape[0]}; "
                "only grey (1) and RGB (3) are converted into each other"
            )
        if min(height, width) < 1:
            raise ValueError(f"images must have pixels, got {height}x{width}")
        if x.dtype == torch.uint8:
            if self.mean is not None:
                raise TypeError("mean and std are for normalised float input, got uint8: leave them out")
            return
        if not x.is_floating_point():
            raise TypeError(f"x must be uint8 or floating point, got {x.dtype}")
        if self.mean is not None:
            for name, values in (("mean", self.mean), ("std", self.std)):
                if values is not None and len(for_channels(values, channels)) not in (1, channels):
                    raise ValueError(f"{name} has {len(values)} values, the images {channels} channels")
        if x.numel() and (x.device, x.dtype) not in self._range_seen:
            (self._check_unit if self.mean is None else self._check_normalised)(x)
            self._range_seen.add((x.device, x.dtype))

    def _check_unit(self, x: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ValueError(
                f"float images must be in [0, 1], got values from {low:.4g} to {high:.4g}; "
                "give mean and std if they are normalised"
            )

    def _check_normalised(self, x: Tensor) -> None:
        """ValueError for values that can't be what mean and std make; a warning where it looks as if nothing had been
        normalised."""
        assert self.mean is not None and self.std is not None
        low, high = (float(v) for v in torch.aminmax(x.detach().float()))
        outside = min(low * s + m for s, m in self._scales()) < -1 or max(high * s + m for s, m in self._scales()) > 2
        # RandomErasing fills with N(0, 1): beyond any image's range, but not by this much.
        if not (-10 <= low and high <= 10) and (outside or low != low or high != high):
            raise ValueError(
                f"with mean and std, images must be normalised by them, got values from {low:.4g} to {high:.4g}; for "
                "images in [0, 1] leave mean and std out, for 0 to 255 give uint8"
            )
        changes = min(self.mean) > 0 or max(self.std) < 1  # mean 0 and std 1 leave images as they are
        if changes and x.numel() >= 1000 and low >= 0 and high <= 1 and high > low:
            warnings.warn(
                f"mean and std are given, but the images look as if they were in [0, 1] still ({low:.3g} to "
                f"{high:.3g}): then leave mean and std out, or all moves are too large",
                stacklevel=4,
            )

    def _scales(self) -> list[tuple[float, float]]:
        """(std, mean) of each channel, or of all."""
        assert self.mean is not None and self.std is not None
        n = max(len(self.mean), len(self.std))
        return [(self.std[i % len(self.std)], self.mean[i % len(self.mean)]) for i in range(n)]

    def to_unit(self, x: Tensor) -> Tensor:
        """Images as float32 (float64 if they were) in [0, 1], a little outside where the input was.

        Overwrites x: for large images a new tensor costs more than the arithmetic.
        """
        if x.dtype == torch.uint8:
            return x.to(torch.float32).div_(255)
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        return x if self.mean is None else x.mul_(self._constant("std", x)).add_(self._constant("mean", x))

    def from_unit(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `to_unit`, with the dtype that came in; uint8 is rounded to the nearest level.

        Overwrites x.
        """
        if dtype == torch.uint8:
            return x.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        if self.mean is not None:
            x = x.sub_(self._constant("mean", x)).div_(self._constant("std", x))
        return x.to(dtype)

    def to_flow(self, images: Tensor) -> SmallImages:
        """Images [n, C, H, W] in [0, 1] at the flow's size, with its channels."""
        own = self._resize(images, self.shape[1:])
        flow = own
        if images.shape[1] == 3 and self.shape[0] == 1:
            flow = (own * self._constant("luma", own)).sum(dim=1, keepdim=True)
        elif images.shape[1] == 1 and self.shape[0] == 3:
            flow = own.expand(-1, 3, -1, -1)
        return SmallImages(flow.clamp(0.0, 1.0), own)

    def from_flow(
        self,
        images: Tensor,
        small: SmallImages,
        decoded: Tensor,
        partner: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Carry decoded images back to the size and channels of the originals.

        Args:
            images: float [m, C, H, W], the n originals and, after them, those of partners; small: the same at
                the flow's size.
            decoded: float [n, C_flow, h, w] in [0, 1], changed versions of images[:n].
            partner: for detail="mix": rows [n] of the partners among `images`, and the share [n] of their
                detail.

        Returns:
            float [n, C, H, W], in [0, 1] wherever the originals are. It may be `decoded` itself.
        """
        n = len(decoded)
        original = images[:n]
        same_size = original.shape[2:] == decoded.shape[2:]
        same_channels = original.shape[1] == decoded.shape[1]
        if same_size and same_channels:
            # What the flow does not see, such as RandomErasing's N(0, 1), stays.
            return decoded if self.mean is None else decoded + (original - small.flow[:n])
        own = small.own[:n]
        change = decoded - small.flow[:n]
        if not same_channels:
            # Grey change: the same for every channel. RGB change of a grey image: its average.
            change = change.expand_as(own) if decoded.shape[1] == 1 else change.mean(1, keepdim=True)
        if not same_size and self.detail == "none":
            out = self._resize(own + change, original.shape[2:])
        elif same_size:
            out = original + change
        else:
            out = self._resize(change, original.shape[2:]).add_(original)
            if self.detail == "mix" and partner is not None:
                fine = images - self._resize(small.own, original.shape[2:])
                out.add_(partner[1][:, None, None, None] * (fine[partner[0]] - fine[:n]))
        return _clamp_as(out, original)

    @staticmethod
    def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(x.shape[2:]) == tuple(size):
            return x
        # Without antialiasing, what is finer than the flow's grid would fold into false coarse structure.
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)

    def _constant(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.device, like.shape[1])
        if key not in self._constants:
            values = {"mean": self.mean, "std": self.std, "luma": LUMA}[name]
            assert values is not None
            values = for_channels(values, like.shape[1])
            # One made under inference_mode could take no part in a later call's graph.
            with torch.inference_mode(False):
                self._constants[key] = torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]
        return self._constants[key]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_constants": {}, "_range_seen": set()}


def for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or std for images of so many channels: timm averages the three of an RGB configuration for grey images."""
    return (sum(values) / 3,) if channels == 1 and len(values) == 3 else values


def _clamp_as(out: Tensor, original: Tensor) -> Tensor:
    """`out` (which is overwritten) brought into [0, 1], but no further than its original was.

    Not simply [0, 1]: pixels of RandomErasing lie outside it, and stay as they are.
    """
    if out.device.type == "cpu" and out.numel():
        low, high = (float(v) for v in torch.aminmax(original))
        if low >= 0.0 and high <= 1.0:  # the usual case, for which nothing as large as the images is made
            return out.clamp_(0.0, 1.0)
    return torch.minimum(torch.maximum(out, original.clamp(max=0.0)), original.clamp(min=1.0))


def _numbers(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    try:
        values = (value,) if isinstance(value, Real) else tuple(value)
        return tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}") from None
