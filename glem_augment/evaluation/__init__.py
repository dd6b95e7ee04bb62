"""Measurements of models (`metrics`) and of generated images (`quality`), and pictures."""

from glem_augment.evaluation.metrics import calibrate, calibration_error, evaluate, spread
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.evaluation.quality import (
    coverage,
    feature_fid,
    features_and_logits,
    label_reliability,
    memorisation_ratio,
    nearest,
)

__all__ = ["Section", "calibrate", "calibration_error", "compose", "coverage", "evaluate", "feature_fid"]
__all__ += ["features_and_logits", "label_reliability", "memorisation_ratio", "nearest", "spread"]
