"""Measuring what a flow generates and knows: FID, Coverage, label reliability, out-of-distribution, memorisation.

Every function takes tensors and says what it counts; ``classifier`` trains the oracle whose features and verdicts most
of them need. ``glem_augment.evaluation.metrics.evaluate`` measures the flow itself (accuracy, bits/dim, calibration).
"""

from glem_augment.evaluation.averaging import averaged_posterior
from glem_augment.evaluation.classifier import Classifier, Recipe, train_classifier
from glem_augment.evaluation.continuum import ContinuumFit, continuum_correlation, mantel, spearman
from glem_augment.evaluation.coverage import coverage, nearest_distances
from glem_augment.evaluation.features import feature_fid
from glem_augment.evaluation.memorisation import likelihood_gap, memorisation_ratio
from glem_augment.evaluation.ood import auroc, ood_images, ood_scores

__all__ = [
    "Classifier",
    "ContinuumFit",
    "Recipe",
    "auroc",
    "averaged_posterior",
    "continuum_correlation",
    "coverage",
    "feature_fid",
    "likelihood_gap",
    "mantel",
    "memorisation_ratio",
    "nearest_distances",
    "ood_images",
    "ood_scores",
    "spearman",
    "train_classifier",
]
