"""How many images of each class are drawn, and in which order the classes are numbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from glem_augment.checks import check_whole
from glem_augment.images.dataset import ImageData, LabelledImages
from glem_augment.images.matching import ClassMap, check_targets, composed, match_classes
from glem_augment.images.sources import Source, open_source
from glem_augment.model.glem import GLEM

MOST = 10**7  # images of a class
PerClass = int | Literal["balance"] | Sequence[int] | Mapping[str, int]
_ADAPT = (
    "A model makes images of its classes only: adapt it to the data (model.adapt(data), or glem fit), or leave all "
    "further classes out of the data."
)


class Real(NamedTuple):
    """Real images, with the model's class of each image (`targets`, int64 [N]) and of each real class (`classes`)."""

    data: Source | ImageData
    targets: np.ndarray
    classes: np.ndarray


def open_real(model: GLEM, data: LabelledImages, class_map: ClassMap = None) -> Real:
    """Open real images; only labels are read now. Labels of data without class names are the model's indices."""
    source = data if isinstance(data, ImageData) else open_source(data)
    if source.named or class_map is not None:
        index = match_classes(model, source, class_map, fix=_ADAPT)
        return Real(source, index[source.targets], index)
    targets = check_targets(source.targets, len(source), model.num_classes)
    return Real(source, targets, np.arange(model.num_classes))


def class_counts(model: GLEM, per_class: PerClass, real: Real | None) -> list[int]:
    """The number of images of each of the model's K classes; see `per_class` of `SyntheticDataset`."""
    k, names = model.num_classes, list(model.classes)
    given: Sequence[Any]
    if isinstance(per_class, str):
        if per_class != "balance":
            raise ValueError(
                f"per_class must be a number, {k} numbers, a table of names or 'balance', got {per_class!r}"
            )
        if real is None:
            raise ValueError("per_class='balance' fills up a real data set: give real= (--real)")
        present = np.bincount(real.targets, minlength=k)
        given = np.where(np.isin(np.arange(k), real.classes), present.max() - present, 0).tolist()
        if not any(given):
            raise ValueError(f"per_class='balance': all classes have {present.max()} images already")
    elif isinstance(per_class, Mapping):
        table = {composed(str(name)): count for name, count in per_class.items()}
        if unknown := [name for name in table if name not in map(composed, names)]:
            raise ValueError(f"per_class names {unknown[0]!r}; the model has {', '.join(names[:20])}")
        given = [table.get(composed(name), 0) for name in names]
    elif isinstance(per_class, list | tuple):
        given = per_class
    else:
        given = [per_class] * k
    if len(given) != k:
        raise ValueError(f"per_class must be {k} numbers, one for each class; got {len(given)}")
    counts = [check_whole(f"per_class for {name!r}", count, 0, MOST) for name, count in zip(names, given, strict=True)]
    if not any(counts):
        raise ValueError("per_class is 0 for all classes: give at least one image")
    return counts


def label_order(counts: Sequence[int], real: Real | None) -> list[int]:
    """The model's classes in the order of the real data's labels, then further classes that get images."""
    named = list(range(len(counts))) if real is None else list(dict.fromkeys(real.classes.tolist()))
    return [*named, *(cls for cls, count in enumerate(counts) if count and cls not in named)]
