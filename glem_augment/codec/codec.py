"""The contract of a codec: image <-> the numbers that a flow models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glem_augment.codec.levels import Noise, check_images


class Codec(nn.Module):
    """Image <-> numbers. A new codec is a subclass with `encode` and `decode`, both differentiable.

    Args:
        image_shape: (C, H, W) of the images.
        shape: (c, h, w) of the numbers.

    Attributes:
        exact: whether `decode` undoes `encode`. If not, a moved image is x + decode(z') - decode(z).
        key, unit: the name of a likelihood in metrics, and its unit in words.
        most: images per pass, which bounds the memory of activations.
    """

    _like: Tensor
    exact = False
    key, unit = "nats_per_number", "nats per number"
    most = 256

    def __init__(self, image_shape: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape, self.shape = image_shape, shape
        # It has the device and the dtype of the model.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def encode(self, x: Tensor, noise: Noise = None) -> Tensor:
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
