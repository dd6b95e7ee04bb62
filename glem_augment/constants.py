"""Words and numbers that the command line's help shows, in a file that does not import torch."""

from __future__ import annotations

from typing import Literal, get_args

Preset = Literal[
    "mef_tiny", "mef_small", "mef_cifar", "mef_glem", "glow_tiny", "glow_fast", "jet_tiny", "jet_imagenet64", "identity"
]
Source = Literal["gaussian", "rfcm", "mixup"]  # what a SyntheticDataset draws its latents from
Format = Literal["imagefolder", "webdataset"]  # of an export
Policy = Literal["mixup", "noise", "adversarial"]  # how GLEMAugment moves latents
Memory = Literal["stored", "reversible"]  # what becomes of a flow's activations in training

PRESET_NAMES, SOURCES, FORMATS = get_args(Preset), get_args(Source), get_args(Format)
# These need nothing but images and labels; "adversarial" needs a classifier too.
POLICIES: tuple[Literal["mixup", "noise"], ...] = ("mixup", "noise")
DEFAULT_MODES = 64  # principal modes per class
# Without psi the class variances start at the first number and stay above the second, a share of the first.
INITIAL_VARIANCE, LOWEST_SHARE = 0.3, 0.1
