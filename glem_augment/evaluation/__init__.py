"""Measuring a flow (`metrics`) and generated images (`quality`)."""

from glem_augment.evaluation.metrics import calibrate, evaluate, moves_put_back
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
__all__ += ["label_reliability", "latent_features", "memorisation_ratio", "moves_put_back", "quality_report"]
