"""Allowed values of arguments; the command line has them without torch."""

from __future__ import annotations

from typing import Literal, get_args

Preset = Literal["mef_tiny", "mef_small", "mef_cifar", "mef_glem", "glow_tiny", "glow_fast", "latent", "identity"]
DrawSource = Literal["gaussian", "rfcm"]  # the source of a SyntheticDataset's latents
Format = Literal["imagefolder", "webdataset"]  # of an export
PolicyName = Literal["mixup", "noise", "adversarial"]  # how GLEMAugment moves latents

PRESET_NAMES, SOURCES, FORMATS = (get_args(kind) for kind in (Preset, DrawSource, Format))
DEFAULT_MODES = 64  # principal modes per class
# Without psi the class variances start at the first number, unless the objective sets them. They stay above the second,
# a share of the first.
INITIAL_VARIANCE, LOWEST_SHARE = 0.3, 0.1
HIGHEST_TEMPERATURE = 1e4  # of a posterior; the lowest is 1
