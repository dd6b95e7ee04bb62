"""GLEMAugment after a data loader, on the device of the batches or another: `aug.wrap(loader)`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import ConcatDataset, Subset

from glem_augment.augment.resize import for_channels
from glem_augment.augment.v2 import like
from glem_augment.data.classes import class_names, match_classes
from glem_augment.errors import ClassMismatchError

if TYPE_CHECKING:
    from glem_augment.augment.transform import GLEMAugment

# Share of the selected images in an epoch that were left alone after all, above which the user is told.
TOO_MANY, ENOUGH = 0.3, 100
_OWN = {"loader", "aug", "device", "off_epoch", "epoch", "_enabled", "_told"}  # what is not the wrapped loader's

NAFLEX = (
    "NaFlex loaders give patches of images of many sizes, not image batches [B, C, H, W]: use an ordinary loader "
    "(timm's create_loader)"
)


class AugmentedLoader:
    """A loader whose batches are augmented; in everything else it is the loader it wraps.

    Batches are tuples or lists (images, labels, ...); what follows the labels is passed on. Attributes that are not
    named here (`dataset`, `sampler`, `batch_size`, ...) are those of the inner loader.

    Args:
        loader: anything that gives such batches; timm's `PrefetchLoader` (normalised, on the GPU), a DataLoader
            (CPU batches), ...
        aug: the transform.
        device: where to bring images and labels first (all tensors of a structure); None: augment where they are.
        off_epoch: from this epoch on (counted from 0, by `__iter__`) nothing is changed. Labels keep their form:
            where the transform makes soft ones, they stay soft, as the loss expects.

    Attributes:
        loader, aug: as given.
        epoch: epochs begun so far; set it when a run is resumed.

    Raises:
        ValueError: for a NaFlex loader, a negative off_epoch, or a PrefetchLoader that normalises with other numbers
            than the transform takes back.
        ClassMismatchError: for a transform without class_map and a data set that has the flow's classes, by name, in
            another order.
        TypeError: for what can't be iterated; while iterating, for batches that are no (images, labels, ...).
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
        if off_epoch is not None and (isinstance(off_epoch, bool) or not isinstance(off_epoch, int) or off_epoch < 0):
            raise ValueError(f"off_epoch must be a whole number from 0, or None; got {off_epoch!r}")
        _check_normalisation(loader, aug)
        _check_classes(loader, aug)
        self.loader = loader
        self.aug = aug
        self.device = None if device is None else torch.device(device)
        self.off_epoch = off_epoch
        self.epoch = 0
        self._enabled = True
        self._told = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Any]:
        before = self.aug.stats
        for batch in self.loader:
            yield self._augmented(batch, on=self._enabled and (self.off_epoch is None or epoch < self.off_epoch))

        self._tell(before, self.aug.stats)

    def _tell(self, before: dict[str, int], after: dict[str, int]) -> None:
        """Warn, once, where much of the augmentation did not take place."""
        selected = after["selected"] - before["selected"]
        lost = {name: after[name] - before[name] for name in ("replaced", "unmapped")}
        if self._told or selected < ENOUGH or sum(lost.values()) < TOO_MANY * selected:
            return
        self._told = True
        warnings.warn(
            f"of {selected} images chosen in this epoch {lost['replaced']} were kept as they were, because the moved "
            f"ones were not plausible, and {lost['unmapped']}, because the flow does not know their class. A flow "
            "makes such moves of images unlike those it was fitted to (strong crops, RandAugment, RandomErasing), or "
            "where it is trained too little: fit it with these, lower the strength, or put the transform before them",
            stacklevel=3,
        )

    def _augmented(self, batch: Any, on: bool) -> Any:
        if isinstance(batch, Mapping) and "patches" in batch or _is_naflex(batch):
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
        # timm's own setter knows its own collate function only; both are to stop together.
        if hasattr(self.loader, "mixup_enabled"):
            self.loader.mixup_enabled = value

    def __getattr__(self, name: str) -> Any:
        # Only for what is not found here. Not `loader` itself, which copying asks for before it is there.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or hasattr(type(self), name) or not hasattr(self.loader, name):
            super().__setattr__(name, value)
        else:  # where it is read; DataLoader refuses what can't be changed
            setattr(self.loader, name, value)

    def __repr__(self) -> str:
        return f"AugmentedLoader({self.loader!r}, {self.aug!r}, device={self.device}, off_epoch={self.off_epoch})"


def _is_naflex(batch: Any) -> bool:
    return (
        isinstance(batch, (tuple, list)) and len(batch) > 0 and isinstance(batch[0], Mapping) and "patches" in batch[0]
    )


def _check_normalisation(loader: Any, aug: GLEMAugment) -> None:
    """ValueError where a PrefetchLoader's mean and std are not those that the transform takes back."""
    if not isinstance(loader, PrefetchLoader):
        return
    theirs = [[v / 255 for v in values.detach().float().flatten().tolist()] for values in (loader.mean, loader.std)]
    channels = len(theirs[0])
    ours = [
        None if v is None else list(for_channels(v, channels)) * (channels if len(v) == 1 else 1)
        for v in (aug.pixels.mean, aug.pixels.std)
    ]
    # Half-precision loaders hold their constants in half precision.
    close = all(
        a is not None and len(a) == len(b) and all(abs(p - q) < 5e-3 for p, q in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )
    if not close:
        mean, std = (tuple(round(v, 4) for v in values) for values in theirs)
        raise ValueError(
            f"this loader normalises its images with mean={mean}, std={std}; the transform has "
            f"mean={aug.pixels.mean}, std={aug.pixels.std}: make it with GLEMAugment(..., mean={mean}, std={std})"
        )


def _check_classes(loader: Any, aug: GLEMAugment) -> None:
    """ClassMismatchError where the data name the flow's classes in another order, and no class_map says so."""
    if aug.class_map is not None:
        return
    for names in _all_names(getattr(loader, "dataset", None)):
        try:
            index = match_classes(aug.model.class_ids, aug.model.classes, names, names, partial=True).tolist()
        except ClassMismatchError:
            continue  # they are all called otherwise, which says nothing
        wrong = [i for i, j in enumerate(index) if j not in (i, -1)]
        if wrong:
            i = wrong[0]
            raise ClassMismatchError(
                f"the data set's class {i} is {names[i]!r}, the flow's {aug.model.classes[i]!r}: make the transform "
                "with class_map=match_classes(flow.class_ids, flow.classes, names, names, partial=True), here "
                f"{_short(index)}"
            )


def _all_names(data: Any) -> Iterator[list[str]]:
    """The class names of a data set, also inside torch's Subset and ConcatDataset."""
    names = class_names(data)
    if names is not None:
        yield names
    elif isinstance(data, Subset):
        yield from _all_names(data.dataset)
    elif isinstance(data, ConcatDataset):
        for part in data.datasets:
            yield from _all_names(part)


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 20 else f"[{', '.join(map(str, numbers[:20]))}, ...]"
