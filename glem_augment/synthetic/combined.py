"""Real and synthetic images in one data set, at a ratio."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from glem_augment.checks import check_number, check_whole
from glem_augment.data.classes import match_classes
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.balance import Names, by_class, targets_and_names
from glem_augment.synthetic.dataset import SyntheticDataset

ClassMap = Mapping[Any, int | None] | Iterable[int | None]


class RealAndSynthetic(Dataset):
    """The items of a real data set, then synthetic ones, with the real data's labels.

    Items are what the two data sets give, each with its own transform. A transform that is set here, as timm's
    create_loader does, comes after those of both. Next to real PIL images the synthetic ones come in the same mode (RGB
    or L); next to an `ImageData`, whose items are uint8 tensors, they are such tensors too, unless `synthetic` has a
    transform. Classes are matched by name; if the real data names none, its labels are the flow's indices. A synthetic
    image's label goes through the synthetic data's `target_transform`, or else through the real data's.

    Args:
        real: a torchvision or timm data set, an `ImageData`, or a Subset of one; its items are (image, label).
        synthetic: with at least `ratio * len(real)` images (unless ratio is None).
        ratio: synthetic images per real one: 1 doubles the data. They are taken class by class in turn, so that any
            ratio is balanced as `synthetic` is. None: all of them, as for per_class="balance".
        class_map: the real data's label for each of the flow's K classes, where names do not match: K labels in the
            order of the flow's classes, or a mapping from all its class names, ids or indices to labels. None or -1:
            the real data has no such class, and `synthetic` gives no image of it.

    Attributes:
        real, synthetic: as given. transform: set here. targets: int labels of all items. classes, class_to_idx: those
        of the real data, if it names any.

    Raises:
        DataError: classes that do not match, or too few synthetic images. ValueError, TypeError: a bad ratio or
            class_map.
    """

    def __init__(
        self, real: Any, synthetic: SyntheticDataset, ratio: float | None = 1.0, class_map: ClassMap | None = None
    ) -> None:
        if not isinstance(synthetic, SyntheticDataset):
            raise TypeError(f"synthetic must be a SyntheticDataset, got {type(synthetic).__name__}")
        if isinstance(real, (tuple, list)):
            raise TypeError(
                f"real must be a data set of (image, label) items, got a {type(real).__name__}: "
                "torch.utils.data.TensorDataset(images, labels) makes one of two tensors"
            )
        self.real, self.synthetic, self.ratio = real, synthetic, ratio
        self._transform: Callable[[Any], Any] | None = None
        real_targets, names = targets_and_names(real)
        if names is not None:
            self.classes: list[str] = list(names[1])
            self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self._real_count = len(real)
        if ratio is None:
            self.chosen = np.arange(len(synthetic))
        else:
            count = round(check_number("ratio", ratio, 0.0, math.inf) * self._real_count)
            if count > len(synthetic):
                raise DataError(
                    f"ratio={ratio:g} of {self._real_count} real images needs {count} synthetic ones, there are "
                    f"{len(synthetic)}: raise per_class"
                )
            self.chosen = np.sort(_in_turn(synthetic.counts)[:count])
        label_of = _labels(synthetic.model, names, class_map)
        labels = label_of[np.asarray(synthetic.targets, dtype=np.int64)[self.chosen]]
        missing = sorted({synthetic.classes[synthetic.targets[i]] for i in self.chosen[labels < 0].tolist()})
        if missing:
            fix = "give class_map" if class_map is None else "give class_map a label for them"
            raise DataError(
                f"the real data has no class for the synthetic {', '.join(missing[:10])}: {fix}, or leave them out of "
                "per_class"
            )
        self.targets: list[int] = real_targets.tolist() + labels.tolist()

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """A transform of all images, after those of the two data sets."""
        return self._transform

    @transform.setter
    def transform(self, value: Callable[[Any], Any] | None) -> None:
        for data, name in ((_innermost(self.real), "real"), (self.synthetic, "synthetic")):
            if value is not None and getattr(data, "transform", None) is not None:
                raise AttributeError(f"the {name} data set has a transform already: leave it out there")
        self._transform = value

    def __len__(self) -> int:
        return self._real_count + len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """(image, label); IndexError out of range."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[tuple[Any, Any]]:
        """Several items; the synthetic ones among them are decoded together."""
        places = [self._place(i) for i in indices]
        pictures = iter(
            self._pictures([int(self.chosen[p - self._real_count]) for p in places if p >= self._real_count])
        )
        label_transform = self.synthetic.target_transform or getattr(_innermost(self.real), "target_transform", None)
        items = []
        for place in places:
            if place < self._real_count:
                image, label = self.real[place]
            else:
                image, label = next(pictures), self.targets[place]
                label = label if label_transform is None else label_transform(label)
            items.append((image if self._transform is None else self._transform(image), label))
        return items

    def _pictures(self, indices: list[int]) -> Iterable[Any]:
        """Synthetic images, of the kind that the real ones are."""
        if not indices:
            return []
        if self.synthetic.transform is None and isinstance(_innermost(self.real), ImageData):
            return self.synthetic.images(indices)
        pictures, mode = self.synthetic.pictures(indices), self._real_mode
        return [p.convert(mode) if mode and isinstance(p, Image.Image) else p for p in pictures]

    @functools.cached_property
    def _real_mode(self) -> str | None:
        """The mode of the real PIL images, as the first of them has it; None for other images."""
        first = self.real[0][0] if self._real_count else None
        return first.mode if isinstance(first, Image.Image) else None

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else int(index)
        if not 0 <= place < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return place

    def __repr__(self) -> str:
        return f"RealAndSynthetic({self._real_count} real, {len(self.chosen)} synthetic, ratio={self.ratio})"


def _labels(model: GLEM, names: Names | None, class_map: ClassMap | None) -> np.ndarray:
    """The real data's label of every flow class, int64 [K]; -1 = none."""
    k = model.num_classes
    labels = np.full(k, -1)
    if class_map is None:
        fix = "Give class_map, the real data's label for every class of the flow."
        index = np.arange(k) if names is None else match_classes(model.class_ids, model.classes, *names, fix=fix)
        labels[index] = np.arange(len(index))
        return labels
    if isinstance(class_map, Mapping):
        by_index = by_class(model, class_map, "class_map", complete=True)
        class_map = [by_index[i] for i in range(k)]
    given = class_map.tolist() if isinstance(class_map, Tensor) else list(class_map)
    high = None if names is None else len(names[1]) - 1
    if len(given) != k:
        raise DataError(f"class_map has {len(given)} entries, the flow {k} classes")
    for i, (name, label) in enumerate(zip(model.classes, given, strict=True)):
        labels[i] = check_whole(f"class_map for {name!r}", -1 if label is None else label, -1)
        if high is not None and labels[i] > high:
            raise DataError(f"class_map for {name!r} is {label}; the real data has labels from 0 to {high}")
    return labels


def _innermost(real: Any) -> Any:
    """The data set inside torch's Subset."""
    while isinstance(real, Subset):
        real = real.dataset
    return real


def _in_turn(counts: list[int]) -> np.ndarray:
    """Indices of all synthetic images: the first of every class, the second, ..."""
    cls = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts])
    return np.lexsort((cls, within))
