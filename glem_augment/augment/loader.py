"""A loader whose batches are augmented."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch.utils.data import IterableDataset

from glem_augment.augment.samples import augment_batch
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import check_whole
from glem_augment.codec.resize import for_channels
from glem_augment.distributed import world_size


class AugmentedLoader:
    """A loader whose batches are augmented. All other attributes are the wrapped loader's.

    Args:
        loader: timm's `PrefetchLoader` (the best place on a GPU), a DataLoader, or a loader that accelerate has
            prepared: accelerate does not prepare this class, which then warns. For its batches see `as_transform`.
        device: the device to which images and labels are moved first; None: they stay where they are.
        off_epoch: from this epoch on (counted from 0) no image is changed. Labels keep their form, for the loss.

    Attributes:
        epoch: epochs begun so far; set it when a run is resumed.

    Raises:
        ValueError: a PrefetchLoader whose mean and std are not the transform's, or a missing device.
        ClassMismatchError: a transform without class_map, and a data set whose classes are not the model's.
    """

    def __init__(
        self, loader: Any, aug: GLEMAugment, device: torch.device | str | None = None, off_epoch: int | None = None
    ) -> None:
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}, but torch finds no GPU on this machine: leave device out")
        self.off_epoch = None if off_epoch is None else check_whole("off_epoch", off_epoch, 0)
        _check_normalisation(loader, aug)
        aug.check_data(getattr(loader, "dataset", None))
        self.loader, self.aug, self.device = loader, aug, device
        self.epoch, self._enabled = 0, True
        self._shares_checked = _warn_unless_sharded(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not self._shares_checked:  # Lightning makes its process group after the wrapper
            self._shares_checked = _warn_unless_sharded(self.loader)
        on = self.off_epoch is None or self.epoch < self.off_epoch
        self.epoch += 1
        for batch in self.loader:
            yield augment_batch(self.aug, batch, on and self._enabled, self.device)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are augmented; timm's training script clears it at `--mixup-off-epoch`."""
        return self._enabled

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        # The loader may have a FastCollateMixup, which stops together with this wrapper.
        if hasattr(self.loader, "mixup_enabled"):
            self.loader.mixup_enabled = value

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # it is missing while a pickle is read
            raise AttributeError(name)
        return getattr(self.loader, name)


def _check_normalisation(loader: Any, aug: GLEMAugment) -> None:
    """ValueError unless a PrefetchLoader has the mean and std of the transform."""
    if not isinstance(loader, PrefetchLoader):
        return
    theirs = [(values.float() / 255).flatten().numpy(force=True) for values in (loader.mean, loader.std)]
    ours = [for_channels(values or (math.nan,), len(theirs[0])) for values in (aug.pixels.mean, aug.pixels.std)]
    # A loader in half precision holds its constants in half precision.
    if not all(np.allclose(a, b, rtol=0, atol=5e-3) for a, b in zip(ours, theirs, strict=True)):
        mean, std = (tuple(round(float(v), 4) for v in values) for values in theirs)
        raise ValueError(
            f"this loader normalises its images with mean={mean}, std={std}; the transform has mean={aug.pixels.mean}, "
            f"std={aug.pixels.std}: make it with GLEMAugment(..., mean={mean}, std={std})"
        )


def _warn_unless_sharded(loader: Any) -> bool:
    """Warn where each process goes through all images, or accelerate has not prepared the loader. False: too early.

    Samplers of torch and timm have `num_replicas`; loaders of accelerate are known by their module. An IterableDataset
    may shard its images itself.
    """
    state = sys.modules.get("accelerate.state")  # accelerate need not be installed
    accelerated = state is not None and state.is_initialized()
    if world_size() == 1 and not accelerated:
        return False
    if getattr(loader, "sampler", None) is None or isinstance(loader.dataset, IterableDataset):
        return True
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset", "state")]
    sharded = any(hasattr(part, name) for part in parts for name in ("num_replicas", "num_processes"))
    if not sharded and not type(loader).__module__.startswith("accelerate."):
        if accelerated:
            text = (
                "accelerate has not prepared this loader, and prepares no wrapped one, so each process goes through "
                f"all {len(loader.dataset)} images: use aug.wrap(accelerator.prepare(loader))"
            )
        else:
            text = (
                f"each of the {world_size()} processes goes through all {len(loader.dataset)} images, because this "
                "loader has no sampler for several processes: give the DataLoader a DistributedSampler; with Lightning "
                "call the transform in on_after_batch_transfer"
            )
        warnings.warn(text, stacklevel=4)
    return True
