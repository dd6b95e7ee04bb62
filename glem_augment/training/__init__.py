"""Fitting a GLEM to images."""

from importlib import import_module
from typing import Any

from glem_augment.training.config import TrainConfig

__all__ = ["EXIT_TIME_UP", "TimeUpError", "TrainConfig", "Trainer"]


def __getattr__(name: str) -> Any:
    # The trainer imports torch, for which the help of `glem train` need not wait.
    if name in __all__:
        return getattr(import_module(f"{__name__}.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
