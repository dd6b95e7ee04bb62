"""How many synthetic images of each class: equally many, given numbers, or what a long-tailed data set lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from glem_augment.checks import check_whole
from glem_augment.data.classes import check_targets, match_classes
from glem_augment.data.sources import open_source
from glem_augment.model.glem import GLEM

PerClass = int | Literal["balance"] | Sequence[int] | Mapping[Any, int]

ADAPT = (
    "A flow makes images of its own classes only: adapt it to the data (model.adapt(data), or glem adapt), or open the "
    "data without those classes."
)


def class_counts(model: GLEM, per_class: PerClass, real: Any = None) -> list[int]:
    """The number of images to make of each of the flow's K classes; the arguments are those of `SyntheticDataset`.

    "balance" makes none of a class that `real` does not name.
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


def match_targets(model: GLEM, real: Any) -> tuple[np.ndarray, np.ndarray]:
    """The flow's class of every image of a real data set, int64 [N], and of every class of it, int64.

    Classes are matched by name; labels of data without class names are the flow's indices. No image is read.
    """
    source = open_source(real)
    if source.named:
        index = match_classes(model, source, fix=ADAPT)
        return index[source.targets], index
    return check_targets(source.targets, len(source), model.num_classes), np.arange(model.num_classes)
