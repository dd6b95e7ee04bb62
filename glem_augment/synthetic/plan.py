"""What a synthetic set holds: how many images of each class, in blocks, and the labels of an export.

Real images that a set is made for (`real`) are opened, and their classes matched with the flow's, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from glem_augment.checks import check_whole
from glem_augment.data.classes import ClassMap, check_targets, match_classes
from glem_augment.data.dataset import ImageData, LabelledImages, as_image_data
from glem_augment.data.sources import Source, open_source
from glem_augment.model.glem import GLEM

PerClass = int | Literal["balance"] | Sequence[int] | Mapping[Any, int]

_ADAPT = (
    "A flow makes images of its own classes only: adapt it to the data (model.adapt(data), or glem adapt), or open the "
    "data without those classes."
)


class Real(NamedTuple):
    """Real images with the flow's class of every image, `targets` int64 [N], and of every class, `classes` int64."""

    data: Source | ImageData
    targets: np.ndarray
    classes: np.ndarray

    def images(self, model: GLEM) -> ImageData:
        """The images in the flow's shape, labelled by its classes."""
        return as_image_data(self.data, model.image_shape).with_targets(self.targets, model.classes, model.class_ids)


def open_real(model: GLEM, data: LabelledImages, class_map: ClassMap = None) -> Real:
    """Real images, of which only the labels are read. Labels of data without class names are the flow's indices."""
    source = data if isinstance(data, ImageData) else open_source(data)
    if source.named or class_map is not None:
        index = match_classes(model, source, class_map, fix=_ADAPT)
        return Real(source, index[source.targets], index)
    targets = check_targets(source.targets, len(source), model.num_classes)
    return Real(source, targets, np.arange(model.num_classes))


class Block(NamedTuple):
    """Block `number` of a flow's class: the `size` images from place `first` within the class on."""

    cls: int
    number: int
    first: int
    size: int


@dataclass(frozen=True)
class Plan:
    """The images of a set.

    Attributes:
        counts: images of each of the flow's K classes.
        order: the classes of an export, in the order of their labels.
        block: images of one class that are decoded together.
        settings: the settings that decide the images, beside weights, classes and counts; JSON-able.
        real_name: the name of the real images that are mixed, if any are.
    """

    model: GLEM
    counts: list[int]
    order: list[int]
    block: int
    settings: dict[str, Any]
    real_name: str | None = None

    def blocks(self) -> list[Block]:
        """All blocks, class after class in the order of the labels."""
        return [
            Block(cls, number, first, min(self.block, self.counts[cls] - first))
            for cls in self.order
            for number, first in enumerate(range(0, self.counts[cls], self.block))
        ]


def label_order(counts: Sequence[int], real: Real | None) -> list[int]:
    """The flow's classes in the order of the real data's labels, then other classes that get images."""
    named = list(range(len(counts))) if real is None else real.classes.tolist()
    return [*named, *(cls for cls, count in enumerate(counts) if count and cls not in named)]


def class_counts(model: GLEM, per_class: PerClass, real: Real | None) -> list[int]:
    """The number of images of each of the flow's K classes; `per_class` is an argument of `SyntheticDataset`.

    "balance" makes none of a class that `real` does not name.
    """
    k = model.num_classes
    if isinstance(per_class, str):
        if per_class != "balance":
            raise ValueError(f"per_class must be a number, K numbers, a mapping or 'balance', got {per_class!r}")
        if real is None:
            raise ValueError("per_class='balance' fills up a real data set: give real=")
        present = np.bincount(real.targets, minlength=k)
        counts = np.where(np.isin(np.arange(k), real.classes), present.max() - present, 0).tolist()
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


def class_values(model: GLEM, values: Any, argument: str, default: Any) -> list[Any]:
    """K values, one for each of the flow's classes; a mapping gives `default` to the classes that it leaves out."""
    if not isinstance(values, Mapping):
        given = values.tolist() if isinstance(values, Tensor) else np.asarray(values).tolist()
        if not isinstance(given, list) or len(given) != model.num_classes:
            raise ValueError(f"{argument} must be {model.num_classes} values, one per class of the flow; got {given!r}")
        return given
    known = (range(model.num_classes), model.class_ids, model.classes)  # a name comes before an id
    index = {key: i for keys in known for i, key in enumerate(keys)}
    unknown = [key for key in values if key not in index]
    if unknown:
        raise ValueError(f"{argument} names {unknown[0]!r}; the flow has {', '.join(model.classes[:20])}")
    found = {index[key]: value for key, value in values.items()}
    if len(found) < len(values):
        raise ValueError(f"{argument} has a class twice, under two of its names: {list(values)[:20]}")
    return [found.get(i, default) for i in range(model.num_classes)]
