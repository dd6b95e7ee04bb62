"""Codecs between images and the numbers that a flow models: pixel levels, autoencoders, and resizing."""

from glem_augment.codec.plausible import to_uint8
from glem_augment.codec.resize import PixelAdapter

__all__ = ["PixelAdapter", "to_uint8"]
