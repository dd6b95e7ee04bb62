"""Soft labels."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.tensors import send

MOST_SMOOTHING = 0.3  # more label smoothing than this is taken for a mixture


def soft_labels(y: Tensor, num_classes: int) -> Tensor:
    """y itself if it is soft, else one-hot float32 [B, K']."""
    return y if y.ndim == 2 else torch.nn.functional.one_hot(y.long(), num_classes).to(torch.float32)


def mixed_labels(soft: Tensor, rows: Tensor, partner: Tensor, drawn_cls: Tensor, away: Tensor) -> Tensor:
    """Labels [n, K'] of mixed rows: (1 - away) y_i + away y_j.

    Args:
        soft: [B, K'], the labels before.
        rows: int64 [n], the mixed rows i.
        partner: int64 [n], their partners j; -1: a draw from the data class in `drawn_cls`, int64 [n].
        away: [n] in [0, 1], the weight of the partner's label.
    """
    device, num_classes = soft.device, soft.shape[1]
    own = soft.index_select(0, send(rows, device))
    # Label smoothing gives every class the same part, the least entry of the batch. (A row may mix all classes.)
    least = soft.amin().clamp(min=0.0)
    floor = torch.where(least * num_classes > MOST_SMOOTHING, 0.0, least)
    pure = soft_labels(send(drawn_cls, device), num_classes).to(soft.dtype)
    drawn = floor + (1.0 - num_classes * floor) * pure
    partner = send(partner, device)
    other = torch.where((partner < 0)[:, None], drawn, soft.index_select(0, partner.clamp(min=0)))
    return own + away.to(device)[:, None].to(soft.dtype) * (other - own)
