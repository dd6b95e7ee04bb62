"""A frozen autoencoder with standardised latents, between images and the latents that a flow models."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from glem_augment.tensors import evaluating

_MIN_STD = 1e-3  # a channel that never varies would otherwise become infinite


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


class StandardisedAutoencoder(nn.Module):
    """A frozen autoencoder with its latents standardised per channel: `h = (E(x) - mean) / std`.

    Latents of published autoencoders differ in scale from family to family and from channel to channel. So `fit` takes
    mean and standard deviation from images, once. They are stored with the model; the autoencoder is not. It is put
    into eval mode and frozen.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor

    def __init__(self, autoencoder: nn.Module, channels: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def train(self, mode: bool = True) -> StandardisedAutoencoder:
        """Stay in eval mode: the autoencoder is frozen."""
        return super().train(False)

    def raw(self, x: Tensor) -> Tensor:
        """RGB images [B,3,H,W] in [0, 1] to latents [B,C,h,w] as the autoencoder gives them; differentiable."""
        return self.autoencoder.encode(x)  # type: ignore[operator]

    def encode(self, x: Tensor) -> Tensor:
        """RGB images [B,3,H,W] in [0, 1] to standardised latents [B,C,h,w]; differentiable."""
        return (self.raw(x) - self.mean) / self.std

    def decode(self, h: Tensor) -> Tensor:
        """Standardised latents [B,C,h,w] to RGB images [B,3,H,W]; differentiable."""
        return self.autoencoder.decode(h * self.std + self.mean)  # type: ignore[operator]

    def logdet(self, pixels: int) -> Tensor:
        """log|det dh / dE(x)| in nats, the same for all images, for latents of h * w `pixels`."""
        return -self.std.log().sum() * pixels

    @torch.no_grad()
    def fit(self, h: Tensor) -> None:
        """Set mean and standard deviation from raw latents h [B,C,h,w], unless that was done before."""
        if not self.fitted:
            h = h.double()
            self.mean.copy_(h.mean((0, 2, 3))[:, None, None])
            self.std.copy_(h.std((0, 2, 3)).clamp_min(_MIN_STD)[:, None, None])
            self.fitted.fill_(True)


def latent_shape(autoencoder: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images (3, H, W). TypeError: no autoencoder. ValueError: it can't take them."""
    if not (isinstance(autoencoder, nn.Module) and isinstance(autoencoder, Autoencoder)):
        raise TypeError(f"an autoencoder is a module with encode and decode, got {type(autoencoder).__name__}")
    channels, height, width = image_shape
    if channels != 3:
        raise ValueError(f"an autoencoder takes images of 3 channels, got {channels}: open the data with channels=3")
    factor, found = getattr(autoencoder, "factor", None), getattr(autoencoder, "channels", None)
    if isinstance(factor, int) and isinstance(found, int):
        if factor < 1 or found < 1:
            raise ValueError(f"factor and channels of an autoencoder must be at least 1, got {factor} and {found}")
        if height % factor or width % factor:
            near = [max(1, round(side / factor)) * factor for side in (height, width)]
            raise ValueError(
                f"the autoencoder needs height and width divisible by {factor}, got {height}x{width}; resize to "
                f"{near[0]}x{near[1]}"
            )
        return found, height // factor, width // factor
    try:  # shapes without memory, where the module can
        h, back = _tried(autoencoder, image_shape, torch.device("meta"))
    except Exception:
        try:
            h, back = _tried(autoencoder, image_shape, None)
        except Exception as error:
            raise ValueError(f"the autoencoder can't take an image {list(image_shape)}: {error}") from error
    if h.ndim != 4 or back.shape != (1, *image_shape):
        raise ValueError(
            f"the autoencoder turns an image {list(image_shape)} into {list(h.shape[1:])} and back into "
            f"{list(back.shape[1:])}: it needs another image size, or is none"
        )
    return h.shape[1], h.shape[2], math.prod(h.shape[3:])


def _tried(
    autoencoder: nn.Module, image_shape: tuple[int, int, int], device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """Latents and image of one grey image, on `device` or the autoencoder's."""
    probe: Any = copy.deepcopy(autoencoder).to(device)  # a user's module may change when it is called
    some = next((t for t in probe.parameters() if t.is_floating_point()), torch.zeros((), device=device or "cpu"))
    with torch.no_grad(), evaluating(probe):
        h = probe.encode(torch.full((1, *image_shape), 0.5, dtype=some.dtype, device=some.device))
        return h, probe.decode(h)
