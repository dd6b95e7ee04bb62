"""The ways to put GLEMAugment into a training loop: around a loader, as timm's `mixup_fn`, as a collate function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.mixup import FastCollateMixup, Mixup
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import ConcatDataset, Subset, default_collate

from glem_augment.augment.resize import for_channels
from glem_augment.augment.transform import GLEMAugment
from glem_augment.augment.v2 import like
from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.data.classes import class_names, match_classes
from glem_augment.errors import ClassMismatchError

NAFLEX = (
    "NaFlex loaders give patches of images of many sizes, not image batches [B, C, H, W]: use an ordinary loader "
    "(timm's create_loader)"
)


# ---- around a loader -----------------------------------------------------------------------------------------


class AugmentedLoader:
    """A loader whose batches are augmented; in everything else it is the loader that it wraps.

    Batches are tuples or lists (images, labels, ...); what follows the labels is passed on.

    Args:
        loader: anything that gives such batches: timm's `PrefetchLoader` (normalised, on the GPU), a DataLoader, ...
        aug: the transform.
        device: where images and labels are brought first; None: they stay where they are.
        off_epoch: from this epoch on (counted from 0) no image is changed. Labels keep their form, as the loss expects.

    Attributes:
        epoch: epochs begun so far; set it when a run is resumed.

    Raises:
        ValueError: for a NaFlex loader, a negative off_epoch, or a PrefetchLoader that normalises with other numbers
            than the transform takes back.
        ClassMismatchError: for a transform without class_map and a data set that has the flow's classes, by name, in
            another order.
        TypeError: for a loader that can't be iterated, or one whose batches are not (images, labels, ...).
    """

    def __init__(
        self,
        loader: Any,
        aug: GLEMAugment,
        device: torch.device | str | None = None,
        off_epoch: int | None = None,
    ) -> None:
        parts = (loader, getattr(loader, "dataset", None), getattr(loader, "collate_fn", None))
        if any("NaFlex" in type(part).__name__ for part in parts):
            raise ValueError(NAFLEX)
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"loader must be iterable, got {type(loader).__name__}")
        self.off_epoch = None if off_epoch is None else check_whole("off_epoch", off_epoch, 0)
        _check_normalisation(loader, aug)
        _check_classes(loader, aug)
        self.loader = loader
        self.aug = aug
        self.device = None if device is None else torch.device(device)
        self.epoch = 0
        self._enabled = True

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        on = self.off_epoch is None or self.epoch < self.off_epoch
        self.epoch += 1
        for batch in self.loader:
            yield self._augmented(batch, on and self._enabled)

    def _augmented(self, batch: Any, on: bool) -> Any:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(first, Mapping) and "patches" in first:
            raise ValueError(NAFLEX)
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(
                f"the loader must give batches (images, labels), got {type(batch).__name__}: for dicts and other "
                "structures use aug.as_transform(labels_getter)"
            )
        x, y, *rest = batch
        if self.device is not None:
            x, y = tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), (x, y))
        return like(batch, [*(self.aug if on else self.aug.unmoved)(x, y), *rest])

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are augmented; timm's training script clears it at `--mixup-off-epoch`."""
        return self._enabled

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        # timm's own setter knows only its own collate function; both are to stop together.
        if hasattr(self.loader, "mixup_enabled"):
            self.loader.mixup_enabled = value

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet, while a pickle is read
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __repr__(self) -> str:
        return f"AugmentedLoader({self.loader!r}, {self.aug!r}, device={self.device}, off_epoch={self.off_epoch})"


def _check_normalisation(loader: Any, aug: GLEMAugment) -> None:
    """ValueError where a PrefetchLoader's mean and std are not those that the transform takes back."""
    if not isinstance(loader, PrefetchLoader):
        return
    theirs = [[v / 255 for v in values.float().flatten().tolist()] for values in (loader.mean, loader.std)]
    ours = [for_channels(values or (), len(theirs[0])) for values in (aug.pixels.mean, aug.pixels.std)]
    # A loader in half precision holds its constants in half precision.
    if not all(
        len(a) in (1, len(b)) and np.allclose(a, b, rtol=0, atol=5e-3) for a, b in zip(ours, theirs, strict=True)
    ):
        mean, std = (tuple(round(v, 4) for v in values) for values in theirs)
        raise ValueError(
            f"this loader normalises its images with mean={mean}, std={std}; the transform has mean={aug.pixels.mean}, "
            f"std={aug.pixels.std}: make it with GLEMAugment(..., mean={mean}, std={std})"
        )


def _check_classes(loader: Any, aug: GLEMAugment) -> None:
    """ClassMismatchError where the data name the flow's classes in another order, and no class_map says so."""
    if aug.class_map is not None:
        return
    for names in _class_lists(getattr(loader, "dataset", None)):
        try:
            index = match_classes(aug.model.class_ids, aug.model.classes, names, names, partial=True).tolist()
        except ClassMismatchError:
            continue  # none of the names is the flow's: nothing can be said about their order
        wrong = [i for i, j in enumerate(index) if j not in (i, -1)]
        if wrong:
            i = wrong[0]
            raise ClassMismatchError(
                f"the data set's class {i} is {names[i]!r}, the flow's {aug.model.classes[i]!r}: make the transform "
                "with class_map=match_classes(flow.class_ids, flow.classes, names, names, partial=True).tolist(), "
                f"which begins {index[:20]}"
            )


