"""Fitting a GLEM to images."""

from glem_augment.training.config import TrainConfig
from glem_augment.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
