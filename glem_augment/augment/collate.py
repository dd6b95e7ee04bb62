"""GLEMAugment as a collate function, in the CPU workers of a DataLoader: `aug.collate_fn()`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.loader import fast_collate
from timm.data.mixup import FastCollateMixup
from torch import Tensor
from torch.utils.data import default_collate

from glem_augment.augment.v2 import like

if TYPE_CHECKING:
    from glem_augment.augment.transform import GLEMAugment


class AugmentingCollate(FastCollateMixup):
    """Collates samples with `base` and augments the batch.

    It is a `FastCollateMixup` by type only, so that timm's loader finds its switch: `loader.mixup_enabled = False`
    turns it off, in workers that are running too, and with it a FastCollateMixup that is its `base`.

    Args:
        aug: the transform; its flow must be on the CPU in forked workers.
        base: from a list of samples to a batch (images, labels, ...); None: timm's `fast_collate` for uint8 images
            (as timm's data sets give them for its prefetching loader), else torch's `default_collate`.
    """

    def __init__(self, aug: GLEMAugment, base: Callable[[list[Any]], Any] | None = None) -> None:
        if base is not None and not callable(base):
            raise TypeError(f"base must be a collate function, got {type(base).__name__}")
        self.aug, self.base = aug, base
        # Shared memory: workers that live through several epochs see a change of the switch.
        with torch.inference_mode(False):  # or it could not be switched outside it
            self._on = torch.ones(1, dtype=torch.bool, device="cpu").share_memory_()
        enabled = getattr(base, "mixup_enabled", True)
        super().__init__(num_classes=aug.num_classes)  # which switches it on
        self.mixup_enabled = enabled

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are changed."""
        return bool(self._on[0])

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self._on[0] = bool(value)
        if isinstance(self.base, FastCollateMixup):
            self.base.mixup_enabled = bool(value)

    def __call__(self, batch: list[Any], _: Any = None) -> Any:
        """A batch (images, labels, ...) of the type that `base` gives.

        Raises:
            TypeError: for samples or batches that are not (image, label, ...), or images that are no tensors yet.
        """
        on = self.mixup_enabled
        if isinstance(self.base, FastCollateMixup):  # a worker's copy
            self.base.mixup_enabled = on
        collated = (self.base or _default(batch))(batch)
        if not isinstance(collated, (tuple, list)) or len(collated) < 2 or not isinstance(collated[0], Tensor):
            raise TypeError(f"base must give a batch (images, labels), got {type(collated).__name__}")
        x, y, *rest = collated
        if on and not isinstance(y, Tensor):
            raise TypeError(
                f"labels must come as a tensor, one per image, got {type(y).__name__}: make soft ones tensors"
            )
        return like(collated, [*(self.aug if on else self.aug.unmoved)(x, y), *rest])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._on.share_memory_()  # a copy's is memory of its own, to be shared with its workers

    def __repr__(self) -> str:
        return f"AugmentingCollate({self.aug!r}, base={self.base!r})"


def _default(batch: Sequence[Any]) -> Callable[[list[Any]], Any]:
    if len(batch) == 0 or not isinstance(batch[0], (tuple, list)) or len(batch[0]) < 2:
        raise TypeError(f"samples must be (image, label), got {type(batch[0] if batch else batch).__name__}")
    image = batch[0][0][0] if isinstance(batch[0][0], tuple) else batch[0][0]  # timm's augmentation splits
    # fast_collate knows no other samples: it would leave out a third item, and cut a label of 2.7 to 2.
    pair = type(batch[0]) is tuple and len(batch[0]) == 2 and _whole(batch[0][1])
    if pair and isinstance(image, (np.ndarray, Tensor)) and image.dtype in (np.uint8, torch.uint8):
        return fast_collate
    if isinstance(image, np.ndarray):
        return default_collate
    if not isinstance(image, Tensor):
        raise TypeError(
            f"the data set gives images as {type(image).__name__}: end its transform with one that makes tensors, "
            "such as v2.ToImage() and v2.ToDtype(torch.float32, scale=True)"
        )
    return default_collate


def _whole(label: Any) -> bool:
    dtype = getattr(label, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex)
    return isinstance(label, Integral) or (dtype is not None and np.issubdtype(dtype, np.integer))
