"""Checks of batches and labels."""

from __future__ import annotations

import torch
from torch import Tensor


def check_batch(x: object) -> None:
    """ValueError unless x is a batch of images."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a batch of images [B, C, H, W], got {got}")


def check_labels(y: object, batch: int, num_classes: int, look: bool, advice: str = "class_map") -> None:
    """Labels of a batch: int64 [batch], or floating point [batch, num_classes].

    Args:
        look: check the values of integer labels too, for which an accelerator has to be waited for.
        advice: the argument to give for other classes.

    Raises:
        ValueError, TypeError: naming what was given and what is allowed.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of labels, got {type(y).__name__}")
    if y.ndim not in (1, 2) or y.shape[0] != batch:
        raise ValueError(f"y must be int64 [{batch}] or soft [{batch}, {num_classes}], got {tuple(y.shape)}")
    if y.ndim == 2:
        if not y.is_floating_point():
            raise TypeError(f"soft labels must be floating point, got {y.dtype}")
        if y.shape[1] != num_classes:
            raise ValueError(f"soft labels have {y.shape[1]} classes, not {num_classes}: give class_map")
        return
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels must be integers (int64), got {y.dtype}")
    if batch and look:
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"label {low if low < 0 else high} is out of range: this transform knows classes 0 to "
                f"{num_classes - 1}; give {advice} if the data has {'more' if advice == 'num_classes' else 'other'} "
                "classes" + (" than the flow" if advice == "class_map" else "")
            )
