"""Measuring a flow (`metrics`), what it generates (`quality`), and which augmentation to use (`tuning`)."""

from glem_augment.evaluation.metrics import evaluate
from glem_augment.evaluation.quality import (
    coverage,
    feature_fid,
    features_and_logits,
    label_reliability,
    memorisation_ratio,
)
from glem_augment.evaluation.tuning import choose_strength, moves_put_back

__all__ = ["choose_strength", "coverage", "evaluate", "feature_fid", "features_and_logits"]
__all__ += ["label_reliability", "memorisation_ratio", "moves_put_back"]
