"""Frechet distance between two sets of features (FID of Heusel et al. 2017, on any network's features)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glem_augment.errors import DataError

_ROWS = 4096


class _Features(nn.Identity):
    """What torchmetrics takes for its network: the features come in ready-made."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def check_features(features: Tensor, what: str, least: int = 1) -> Tensor:
    """``features`` [N, m] in float64 on the CPU.

    Raises:
        ValueError: another shape; DataError: fewer than ``least`` rows, or values that are not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"{what} must be features [N, m], got shape {list(features.shape)}")
    if len(features) < least:
        raise DataError(f"{what} holds {len(features)} images, at least {least} are needed: use more")
    wide = features.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(wide).all()):
        raise DataError(f"{what} holds features that are not finite")
    return wide


def feature_fid(real: Tensor, generated: Tensor) -> float:
    """``|m_r - m_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^1/2)`` by torchmetrics, in float64.

    The number depends on the network and on how many images went in (it falls with more): state both.

    Args:
        real, generated: features [N, m] and [M, m]; N, M >= 2.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed. ValueError, DataError: features that can't be used.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise ModuleNotFoundError("FID needs torchmetrics: pip install 'glem-augment[metrics]'") from None
    real, generated = check_features(real, "real", 2), check_features(generated, "generated", 2)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features must have one width, got {real.shape[1]} and {generated.shape[1]}")
    # The distance does not depend on where the origin is; uncentred sums of squares would lose digits to it.
    centre = real.mean(0)
    fid = FrechetInceptionDistance(feature=_Features(real.shape[1]), normalize=True)
    for part in real.split(_ROWS):
        fid.update(part - centre, real=True)
    for part in generated.split(_ROWS):
        fid.update(part - centre, real=False)
    return float(fid.compute())
