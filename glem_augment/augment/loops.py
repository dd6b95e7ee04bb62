"""GLEMAugment in a training loop: as torchvision transform, loader, timm's `mixup_fn`, or collate function."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from timm.data.mixup import FastCollateMixup, Mixup
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # torchvision's own transforms use it too
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2

from glem_augment.augment.labels import check_labels, soft_labels
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import check_number, check_whole
from glem_augment.codec.resize import for_channels
from glem_augment.distributed import world_size
from glem_augment.errors import ClassMismatchError
from glem_augment.images.matching import match_classes, named_classes
from glem_augment.tensors import send

LABEL_KEYS = ("labels", "label", "targets", "target")
_MAP = (
    "Give the transform class_map=match_classes(flow, data, partial=True), which passes images of other classes "
    "through; or class_map=range(K) if both list the same K classes in the same order; or adapt the flow to the data "
    "(flow.adapt, glem adapt)."
)


def check_classes(aug: GLEMAugment, data: Any) -> None:
    """ClassMismatchError unless the classes of data and flow have the same names and order, or class_map is given.

    Data without class names is not checked.
    """
    if aug.class_map is not None or (named := named_classes(data)) is None:
        return
    index = match_classes(aug.model, data, fix=_MAP).tolist()
    i = next((i for i, j in enumerate(index) if j != i), None)
    if i is not None:
        raise ClassMismatchError(
            f"the data set's class {i} is {named[1][i]!r}, the flow's {aug.model.classes[i]!r}: make the transform "
            f"with class_map=match_classes(flow, data), which begins {index[:20]}"
        )


def _augment_batch(aug: GLEMAugment, batch: Any, on: bool, device: torch.device | str | None = None) -> Any:
    """A batch on `device`, augmented if `on`. Labels always have the form of augmented ones."""

    def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if device is not None:
            x, y = send(x, torch.device(device)), send(y, torch.device(device))
        return aug(x, y) if on else (x, aug.target(y))

    return augment_sample(batch, augment)


# ---- on samples of any structure ------------------------------------------------------------------------------


class GLEMTransform(v2.Transform):
    """Augments the images of a sample or batch of any structure, see `augment_sample`."""

    def __init__(self, aug: nn.Module) -> None:
        super().__init__()
        self.aug = aug

    def forward(self, *inputs: Any) -> Any:
        return augment_sample(inputs[0] if len(inputs) == 1 else inputs, self.aug)


def augment_sample(sample: Any, augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Augment a batch [B, C, H, W] with labels [B] or [B, K'], or one image [C, H, W] with an int or [K'] label.

    As with torchvision's MixUp and CutMix, images are the `tv_tensors.Image` in the structure, or else its first plain
    tensor. Labels are the second item of a tuple, or a dict's value under one of `LABEL_KEYS` in upper or lower case.
    Boxes, masks and everything else pass unchanged, because moves do not displace objects. Images keep their type, and
    integer labels keep theirs unless they become soft.

    Raises:
        ValueError, TypeError: for PIL images, no image, or labels that are not found.
    """
    flat, spec = tree_flatten(sample)
    label_place = _label_position(sample)
    image_place = _image_position(flat, label_place)
    image, labels = flat[image_place], flat[label_place]
    x, y = image.as_subclass(Tensor), labels
    single = x.ndim == 3
    if not isinstance(labels, (Tensor, Integral) if single else Tensor):
        raise ValueError(f"labels must be a tensor (or an int, for one image) of the sample, got {labels!r}")
    if single:
        x, y = x[None], torch.as_tensor(labels, device=x.device)[None]
    new_x, new_y = augment(x, y)
    if single:
        new_x = new_x[0]
    flat[image_place] = tv_tensors.wrap(new_x, like=image) if isinstance(image, tv_tensors.TVTensor) else new_x
    if new_y is not y:
        flat[label_place] = new_y[0] if single else new_y
    return tree_unflatten(flat, spec)


def _label_position(sample: Any) -> int:
    """The index of the labels among the leaves of a sample, by torchvision's convention."""
    if isinstance(sample, Mapping):
        names = {str(key).lower(): key for key in sample}
        found = next((names[name] for name in LABEL_KEYS if name in names), None)
        if found is not None:
            return sum(len(tree_leaves(sample[key])) for key in takewhile(lambda key: key != found, sample))
    elif isinstance(sample, (tuple, list)) and len(sample) > 1:
        return len(tree_leaves(sample[0])) + (_label_position(sample[1]) if isinstance(sample[1], Mapping) else 0)
    elif isinstance(sample, Tensor):
        raise ValueError(
            "the transform got an image without a label, as a data set's transform= does; it needs both: augment "
            "batches, with aug.wrap(loader) or collate_fn=aug.collate_fn(), or give (image, label)"
        )
    raise ValueError(f"no labels found in {type(sample).__name__}: give (images, labels) or a dict with a key 'labels'")


