"""Measuring a flow (`metrics`) and generated images (`quality`)."""

from glem_augment.evaluation.metrics import calibrate, evaluate, rejected_moves
from glem_augment.evaluation.quality import (
    coverage,
    feature_fid,
    features_and_logits,
    label_reliability,
    latent_features,
    memorisation_ratio,
    quality_report,
)

__all__ = ["calibrate", "coverage", "evaluate", "feature_fid", "features_and_logits"]
__all__ += ["label_reliability", "latent_features", "memorisation_ratio", "quality_report", "rejected_moves"]
