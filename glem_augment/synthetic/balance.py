"""How many synthetic images of each class: equally many, given numbers, or what a long-tailed data set lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from glem_augment.checks import check_whole
from glem_augment.data.classes import match_classes, named_classes
from glem_augment.data.dataset import ImageData, as_image_data
from glem_augment.errors import DataError
from glem_augment.model.glem import GLEM

PerClass = int | str | Sequence[int] | Mapping[Any, int]
Names = tuple[list[str], list[str]]  # ids and names of a data set's classes, in index order

_ADAPT = (
    "A flow makes images of its own classes only: adapt it to the data (model.adapt(data), or glem adapt), or open the "
    "data without those classes."
)


def class_counts(model: GLEM, per_class: PerClass, real: Any = None) -> list[int]:
    """The number of images to make of each of the flow's K classes.

    Args:
        per_class: a number for all; K numbers; a mapping from class names, ids or indices (the others get none); or
            "balance": as many as fill each class of `real` up to its largest, none of a class that `real` lacks.
        real: the data set to balance, see `match_targets`.
    """
    k = model.num_classes
    if isinstance(per_class, str):
        if per_class != "balance":
            raise ValueError(f"per_class must be a number, K numbers, a mapping or 'balance', got {per_class!r}")
        if real is None:
            raise ValueError("per_class='balance' fills up a real data set: give real=")
        targets, named = match_targets(model, real)
        present = np.bincount(targets, minlength=k)
        counts = np.where(np.isin(np.arange(k), named), present.max() - present, 0).tolist()
        if not any(counts):
            raise ValueError(f"per_class='balance': all classes have {present.max()} images already")
    elif isinstance(per_class, (Mapping, Sequence, np.ndarray, Tensor)):
        given = class_values(model, per_class, "per_class", 0)
        counts = [check_whole(f"per_class for {name!r}", n, 0) for name, n in zip(model.classes, given, strict=True)]
    else:
        counts = [check_whole("per_class", per_class, 1)] * k
    if not any(counts):
        raise ValueError("per_class asks for no image at all")
    return counts


def recorded(model: GLEM, per_class: PerClass) -> Any:
    """`per_class` as JSON can carry it, classes by name: an index as text may be another class's name."""
    if isinstance(per_class, Mapping):
        return {model.classes[_find_class(model, key, "per_class")]: int(n) for key, n in per_class.items()}
    return per_class if isinstance(per_class, str) else _as_list(per_class)


def class_values(model: GLEM, values: Any, argument: str, default: Any) -> list[Any]:
    """A value for each of the flow's K classes.

    `values` holds K of them, or maps class names, ids or indices to them; other classes get `default`.
    """
    if not isinstance(values, Mapping):
        given = _as_list(values)
        if not isinstance(given, list) or len(given) != model.num_classes:
            raise ValueError(f"{argument} must be {model.num_classes} values, one per class of the flow; got {given!r}")
        return given
    found: dict[int, Any] = {}
    for key, value in values.items():
        index = _find_class(model, key, argument)
        if index in found:
            raise ValueError(f"{argument} has the class {model.classes[index]!r} twice: leave one of them out")
        found[index] = value
    return [found.get(i, default) for i in range(model.num_classes)]


def _find_class(model: GLEM, key: Any, argument: str) -> int:
    if isinstance(key, str):
        for names in (model.classes, model.class_ids):
            if key in names:
                return names.index(key)
        raise ValueError(f"{argument} names {key!r}; the flow has {', '.join(model.classes[:20])}")
    if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < model.num_classes:
        raise ValueError(f"{argument} names class {key!r}; the flow has 0 to {model.num_classes - 1}")
    return int(key)


def _as_list(values: Any) -> Any:
    """A number, sequence, array or tensor in Python's own types."""
    return values.tolist() if isinstance(values, Tensor) else np.asarray(values).tolist()


def match_targets(model: GLEM, real: Any) -> tuple[np.ndarray, np.ndarray]:
    """The flow's class of every image of a real data set, int64 [N], and of every class of it, int64.

    Classes are matched by name; labels of data without class names are the flow's indices.

    Raises:
        DataError: labels that cannot be found or matched, or are out of range.
    """
    targets, names = targets_and_names(real)
    index = np.arange(model.num_classes)
    if names is not None:
        index = match_classes(model, real, fix=_ADAPT)
    if len(targets) == 0 or targets.min() < 0 or targets.max() >= len(index):
        found = f"{targets.min()} to {targets.max()}" if len(targets) else "none"
        raise DataError(f"labels of the real data must be 0 to {len(index) - 1}, found {found}")
    return index[targets], index


def targets_and_names(real: Any) -> tuple[np.ndarray, Names | None]:
    """Labels int64 [N], and the ids and names of the classes, or None if the data set names none.

    Raises:
        DataError: no labels were found. TypeError: `real` is a name instead of a data set.
    """
    if isinstance(real, (str, os.PathLike)):
        raise TypeError(f"real must be a data set, got {real!r}: open it first, with glem_augment.open_data")
    if isinstance(real, ImageData):
        return np.asarray(real.targets, dtype=np.int64), (list(real.class_ids), list(real.classes))
    if _is_pair(real):
        return _whole_labels(real[1]), None
    if isinstance(real, Subset):
        targets, names = targets_and_names(real.dataset)
        return targets[np.asarray(real.indices, dtype=np.int64)], names
    labels = _labels_of(real)
    if labels is None:
        raise DataError(
            f"{type(real).__name__} has no labels that can be read without its images (targets, labels, samples): "
            "give (images, labels), or the numbers themselves as per_class"
        )
    return _whole_labels(labels), named_classes(real)


def _labels_of(real: Any) -> Any:
    """The labels of a torchvision data set, timm's ImageDataset (`reader`) or a TensorDataset; None if it has none."""
    reader = getattr(real, "reader", None)
    for owner, name in ((real, "targets"), (real, "labels"), (reader, "targets")):
        if getattr(owner, name, None) is not None:
            return getattr(owner, name)
    if hasattr(reader, "samples"):
        return [sample[1] for sample in reader.samples]
    tensors = getattr(real, "tensors", None)
    return tensors[1] if isinstance(tensors, tuple) and len(tensors) == 2 else None


def real_images(model: GLEM, real: Any) -> ImageData:
    """An `ImageData`, (uint8 images, labels), or a name for `open_data`, at the flow's size and under its classes.

    Raises:
        DataError: images of another size, or classes that do not match. TypeError: another kind of `real`.
    """
    if _is_pair(real):
        images = ImageData.from_tensors(torch.as_tensor(real[0]), real[1], model.classes, model.class_ids)
        return as_image_data(images, model.image_shape)
    images = as_image_data(real, model.image_shape)
    return images.with_targets(match_targets(model, images)[0], model.classes, model.class_ids)


def _is_pair(real: Any) -> bool:
    """Whether this is (images, labels), of tensors or arrays; labels may be a list."""
    two = isinstance(real, tuple) and len(real) == 2
    return two and isinstance(real[0], Tensor | np.ndarray) and isinstance(real[1], Tensor | np.ndarray | list)


def _whole_labels(labels: Any) -> np.ndarray:
    found = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if found.ndim != 1 or (found.size and not (np.issubdtype(found.dtype, np.integer) or found.dtype == bool)):
        raise DataError(f"labels must be whole numbers, one per image; got {found.dtype} of shape {found.shape}")
    return found.astype(np.int64)
