"""A frozen autoencoder with standardised latents, between images and the latents that a flow models."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glem_augment.codec.codec import Codec, Dequantisation, to_unit
from glem_augment.precision import full_precision
from glem_augment.tensors import evaluating

_MIN_STD = 1e-3  # a channel that never varies would otherwise become infinite
_MOST_PIXELS = 2**19  # per pass


@runtime_checkable
class Autoencoder(Protocol):
    """A module with these two methods, both differentiable.

    It may also have the attributes `factor` (the image's side divided by the latent's) and `channels` (of the latents).
    Otherwise it is tried on an image.
    """

    def encode(self, x: Tensor) -> Tensor:
        """RGB images [B,3,H,W] in [0, 1] to latents [B,C,h,w]."""

    def decode(self, h: Tensor) -> Tensor:
        """Latents [B,C,h,w] to RGB images [B,3,H,W]; values may leave [0, 1] a little."""


class StandardisedAutoencoder(Codec):
    """A frozen autoencoder with its latents standardised per channel: `h = (E(x) - mean) / std`.

    Latents of published autoencoders differ in scale from family to family and from channel to channel. So `fit` takes
    mean and standard deviation from images, once. They are stored with the model; the autoencoder is not. It is put
    into eval mode and frozen. Densities are over E(x).

    Grey images become RGB on the way in, and the mean of the channels on the way out. Sides that the autoencoder does
    not divide are extended by their edges on the way in, and cropped on the way out, which blurs less than resizing.

    Args:
        autoencoder: see `Autoencoder`.
        image_shape: (C, H, W), with C 1 or 3.
        shape: of the latents, by default found with `latent_shape`.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor

    def __init__(
        self, autoencoder: nn.Module, image_shape: tuple[int, int, int], shape: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__(image_shape, shape or latent_shape(autoencoder, image_shape))
        high, wide = (
            padded - side for padded, side in zip(_padded(autoencoder, image_shape), image_shape[1:], strict=True)
        )
        self._edges = (wide // 2, wide - wide // 2, high // 2, high - high // 2)  # left, right, top, bottom
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.most = max(1, min(self.most, _MOST_PIXELS // math.prod(image_shape[1:])))
        self.register_buffer("mean", torch.zeros(self.shape[0], 1, 1))
        self.register_buffer("std", torch.ones(self.shape[0], 1, 1))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def train(self, mode: bool = True) -> StandardisedAutoencoder:
        """Stay in eval mode: the autoencoder is frozen."""
        return super().train(False)

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        """Images [B,C,H,W] in [0, 1] to standardised latents [B,c,h,w]; differentiable."""
        return (self._raw(x) - self.mean) / self.std

    def decode(self, h: Tensor) -> Tensor:
        """Standardised latents [B,c,h,w] to images [B,C,H,W]; differentiable."""
        with full_precision(h.device.type):
            x = self.autoencoder.decode(h * self.std + self.mean)  # type: ignore[operator]
        left, _, top, _ = self._edges
        channels, height, width = self.image_shape
        x = x[:, :, top : top + height, left : left + width]
        return x if channels == 3 else x.mean(1, keepdim=True)

    def logdet(self) -> Tensor:
        return -self.std.log().sum() * math.prod(self.shape[1:])

    @property
    def ready(self) -> bool:
        return bool(self.fitted)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set mean and standard deviation from images [B,C,H,W], unless that was done before."""
        if not self.fitted:
            h = torch.cat([self._raw(chunk) for chunk in x.to(self._like.device).split(self.most)]).double()
            self.mean.copy_(h.mean((0, 2, 3))[:, None, None])
            self.std.copy_(h.std((0, 2, 3)).clamp_min(_MIN_STD)[:, None, None])
            self.fitted.fill_(True)

    def _raw(self, x: Tensor) -> Tensor:
        x = to_unit(x, self.dtype).expand(-1, 3, -1, -1)
        with full_precision(x.device.type):
            return self.autoencoder.encode(F.pad(x, self._edges, "replicate"))  # type: ignore[operator]


def latent_shape(autoencoder: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(c, h, w) of the latents, or of a codec's numbers, of images (C, H, W).

    TypeError: neither codec nor autoencoder. ValueError: it can't take these images.
    """
    if not (isinstance(autoencoder, nn.Module) and isinstance(autoencoder, Autoencoder)):
        found = getattr(autoencoder, "__name__", type(autoencoder).__name__)  # of a class, its name
        raise TypeError(f"a codec or an autoencoder is an nn.Module object with encode and decode, got {found}")
    if isinstance(autoencoder, Codec):
        return _numbers_of(autoencoder, image_shape)
    if image_shape[0] not in (1, 3):
        raise ValueError(
            f"an autoencoder takes grey or RGB images, got {image_shape[0]} channels: leave it out, for a model of the "
            "pixels"
        )
    height, width = _padded(autoencoder, image_shape)
    factor, found = getattr(autoencoder, "factor", None), getattr(autoencoder, "channels", None)
    if factor and found:
        return found, height // factor, width // factor
    probe: Any = copy.deepcopy(autoencoder)  # a user's module may change when it is called
    like = next((t for t in probe.parameters() if t.is_floating_point()), torch.zeros(()))
    with torch.no_grad(), evaluating(probe):
        h = probe.encode(like.new_full((1, 3, height, width), 0.5))
        back = probe.decode(h)
    if h.ndim != 4 or back.shape != (1, 3, height, width):
        raise ValueError(
            f"the autoencoder turns an image {[3, height, width]} into {list(h.shape[1:])} and back into "
            f"{list(back.shape[1:])}: it needs another image size, or is none"
        )
    return h.shape[1], h.shape[2], h.shape[3]


def _numbers_of(codec: Codec, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """`codec.shape`. ValueError: `encode` or `decode` gives another shape, the codec is for other images, or it says
    that it is exact and changes random images by a thousandth of their range or more."""
    if tuple(codec.image_shape) != tuple(image_shape):
        raise ValueError(f"the codec is for images {list(codec.image_shape)}, and these are {list(image_shape)}")
    if codec.ready:
        name = type(codec).__name__
        pixels, g = codec.pixel_range, torch.Generator().manual_seed(0)
        low, high = pixels.limits
        x = pixels.from_floats(torch.rand(2, *image_shape, generator=g) * (high - low) + low)
        start = x = pixels.to_floats(x, torch.float32).to(codec._like)
        for method, wanted in ((codec.encode, codec.shape), (codec.decode, image_shape)):
            with torch.no_grad():
                x = method(x)
            if tuple(x.shape) != (2, *wanted):
                shown = f"{name}.{method.__name__}"
                raise ValueError(f"{shown} must give {[2, *wanted]} for two images, got {list(x.shape)}")
        if codec.exact and not float((x - start).abs().max()) < 1e-3 * (high - low):
            raise ValueError(f"{name} says that it is exact, but decode(encode(x)) differs from x: leave out `exact`")
    return codec.shape


def _padded(autoencoder: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width, extended so that the autoencoder divides them."""
    factor = getattr(autoencoder, "factor", None) or 1
    height, width = (-(-side // factor) * factor for side in image_shape[1:])
    return height, width
