"""Training of models."""

from importlib import import_module
from typing import Any

from glem_augment.training.config import TrainConfig

__all__ = ["EXIT_TIME_UP", "TimeUpError", "TrainConfig", "Trainer"]
_MODULES = {"EXIT_TIME_UP": "stop", "TimeUpError": "stop", "Trainer": "trainer"}


def __getattr__(name: str) -> Any:
    # The trainer imports torch, for which the help of `glem train` need not wait.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
