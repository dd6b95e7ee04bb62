"""How many synthetic images of each class: equally many, given numbers, or what a long-tailed data set lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from glem_augment.checks import check_whole
from glem_augment.data.classes import class_names, match_classes
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.model.glem import GLEM

PerClass = int | str | Sequence[int] | Mapping[Any, int]

WITHOUT_COUNTERPART = (
    "A flow makes images of its own classes only: adapt it to the data (model.adapt(data), or glem adapt), or open the "
    "data without those classes."
)


def class_counts(model: GLEM, per_class: PerClass, real: Any = None) -> list[int]:
    """Images to make of each of the flow's classes.

    Args:
        model: the flow.
        per_class: a number for all; K numbers; a mapping from class names, ids or indices (others: none); or
            "balance": as many as fill each class of `real` up to its largest, none of a class that it does not name.
        real: the data set to balance, see `flow_targets`.

    Returns:
        K numbers, at least one of them positive.

    Raises:
        ValueError, TypeError: for anything else, or nothing to make.
    """
    k = model.num_classes
    if isinstance(per_class, str):
        if per_class != "balance":
            raise ValueError(f"per_class must be a number, K numbers, a mapping or 'balance', got {per_class!r}")
        if real is None:
            raise ValueError("per_class='balance' fills up a real data set: give real=")
        targets, index = _flow_targets(model, real)
        there = np.bincount(targets, minlength=k)
        named = np.ones(k, dtype=bool) if index is None else np.isin(np.arange(k), index)
        counts = np.where(named, there.max() - there, 0).tolist()
        if not any(counts):
            raise ValueError(f"per_class='balance': all classes have {there.max()} images already")
        return counts
    if isinstance(per_class, Mapping):
        counts = [0] * k
        asked: set[int] = set()
        for key, value in per_class.items():
            index = find_class(model, key, "per_class")
            if index in asked:
                raise ValueError(f"per_class has the class {model.classes[index]!r} twice: leave one of them out")
            asked.add(index)
            counts[index] = check_whole(f"per_class[{key!r}]", value, 0)
    elif isinstance(per_class, (Sequence, np.ndarray, Tensor)):
        counts = [check_whole(f"per_class[{i}]", value, 0) for i, value in enumerate(as_list(per_class))]
        if len(counts) != k:
            raise ValueError(f"per_class has {len(counts)} numbers, the flow {k} classes")
    else:
        counts = [check_whole("per_class", per_class, 1)] * k
    if not any(counts):
        raise ValueError("per_class asks for no image at all")
    return counts


def for_every_class(model: GLEM, values: Mapping[Any, Any], name: str) -> list[Any]:
    """The K values of a mapping from all the flow's class names, ids or indices, in the order of the classes.

    Raises:
        ValueError: for a key that the flow does not have, a class twice, or one left out; `name` is the argument's.
    """
    found: dict[int, Any] = {}
    for key, value in values.items():
        index = find_class(model, key, name)
        if index in found:
            raise ValueError(f"{name} has the class {model.classes[index]!r} twice: leave one of them out")
        found[index] = value
    missing = [str(c) for i, c in enumerate(model.classes) if i not in found]
    if missing:
        more = ", ..." if len(missing) > 10 else ""
        raise ValueError(
            f"{name} leaves out {', '.join(missing[:10])}{more}: give all {model.num_classes} classes of the flow"
        )
    return [found[i] for i in range(model.num_classes)]


def flow_targets(model: GLEM, real: Any) -> np.ndarray:
    """The flow class of every image of a real data set, int64 [N].

    Args:
        real: an `ImageData`; (images, labels); or a torchvision or timm data set. Their classes are matched with the
            flow's by name; where they name none, the numbers are the flow's.

    Raises:
        DataError: labels that can't be found or matched, or are out of range.
    """
    return _flow_targets(model, real)[0]


def _flow_targets(model: GLEM, real: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """`flow_targets`, and the flow's class of every class of the data, None where it names none."""
    targets, names = targets_and_classes(real)
    index = class_index(model, names)
    high = model.num_classes if index is None else len(index)
    if len(targets) == 0 or targets.min() < 0 or targets.max() >= high:
        found = f"{targets.min()} to {targets.max()}" if len(targets) else "none"
        raise DataError(f"labels of the real data must be 0 to {high - 1}, found {found}")
    return (targets if index is None else index[targets]), index


