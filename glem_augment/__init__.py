"""Moves along class modes (PCA jitter per class) and synthetic images for timm and torchvision (GLEM).

Public names and sub-packages (`glem_augment.training`, ...) are imported when they are first used, and torch with them.
So `glem --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers do not follow `__getattr__`
    from glem_augment.augment.policies import Adversarial, Mixup, Noise, Policy
    from glem_augment.augment.transform import GLEMAugment
    from glem_augment.classes.gaussians import ClassGaussians
    from glem_augment.classes.privacy import Privacy
    from glem_augment.errors import (
        BadImageError,
        ClassMismatchError,
        DataError,
        GLEMError,
        HubError,
        ModelFileError,
        TrainingError,
    )
    from glem_augment.flows import create_flow
    from glem_augment.images.dataset import ImageData, open_data
    from glem_augment.images.matching import match_classes
    from glem_augment.model.glem import GLEM
    from glem_augment.synthetic.combined import RealAndSynthetic
    from glem_augment.synthetic.dataset import SyntheticDataset
    from glem_augment.training import TrainConfig as TrainConfig
    from glem_augment.training import Trainer as Trainer

__version__ = "0.1.0"

__all__ = [
    "GLEM",
    "Adversarial",
    "BadImageError",
    "ClassGaussians",
    "ClassMismatchError",
    "DataError",
    "GLEMAugment",
    "GLEMError",
    "HubError",
    "ImageData",
    "Mixup",
    "ModelFileError",
    "Noise",
    "Policy",
    "Privacy",
    "RealAndSynthetic",
    "SyntheticDataset",
    "TrainingError",
    "create_flow",
    "match_classes",
    "open_data",
]
_MODULES = {
    "augment.transform": "GLEMAugment",
    "augment.policies": "Adversarial Mixup Noise Policy",
    "images.matching": "match_classes",
    "images.dataset": "ImageData open_data",
    "errors": "BadImageError ClassMismatchError DataError GLEMError HubError ModelFileError TrainingError",
    "flows": "create_flow",
    "classes.gaussians": "ClassGaussians",
    "classes.privacy": "Privacy",
    "model.glem": "GLEM",
    "synthetic.combined": "RealAndSynthetic",
    "synthetic.dataset": "SyntheticDataset",
    "training": "TrainConfig Trainer",  # not in __all__, because they import timm
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
