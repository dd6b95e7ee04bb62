"""GLEMAugment in the place of timm's `mixup_fn`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.data.mixup import FastCollateMixup, Mixup
from torch import Tensor

from glem_augment.augment.labels import soft_labels
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import check_number


class MixupFn:
    """`(x, y) -> (x', y')` with y' always soft [B, K'], as timm's training loop calls its `mixup_fn`.

    With `mixup_enabled = False` images do not change and labels are only smoothed.

    Args:
        smoothing: label smoothing s: 1 - s + s / K' for the class, s / K' for other classes.
        mixup: a timm `Mixup` to apply afterwards, without its label_smoothing; None: none.
        data: the data set, whose classes are checked; None: nothing is checked.
    """

    def __init__(self, aug: GLEMAugment, smoothing: float = 0.0, mixup: Mixup | None = None, data: Any = None) -> None:
        if isinstance(mixup, FastCollateMixup):
            raise TypeError("a FastCollateMixup goes to the DataLoader, as aug.collate_fn(base=FastCollateMixup(...))")
        aug.check_data(data)
        self.aug, self.mixup = aug, mixup
        self.label_smoothing = check_number("smoothing", smoothing, 0.0, 1.0)
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Augment images [B, C, H, W] with targets int64 [B], or soft [B, K'], which are not smoothed again."""
        classes = self.aug.num_classes
        self.aug.classes_of(target, len(x))
        soft = soft_labels(target, classes)
        if self.mixup_enabled:
            x, soft = self.aug(x, soft)
            if self.mixup is not None:
                x, soft = _mix_soft(self.mixup, x, soft)
        # Smoothing comes last, so that mixed labels are smoothed like any other label.
        s = self.label_smoothing if target.ndim == 1 else 0.0
        return x, soft * (1.0 - s) + s / classes if s else soft


def _mix_soft(mixup: Mixup, x: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Apply timm's Mixup or CutMix, without its smoothing, to images [B, C, H, W] and soft labels [B, K'].

    timm takes only integer labels. From row numbers as classes it makes the weights that mix the soft labels.
    """
    weights_only = copy.copy(mixup)
    weights_only.num_classes, weights_only.label_smoothing, weights_only.multi_label = len(x), 0.0, False
    x, weights = weights_only(x.clone(), torch.arange(len(x), device=soft.device))  # Mixup overwrites its input
    return x, weights.to(soft.dtype) @ soft
