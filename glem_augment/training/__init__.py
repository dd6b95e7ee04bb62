"""Training of models."""

from typing import Any

from glem_augment.training.config import TrainConfig

__all__ = ["TrainConfig", "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # it imports torch, for which the help of `glem train` need not wait
        from glem_augment.training.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