def class_index(
    model: GLEM, names: tuple[list[str], list[str]] | None, advice: str = WITHOUT_COUNTERPART
) -> np.ndarray | None:
    """The flow's class of every class (ids, names) of a data set; None where it names none.

    Raises:
        ClassMismatchError: classes that do not match; its last sentence is `advice`.
    """
    if names is None:
        return None
    return match_classes(model.class_ids, model.classes, names[0], names[1], fix=advice)


def targets_and_classes(real: Any) -> tuple[np.ndarray, tuple[list[str], list[str]] | None]:
    """Labels int64 [N], and class (ids, names) in index order, or None where the data set names none.

    Raises:
        DataError: where no labels are found. TypeError: for a name.
    """
    if isinstance(real, ImageData):
        return np.asarray(real.targets, dtype=np.int64), (list(real.class_ids), list(real.classes))
    if _is_pair(real):
        return _whole_labels(real[1]), None
    if isinstance(real, (str, os.PathLike)):
        raise TypeError(f"real must be a data set, got {real!r}: open it first, with glem_augment.open_data")
    if isinstance(real, Subset):
        whole, names = targets_and_classes(real.dataset)
        return whole[np.asarray(real.indices, dtype=np.int64)], names
    if isinstance(real, ConcatDataset):
        parts = [targets_and_classes(part) for part in real.datasets]
        if any(names != parts[0][1] for _, names in parts):
            raise DataError("the parts of this ConcatDataset have other classes than its first: join those of the same")
        return np.concatenate([found for found, _ in parts]), parts[0][1]
    targets = getattr(real, "targets", None)
    if targets is None:
        targets = getattr(real, "labels", None)
    reader = getattr(real, "reader", None)  # of timm's ImageDataset
    if targets is None and reader is not None:  # readers of archives keep labels apart from other facts
        targets = getattr(reader, "targets", None)
    if targets is None and hasattr(reader, "samples"):
        targets = [sample[1] for sample in reader.samples]
    if targets is None and isinstance(getattr(real, "tensors", None), tuple) and len(real.tensors) == 2:
        targets = real.tensors[1]
    if targets is None:
        raise DataError(
            f"{type(real).__name__} has no labels that can be read without its images (targets, labels, samples): "
            "give (images, labels), or the numbers themselves as per_class"
        )
    found = _whole_labels(targets)
    names = class_names(real)
    ids = getattr(real, "wnids", None)  # of torchvision's ImageNet
    ids = [str(i) for i in ids] if isinstance(ids, (list, tuple)) and names and len(ids) == len(names) else names
    return found, None if names is None else (ids, names)


def as_image_data(model: GLEM, real: Any) -> ImageData:
    """Real images of the flow's size under the flow's classes.

    Raises:
        TypeError: for a data set whose images can't be taken as they are.
    """
    if _is_pair(real):
        images = real[0] if isinstance(real[0], Tensor) else torch.from_numpy(np.asarray(real[0]))
        return ImageData.from_tensors(images, real[1], model.classes, model.class_ids)
    if isinstance(real, ImageData):
        return real.with_targets(flow_targets(model, real), model.classes, model.class_ids)
    raise TypeError(
        f"source='mixup' needs the images themselves: give an ImageData (open_data) or (uint8 images, labels), got "
        f"{type(real).__name__}"
    )


def as_list(values: Any) -> Any:
    """Numbers of any kind of array, wherever it lies, as Python's."""
    return values.tolist() if isinstance(values, Tensor) else np.asarray(values).tolist()


def _is_pair(real: Any) -> bool:
    """(images, labels), of tensors or arrays; labels may be a list."""
    arrays = (Tensor, np.ndarray)
    return (
        isinstance(real, tuple)
        and len(real) == 2
        and isinstance(real[0], arrays)
        and isinstance(real[1], (*arrays, list))
    )


def _whole_labels(labels: Any) -> np.ndarray:
    found = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if found.ndim != 1 or (found.size and not (np.issubdtype(found.dtype, np.integer) or found.dtype == bool)):
        raise DataError(f"labels must be whole numbers, one per image; got {found.dtype} of shape {found.shape}")
    return found.astype(np.int64)


def find_class(model: GLEM, key: Any, argument: str) -> int:
    """Index of one of the flow's classes, given by name, id or index; ValueError naming the `argument`."""
    if isinstance(key, str):
        for names in (model.classes, model.class_ids):
            if key in names:
                return names.index(key)
        raise ValueError(f"{argument} names {key!r}; the flow has {', '.join(model.classes[:20])}")
    if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < model.num_classes:
        raise ValueError(f"{argument} names class {key!r}; the flow has 0 to {model.num_classes - 1}")
    return int(key)
