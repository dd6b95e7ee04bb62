"""Codecs between images and the numbers that a flow models."""

from glem_augment.codec.autoencoder import Autoencoder
from glem_augment.codec.codec import Codec, register_codec, to_unit
from glem_augment.codec.levels import Levels, Values
from glem_augment.codec.pixel_range import PixelRange
from glem_augment.codec.resize import PixelAdapter

__all__ = ["Autoencoder", "Codec", "Levels", "PixelAdapter", "PixelRange", "Values", "register_codec", "to_unit"]