def _image_position(flat: list[Any], label_place: int) -> int:
    if any(isinstance(item, Image.Image) for item in flat):
        raise TypeError("PIL images can't be moved: put v2.ToImage() before this transform")
    images = [i for i, item in enumerate(flat) if isinstance(item, tv_tensors.Image)]
    plain = [i for i, item in enumerate(flat) if type(item) is Tensor and i != label_place]
    if not images and not plain:
        raise ValueError("no image found: a sample needs a tv_tensors.Image or a tensor besides its labels")
    if len(images) > 1:
        raise ValueError(f"the sample has {len(images)} images, but one tensor of labels: augment them one by one")
    return (images or plain)[0]


# ---- around a loader -----------------------------------------------------------------------------------------


class AugmentedLoader:
    """A loader whose batches are augmented. All other attributes are the wrapped loader's.

    Args:
        loader: timm's `PrefetchLoader` (the best place on a GPU), a DataLoader, or a loader that accelerate has
            prepared, since accelerate does not shard this class. For its batches see `as_transform`.
        device: the device to which images and labels are moved first; None: they stay where they are.
        off_epoch: from this epoch on (counted from 0) no image is changed. Labels keep their form, for the loss.

    Attributes:
        epoch: epochs begun so far; set it when a run is resumed.

    Raises:
        ValueError: a PrefetchLoader whose mean and std are not the transform's, or a missing device.
        ClassMismatchError: a transform without class_map, and a data set whose classes are not the flow's.
    """

    def __init__(
        self, loader: Any, aug: GLEMAugment, device: torch.device | str | None = None, off_epoch: int | None = None
    ) -> None:
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}, but torch finds no GPU on this machine: leave device out")
        self.off_epoch = None if off_epoch is None else check_whole("off_epoch", off_epoch, 0)
        _check_normalisation(loader, aug)
        check_classes(aug, getattr(loader, "dataset", None))
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
            yield _augment_batch(self.aug, batch, on and self._enabled, self.device)

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
    """Warn where several processes go through the same images. False: there is one process so far.

    Samplers of torch and timm have `num_replicas`, loaders of accelerate `num_processes`. An IterableDataset may shard
    its images itself.
    """
    if world_size() == 1:
        return False
    if getattr(loader, "sampler", None) is None or isinstance(loader.dataset, IterableDataset):
        return True
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset", "state")]
    if not any(hasattr(part, name) for part in parts for name in ("num_replicas", "num_processes")):
        warnings.warn(
            f"each of the {world_size()} processes goes through all {len(loader.dataset)} images, because this loader "
            "has no sampler for several processes: give the DataLoader a DistributedSampler; with accelerate use "
            "aug.wrap(accelerator.prepare(loader)); with Lightning call the transform in on_after_batch_transfer",
            stacklevel=4,
        )
    return True


# ---- as timm's mixup_fn --------------------------------------------------------------------------------------


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
        check_classes(aug, data)
        self.aug, self.mixup = aug, mixup
        self.label_smoothing = check_number("smoothing", smoothing, 0.0, 1.0)
        self.mixup_enabled = True

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Augment images [B, C, H, W] with targets int64 [B], or soft [B, K'], which are not smoothed again."""
        classes = self.aug.num_classes
        check_labels(target, len(x), classes)
        soft = soft_labels(target, classes)
        if self.mixup_enabled:
            x, soft = self.aug(x, soft)
            if self.mixup is not None:
                x, soft = _mix_soft(self.mixup, x, soft)
        # Smoothing comes last, so that a posterior is smoothed like any other label.
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


# ---- as a collate function -----------------------------------------------------------------------------------


class AugmentingCollate(FastCollateMixup):
    """Collates samples with `base` and augments the batch, in the CPU workers of a DataLoader.

    It is a `FastCollateMixup` by type only, because timm's loader looks for that type: `loader.mixup_enabled = False`
    turns it off, in running workers too, and also a FastCollateMixup that is its `base`.

    Args:
        aug: the transform; its flow must be on the CPU in forked workers.
        base: a function from a list of samples to a batch of images and labels; None: torch's `default_collate`.
        data: the data set, whose classes are checked now. Workers check their data set; without workers there is no
            other check.
    """

    def __init__(self, aug: GLEMAugment, base: Callable[[list[Any]], Any] | None = None, data: Any = None) -> None:
        check_classes(aug, data)
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
            check_classes(self.aug, worker.dataset)
            self._checked = True
        on = self.mixup_enabled
        if isinstance(self.base, FastCollateMixup):
            self.base.mixup_enabled = on
        return _augment_batch(self.aug, self.base(batch), on)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._on.share_memory_()  # for the workers of this copy
