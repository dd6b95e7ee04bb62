"""Synthetic-data augmentation for timm and torchvision from a class-conditional normalizing flow (GLEM)."""

from glem_augment.augment import GLEMAugment
from glem_augment.data import ImageData, open_data
from glem_augment.errors import ClassMismatchError, DataError, GLEMError, ModelFileError, TrainingError
from glem_augment.flows import create_flow
from glem_augment.gaussians import ClassGaussians
from glem_augment.model import GLEM
from glem_augment.synthetic import SyntheticDataset

__version__ = "0.1.0"

__all__ = [
    "GLEM",
    "ClassGaussians",
    "ClassMismatchError",
    "DataError",
    "GLEMAugment",
    "GLEMError",
    "ImageData",
    "ModelFileError",
    "SyntheticDataset",
    "TrainingError",
    "create_flow",
    "open_data",
]
