"""Measurements of models (`metrics`) and of generated images (`quality`, `report`)."""

from glem_augment.evaluation import classifier
from glem_augment.evaluation.classifier import train_network
from glem_augment.evaluation.features import features_and_logits, latent_features
from glem_augment.evaluation.intervals import difference, interval
from glem_augment.evaluation.metrics import calibrate, calibration_error, evaluate, rejected_moves, spread
from glem_augment.evaluation.pictures import Section, compose, visible
from glem_augment.evaluation.preview import ModelClassifier
from glem_augment.evaluation.quality import coverage, feature_fid, label_reliability, memorisation_ratio, nearest
from glem_augment.evaluation.report import quality_report

__all__ = ["ModelClassifier", "Section", "calibrate", "calibration_error", "classifier", "compose", "coverage"]
__all__ += ["difference", "evaluate", "feature_fid", "features_and_logits", "interval", "label_reliability"]
__all__ += ["latent_features", "memorisation_ratio", "nearest", "quality_report", "rejected_moves", "spread"]
__all__ += ["train_network", "visible"]
