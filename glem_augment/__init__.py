"""Synthetic-data augmentation for timm and torchvision from a class-conditional normalizing flow (GLEM).

Rooms of their own, imported when they are wanted: ``glem_augment.training``, ``glem_augment.evaluation``,
``glem_augment.tuning``, ``glem_augment.rfcm_fit``.
"""

from glem_augment.augment import GLEMAugment
from glem_augment.classmatch import match_classes
from glem_augment.data import ImageData, open_data
from glem_augment.errors import (
    BadImageError,
    ClassMismatchError,
    DataError,
    GLEMError,
    ModelFileError,
    TrainingError,
)
from glem_augment.flows import create_flow
from glem_augment.gaussians import ClassGaussians
from glem_augment.hub import HubError
from glem_augment.mixing import RealAndSynthetic
from glem_augment.model import GLEM
from glem_augment.stream import SyntheticStream
from glem_augment.synthetic import SyntheticDataset

__version__ = "0.1.0"

__all__ = [
    "GLEM",
    "BadImageError",
    "ClassGaussians",
    "ClassMismatchError",
    "DataError",
    "GLEMAugment",
    "GLEMError",
    "HubError",
    "ImageData",
    "ModelFileError",
    "RealAndSynthetic",
    "SyntheticDataset",
    "SyntheticStream",
    "TrainingError",
    "create_flow",
    "match_classes",
    "open_data",
]
