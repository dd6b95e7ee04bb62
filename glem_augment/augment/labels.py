"""Labels that follow a move: which kind comes out, and soft labels of moved rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glem_augment.augment.lookup import ClassTables
from glem_augment.augment.params import FROM_BATCH, AugmentParams
from glem_augment.devices import move

_MOST_SMOOTHING = 0.3


def label_kind(labels: str, partnered: bool, same_class: bool, soft_in: bool) -> str:
    """What to do with labels: "hard" (nothing), "soft" (make them [B, K']), "mix" or "posterior".

    Args:
        labels: as given to GLEMAugment; partnered: whether another image or class takes part; same_class: whether
            that one is of the same class; soft_in: whether soft labels came in.
    """
    if labels == "auto":
        return "hard" if not partnered or (same_class and not soft_in) else "mix"
    if labels == "mix" and not partnered:
        return "soft"
    return labels


def soft_labels(y: Tensor, num_classes: int) -> Tensor:
    """y itself if soft, else one-hot float32 [B, K']."""
    if y.ndim == 2:
        return y
    # Compared rather than scattered: a label out of range gives zeros instead of a device assertion.
    return (y[:, None] == torch.arange(num_classes, device=y.device)).to(torch.float32)


def smoothing_floor(soft: Tensor) -> Tensor:
    """What label smoothing gives to every class, a number []: the least entry of a batch [B, K'].

    Of a batch, since a single row may have been mixed of all classes; so may every row where there are two, and nobody
    smooths by more than ``_MOST_SMOOTHING``.
    """
    if soft.numel() == 0:
        return soft.new_zeros(())
    low = soft.amin().clamp(min=0.0)
    return torch.where(low * soft.shape[1] > _MOST_SMOOTHING, 0.0, low)


def pure_labels(cls: Tensor, soft: Tensor) -> Tensor:
    """Labels [n, K'] of images of the classes cls int64 [n] alone, smoothed as those of the batch soft [B, K'] are."""
    floor = smoothing_floor(soft)
    one_hot = (cls[:, None] == torch.arange(soft.shape[1], device=soft.device)).to(soft.dtype)
    return floor + (1.0 - soft.shape[1] * floor) * one_hot


def is_pure(y: Tensor) -> Tensor:
    """bool [B]: rows whose label is (nearly) one class, smoothed or not; others are mixtures, of no class's own."""
    if y.ndim == 1:
        return torch.ones_like(y, dtype=torch.bool)
    return y.amax(dim=1) >= 0.95 * (1.0 - (y.shape[1] - 1) * smoothing_floor(y))


def data_class(y: Tensor) -> Tensor:
    """int64 [B], the (strongest) class of hard or soft labels."""
    return y.argmax(dim=1) if y.ndim == 2 else y.long()


def moved_labels(
    kind: str,
    soft: Tensor,
    tables: ClassTables,
    params: AugmentParams,
    keep: Tensor,
    share: Tensor,
    posterior: Callable[[], Tensor],
) -> Tensor:
    """Soft labels [B, K'] after the move, all on the device of `soft` (`share` may be elsewhere).

    Args:
        kind: "mix" or "posterior".
        soft: [B, K'] before the move.
        keep: bool [n], rows that were moved after all.
        share: [n], the part of |z_j - z_i|^2 that the projection kept.
        posterior: gives p(flow class | z') [n, K].
    """
    own = soft.index_select(0, params.rows)
    if kind == "posterior":
        new, usable = tables.data_probability(move(posterior(), soft.device))
        keep = keep & usable
    else:
        drawn_cls = tables.data_class(params.partner_cls, params.cls, data_class(own))
        from_batch = (params.source == FROM_BATCH)[:, None]
        other = torch.where(from_batch, soft[params.partner.clamp(min=0)], pure_labels(drawn_cls, soft))
        weight = (1.0 - params.l) * move(share, soft.device)
        new = own + weight[:, None].to(own.dtype) * (other - own)
    return soft.index_copy(0, params.rows, torch.where(keep[:, None], new.to(soft.dtype), own))
