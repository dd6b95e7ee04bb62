"""Fitting a GLEM to images."""

from glem_augment.training.config import TrainConfig
from glem_augment.training.trainer import EXIT_TIME_UP, TimeUpError, Trainer

__all__ = ["EXIT_TIME_UP", "TimeUpError", "TrainConfig", "Trainer"]
