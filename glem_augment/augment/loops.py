"""The ways into the training loops of timm and torch: a loader, a `mixup_fn` and a collate function that augment."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from timm.data.mixup import FastCollateMixup, Mixup
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from glem_augment.augment.labels import soft_labels
from glem_augment.augment.structures import augment_batch
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import check_number, check_whole
from glem_augment.codec.resize import for_channels
from glem_augment.distributed import world_size
from glem_augment.images.sources import warn_of_lost_bits


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
        ValueError: a PrefetchLoader whose mean and std are not the transform's, a missing device, or a loader that
            moves images already.
        ClassMismatchError: see `GLEMAugment.check_data`.
    """

    def __init__(
        self, loader: Any, aug: GLEMAugment, device: torch.device | str | None = None, off_epoch: int | None = None
    ) -> None:
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}, but torch finds no GPU on this machine: leave device out")
        _refuse_twice(loader)
        self.off_epoch = None if off_epoch is None else check_whole("off_epoch", off_epoch, 0)
        _check_normalisation(loader, aug)
        aug.check_data(data := getattr(loader, "dataset", None))
        warn_of_lost_bits(data, aug.model.pixel_range)
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


def _refuse_twice(inner: Any) -> None:
    """ValueError: a loader or collate function that moves images already."""
    collate = getattr(getattr(inner, "loader", inner), "collate_fn", inner)
    if isinstance(inner, AugmentedLoader) or isinstance(collate, AugmentingCollate):
        raise ValueError("images would be moved twice: use either aug.wrap(loader), once, or one aug.collate_fn()")


def _warn_unless_sharded(loader: Any) -> bool:
    """Warn where each process goes through all images. False: too early to tell.

    Samplers of torch and timm have `num_replicas`, those of accelerate `num_processes`. An IterableDataset may shard
    its images itself.
    """
    if world_size() == 1:
        return False
    if getattr(loader, "sampler", None) is None or isinstance(loader.dataset, IterableDataset):
        return True
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset", "state")]
    if not any(hasattr(part, name) for part in parts for name in ("num_replicas", "num_processes")):
        warnings.warn(
            f"each of the {world_size()} processes goes through all {len(loader.dataset)} images: give the DataLoader "
            "a DistributedSampler; with accelerate use aug.wrap(accelerator.prepare(loader)), with Lightning call the "
            "transform in on_after_batch_transfer",
            stacklevel=4,
        )
    return True


class MixupFn:
    """`(x, y) -> (x', y')` with y' always soft [B, K'], as timm's training loop calls its `mixup_fn`.

    With `mixup_enabled = False` images do not change and labels are only smoothed.

    Args:
        smoothing: label smoothing s: 1 - s + s / K' for the class, s / K' for other classes.
        mixup: a timm `Mixup` to apply afterwards, without its label_smoothing; None: none.
    """

    def __init__(self, aug: GLEMAugment, smoothing: float = 0.0, mixup: Mixup | None = None) -> None:
        if isinstance(mixup, FastCollateMixup):
            raise TypeError("a FastCollateMixup goes to the DataLoader, as aug.collate_fn(base=FastCollateMixup(...))")
        self.aug, self.mixup = aug, mixup
        self.label_smoothing = check_number("smoothing", smoothing, 0.0, 1.0)
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Augment images [B, C, H, W] with targets int64 [B], or soft [B, K'], which are not smoothed again."""
        classes = self.aug.num_classes
        self.aug.classes_of(target, len(x))
        if self.mixup is not None and not x.is_floating_point():
            raise TypeError(f"timm's Mixup takes floats, not {x.dtype}: give x.float() / 255, or leave mixup= out")
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


class AugmentingCollate(FastCollateMixup):
    """Collates samples with `base` and augments the batch, in the CPU workers of a DataLoader.

    It is a `FastCollateMixup` by type only, because timm's loader looks for that type: `loader.mixup_enabled = False`
    turns it off, in running workers too, and also a FastCollateMixup that is its `base`. A worker checks the classes of
    its data set.

    Args:
        aug: the transform; its model must be on the CPU in forked workers.
        base: a function from a list of samples to a batch of images and labels; None: torch's `default_collate`.

    Raises:
        ValueError: a policy with a classifier, which workers do not have, or a `base` that moves images already.
    """

    def __init__(self, aug: GLEMAugment, base: Callable[[list[Any]], Any] | None = None) -> None:
        if aug.policy.wants_classifier:
            raise ValueError(
                f"{aug.policy!r} needs the classifier, which DataLoader workers do not have: use aug.wrap(loader)"
            )
        _refuse_twice(base)
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
