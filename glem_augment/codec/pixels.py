"""The codec of a flow on pixels: the levels of uint8 images."""

from __future__ import annotations

import math

from torch import Tensor

from glem_augment.codec.codec import Codec
from glem_augment.codec.levels import Dequantisation, from_levels, to_levels


class Levels(Codec):
    """Pixels as levels, `(level + u) / 2^bits - 1/2` with dequantisation noise u. Densities are over levels.

    Args:
        image_shape: (C, H, W).
        bits: the top bits of each channel that are modelled, 1 to 8.
    """

    levels = exact = True
    key, unit = "bits_per_dim", "bits/dim"

    def __init__(self, image_shape: tuple[int, int, int], bits: int = 8) -> None:
        super().__init__(image_shape, image_shape)
        self.bits = bits

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        return to_levels(x, self.bits, self.dtype, noise)

    def decode(self, h: Tensor) -> Tensor:
        return from_levels(h, self.bits)

    def logdet(self) -> float:
        return -math.prod(self.shape) * self.bits * math.log(2)

    @property
    def divisor(self) -> float:
        """The number of dimensions times ln 2."""
        return math.prod(self.shape) * math.log(2)
