"""Measurements of models, in numbers (`metrics`) or in `pictures`."""

from glem_augment.evaluation.metrics import calibrate, calibration_error, evaluate, spread
from glem_augment.evaluation.pictures import Section, compose

__all__ = ["Section", "calibrate", "calibration_error", "compose", "evaluate", "spread"]
