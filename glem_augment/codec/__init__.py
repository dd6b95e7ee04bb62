"""Codecs between images and the numbers that a flow models: pixel levels, autoencoders, and resizing."""

from glem_augment.codec.autoencoder import Autoencoder
from glem_augment.codec.codec import Codec, to_unit
from glem_augment.codec.image_range import to_uint8
from glem_augment.codec.levels import Levels
from glem_augment.codec.resize import PixelAdapter

__all__ = ["Autoencoder", "Codec", "Levels", "PixelAdapter", "to_uint8", "to_unit"]
