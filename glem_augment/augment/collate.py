"""GLEMAugment as a collate function, in the CPU workers of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data.mixup import FastCollateMixup
from torch.utils.data import default_collate, get_worker_info

from glem_augment.augment.samples import augment_batch
from glem_augment.augment.transform import GLEMAugment


class AugmentingCollate(FastCollateMixup):
    """Collates samples with `base` and augments the batch, in the CPU workers of a DataLoader.

    It is a `FastCollateMixup` by type only, because timm's loader looks for that type: `loader.mixup_enabled = False`
    turns it off, in running workers too, and also a FastCollateMixup that is its `base`.

    Args:
        aug: the transform; its model must be on the CPU in forked workers.
        base: a function from a list of samples to a batch of images and labels; None: torch's `default_collate`.
        data: the data set, whose classes are checked now. Workers check their data set; without workers there is no
            other check.
    """

    def __init__(self, aug: GLEMAugment, base: Callable[[list[Any]], Any] | None = None, data: Any = None) -> None:
        aug.check_data(data)
        self._checked = False
        self.aug, self.base = aug, base or default_collate
        # In shared memory, so that persistent workers see a change of the switch.
        with torch.inference_mode(False):
            self._on = torch.ones(1, dtype=torch.bool, device="cpu").share_memory_()
        super().__init__(num_classes=aug.num_classes)  # which switches it on

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are changed."""
        return bool(self._on[0])

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self._on[0] = bool(value)

    def __call__(self, batch: list[Any], _: Any = None) -> Any:
        """A batch of the type that `base` gives. ClassMismatchError: the worker's data has other classes."""
        worker = get_worker_info()
        if worker is not None and not self._checked:
            self.aug.check_data(worker.dataset)
            self._checked = True
        on = self.mixup_enabled
        if isinstance(self.base, FastCollateMixup):
            self.base.mixup_enabled = on
        return augment_batch(self.aug, self.base(batch), on)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._on.share_memory_()  # for the workers of this copy
