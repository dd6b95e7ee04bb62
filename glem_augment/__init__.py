"""Synthetic-data augmentation for timm and torchvision from a class-conditional normalizing flow (GLEM).

What is named here is imported when it is first used, and torch and torchvision with it: ``glem --help`` and a settings
script need not wait for them. So are the modules: ``glem_augment.training``, ``glem_augment.evaluation``,
``glem_augment.evaluation.tuning``, ``glem_augment.latent.rfcm``, ...
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glem_augment.augment.transform import GLEMAugment
    from glem_augment.data.classes import match_classes
    from glem_augment.data.dataset import ImageData, open_data
    from glem_augment.errors import (
        BadImageError,
        ClassMismatchError,
        DataError,
        GLEMError,
        ModelFileError,
        TrainingError,
    )
    from glem_augment.flows import create_flow
    from glem_augment.hub.files import HubError
    from glem_augment.latent.gaussians import ClassGaussians
    from glem_augment.model.glem import GLEM
    from glem_augment.synthetic.combined import RealAndSynthetic
    from glem_augment.synthetic.dataset import SyntheticDataset
    from glem_augment.synthetic.stream import SyntheticStream

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
_HOMES = {
    "BadImageError": "glem_augment.errors",
    "ClassGaussians": "glem_augment.latent.gaussians",
    "ClassMismatchError": "glem_augment.errors",
    "DataError": "glem_augment.errors",
    "GLEM": "glem_augment.model.glem",
    "GLEMAugment": "glem_augment.augment.transform",
    "GLEMError": "glem_augment.errors",
    "HubError": "glem_augment.hub.files",
    "ImageData": "glem_augment.data.dataset",
    "ModelFileError": "glem_augment.errors",
    "RealAndSynthetic": "glem_augment.synthetic.combined",
    "SyntheticDataset": "glem_augment.synthetic.dataset",
    "SyntheticStream": "glem_augment.synthetic.stream",
    "TrainingError": "glem_augment.errors",
    "create_flow": "glem_augment.flows",
    "match_classes": "glem_augment.data.classes",
    "open_data": "glem_augment.data.dataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