def _class_lists(data: Any) -> Iterator[list[str]]:
    """The class names of a data set, or of those inside torch's Subset and ConcatDataset."""
    if isinstance(data, Subset):
        yield from _class_lists(data.dataset)
    elif isinstance(data, ConcatDataset):
        for part in data.datasets:
            yield from _class_lists(part)
    else:
        names = class_names(data)
        if names is not None:
            yield names


# ---- as timm's mixup_fn --------------------------------------------------------------------------------------


class MixupFn:
    """`(x, y) -> (x', y')` with y' always soft [B, K'], as timm's training loop calls its `mixup_fn`.

    Args:
        aug: the transform.
        smoothing: label smoothing s: 1 - s + s / K' for the class, s / K' for the others.
        mixup: a timm `Mixup` to apply as well; None: none. Its label_smoothing is not used.
        order: "aug" first or "mixup" first.

    Attributes:
        mixup_enabled: settable; without it images are left alone and labels are only smoothed.

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
        """Augment images [B, C, H, W] with targets int64 [B], or soft [B, K'], which are not smoothed again."""
        soft = self.aug.soft_target(target)
        if self.mixup_enabled:
            if self.mixup is not None and self.order == "mixup":
                x, soft = mix_soft(self.mixup, x, soft)
            x, soft = self.aug(x, soft)
            if self.mixup is not None and self.order == "aug":
                x, soft = mix_soft(self.mixup, x, soft)
        # Smoothing comes last, so that a posterior is smoothed like any other label.
        s = self.label_smoothing if target.ndim == 1 else 0.0
        return x, soft * (1.0 - s) + s / self.num_classes if s else soft

    def __repr__(self) -> str:
        extra = "" if self.mixup is None else f", mixup={self.mixup!r}, order={self.order!r}"
        return f"MixupFn({self.aug!r}, smoothing={self.label_smoothing}{extra})"


def mix_soft(mixup: Mixup, x: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Apply timm's Mixup or CutMix, without its smoothing, to images [B, C, H, W] and soft labels [B, K'].

    timm takes only integer labels. Given the row numbers as classes, it returns the weights with which it mixed the
    rows, and these weights mix the soft labels.
    """
    if len(x) == 0:
        return x, soft
    weights_only = copy.copy(mixup)
    weights_only.num_classes, weights_only.label_smoothing, weights_only.multi_label = len(x), 0.0, False
    x, weights = weights_only(x.clone(), torch.arange(len(x), device=soft.device))  # Mixup overwrites its input
    return x, weights.to(soft.dtype) @ soft


# ---- as a collate function -----------------------------------------------------------------------------------


class AugmentingCollate(FastCollateMixup):
    """Collates samples with `base` and augments the batch, in the CPU workers of a DataLoader.

    It is a `FastCollateMixup` by type only, so that timm's loader finds its switch: `loader.mixup_enabled = False`
    turns it off, in running workers too, and with it a FastCollateMixup that is its `base`.

    Args:
        aug: the transform; its flow must be on the CPU in forked workers.
        base: from a list of samples to a batch (images, labels, ...); None: timm's `fast_collate` for uint8 images
            (as timm's data sets give them for its prefetching loader), else torch's `default_collate`.
    """

    def __init__(self, aug: GLEMAugment, base: Callable[[list[Any]], Any] | None = None) -> None:
        if base is not None and not callable(base):
            raise TypeError(f"base must be a collate function, got {type(base).__name__}")
        self.aug, self.base = aug, base
        # Shared memory lets workers that live through several epochs see a change of the switch.
        with torch.inference_mode(False):
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

    def __call__(self, batch: list[Any], _: Any = None) -> Any:
        """A batch (images, labels, ...) of the type that `base` gives.

        Raises:
            TypeError: for samples or batches that are not (image, label, ...), or images that are no tensors yet.
        """
        on = self.mixup_enabled
        if isinstance(self.base, FastCollateMixup):
            self.base.mixup_enabled = on
        collated = (self.base or _default_base(batch))(batch)
        if not isinstance(collated, (tuple, list)) or len(collated) < 2 or not isinstance(collated[0], Tensor):
            raise TypeError(f"base must give a batch (images, labels), got {type(collated).__name__}")
        x, y, *rest = collated
        return like(collated, [*(self.aug if on else self.aug.unmoved)(x, y), *rest])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._on.share_memory_()  # a copy has memory of its own, which it shares with its workers

    def __repr__(self) -> str:
        return f"AugmentingCollate({self.aug!r}, base={self.base!r})"


def _default_base(batch: list[Any]) -> Callable[[list[Any]], Any]:
    if len(batch) == 0 or not isinstance(batch[0], (tuple, list)) or len(batch[0]) < 2:
        raise TypeError(f"samples must be (image, label), got {type(batch[0] if batch else batch).__name__}")
    image, label = batch[0][0], batch[0][1]
    image = image[0] if isinstance(image, tuple) else image  # timm's augmentation splits
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(
            f"the data set gives images as {type(image).__name__}: end its transform with one that makes tensors, "
            "such as v2.ToImage() and v2.ToDtype(torch.float32, scale=True)"
        )
    # fast_collate would leave out a third item, and cut a label of 2.7 to 2.
    pair = type(batch[0]) is tuple and len(batch[0]) == 2
    whole = isinstance(label, Integral) or (isinstance(label, Tensor) and not label.is_floating_point())
    return fast_collate if pair and whole and image.dtype in (np.uint8, torch.uint8) else default_collate
