"""Images with labels, from any source."""

from glem_augment.images.dataset import ImageData, images_for, open_data
from glem_augment.images.matching import match_classes
from glem_augment.images.readers import to_tensor
from glem_augment.images.sources import open_source

__all__ = ["ImageData", "images_for", "match_classes", "open_data", "open_source", "to_tensor"]
