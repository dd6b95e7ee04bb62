"""GLEMAugment in the place of timm's `Mixup`, alone or together with it: `aug.as_mixup_fn()`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from timm.data.mixup import FastCollateMixup, Mixup
from torch import Tensor

from glem_augment.checks import check_choice, check_number

if TYPE_CHECKING:
    from glem_augment.augment.transform import GLEMAugment


def mix_soft(mixup: Mixup, x: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Apply timm's Mixup or CutMix to labels that are soft already, which it does not take.

    Its labels are linear in the one-hot rows: those of the row numbers are the weights with which rows were mixed.

    Args:
        mixup: its own smoothing is left out; x: [B, C, H, W], B even, overwritten as Mixup does; soft: [B, K'].

    Returns:
        images, and soft labels [B, K'].
    """
    if len(x) == 0:
        return x, soft
    weights_only = copy.copy(mixup)
    weights_only.num_classes, weights_only.label_smoothing, weights_only.multi_label = len(x), 0.0, False
    x, weights = weights_only(x, torch.arange(len(x), device=soft.device))
    return x, weights.to(soft.dtype) @ soft


class MixupFn:
    """`(x, y) -> (x', y')` with y' always soft [B, K'], as timm's training loop calls its `mixup_fn`.

    Args:
        aug: the transform.
        smoothing: label smoothing: 1 - s + s / K' for the class, s / K' for the others.
        mixup: a timm `Mixup` to apply as well (its label_smoothing is not used, `smoothing` is); None: none.
        order: "aug" first or "mixup" first.

    Attributes:
        mixup_enabled: settable; without it images are left alone and labels only smoothed.

    Raises:
        ValueError, TypeError: for an argument out of range.
    """

    def __init__(
        self, aug: GLEMAugment, smoothing: float = 0.0, mixup: Mixup | None = None, order: str = "aug"
    ) -> None:
        check_choice("order", order, ("aug", "mixup"))
        if isinstance(mixup, FastCollateMixup):
            raise TypeError(
                "a FastCollateMixup mixes lists of samples: give a timm.data.Mixup here, or "
                "aug.collate_fn(base=FastCollateMixup(...)) to the DataLoader"
            )
        if mixup is not None and not isinstance(mixup, Mixup):
            raise TypeError(f"mixup must be a timm.data.Mixup, got {type(mixup).__name__}")
        self.aug, self.mixup, self.order = aug, mixup, order
        self.label_smoothing = check_number("smoothing", smoothing, 0.0, 1.0)
        self.mixup_enabled = True

    @property
    def num_classes(self) -> int:
        """K'."""
        return self.aug.num_classes

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            x: [B, C, H, W]; target: int64 [B] or soft [B, K'] (then not smoothed again).

        Returns:
            images, soft labels float [B, K'].

        Raises:
            ValueError, TypeError: for labels or images that the transform does not take.
        """
        k, s = self.num_classes, self.label_smoothing if target.ndim == 1 else 0.0
        soft = self.aug.soft_target(target)
        for name in ("aug", "mixup") if self.order == "aug" else ("mixup", "aug"):
            if not self.mixup_enabled:
                break
            if name == "aug":
                x, soft = self.aug(x, soft)
            elif self.mixup is not None:
                # Mixup overwrites its input: the user's own batch, unless the transform has made a new one.
                x, soft = mix_soft(self.mixup, x, soft)
        # Last: a posterior is smoothed like any other label, and nothing has to guess what smoothing came in.
        return x, soft * (1.0 - s) + s / k if s else soft

    def __repr__(self) -> str:
        extra: Any = "" if self.mixup is None else f", mixup={self.mixup!r}, order={self.order!r}"
        return f"MixupFn({self.aug!r}, smoothing={self.label_smoothing}{extra})"
