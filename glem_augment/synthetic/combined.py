"""Real and synthetic images in one data set, at a ratio."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Subset

from glem_augment.checks import check_number, check_whole
from glem_augment.data.classes import match_classes
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.balance import Names, class_values, targets_and_names
from glem_augment.synthetic.dataset import SyntheticDataset

ClassMap = Mapping[Any, int | None] | Sequence[int | None]


class RealAndSynthetic(Dataset):
    """The items of a real data set, then synthetic ones, with the real data's labels.

    Each data set applies its own transform. A transform that is set here, as timm's create_loader does, comes after.
    Next to real PIL images the synthetic ones come in the same mode (RGB or L). Next to an `ImageData`, whose items are
    uint8 tensors, they are such tensors too, unless `synthetic` has a transform. Classes are matched by name; if the
    real data names none, its labels are the flow's indices. A synthetic image's label goes through the synthetic data's
    `target_transform`, or else through the real data's.

    Args:
        real: a torchvision or timm data set, an `ImageData`, or a Subset of one; its items are (image, label).
        synthetic: with at least `ratio * len(real)` images (unless ratio is None).
        ratio: synthetic images per real one: 1 doubles the data. They are taken class by class in turn, so that any
            ratio is balanced as `synthetic` is. None: all of them, as for per_class="balance".
        class_map: the real data's label for each of the flow's classes, where names do not match: K labels, or a
            mapping from class names, ids or indices. None, -1 or left out: the real data has no such class, and
            `synthetic` must give no image of it.

    Attributes:
        transform: set here. targets: int labels of all items. classes, class_to_idx: those of the real data, if it
            names any.

    Raises:
        DataError: classes that do not match, or too few synthetic images. ValueError, TypeError: another bad argument.
    """

    def __init__(
        self, real: Any, synthetic: SyntheticDataset, ratio: float | None = 1.0, class_map: ClassMap | None = None
    ) -> None:
        if not isinstance(synthetic, SyntheticDataset):
            raise TypeError(f"synthetic must be a SyntheticDataset, got {type(synthetic).__name__}")
        if isinstance(real, (tuple, list)):
            raise TypeError(f"real must be a data set of (image, label) items, got a {type(real).__name__}")
        self.real, self.synthetic, self.ratio = real, synthetic, ratio
        self.transform: Callable[[Any], Any] | None = None
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
                raise DataError(f"{ratio=} needs {count} synthetic images, there are {len(synthetic)}: raise per_class")
            self.chosen = np.sort(_in_turn(synthetic.counts)[:count])
        label_of = _labels(synthetic.model, real, names, class_map)
        labels = label_of[np.asarray(synthetic.targets, dtype=np.int64)[self.chosen]]
        missing = sorted({synthetic.classes[synthetic.targets[i]] for i in self.chosen[labels < 0].tolist()})
        if missing:
            raise DataError(
                f"the real data has no class for the synthetic {', '.join(missing[:10])}: give class_map a label for "
                "them, or leave them out of per_class"
            )
        self.targets: list[int] = real_targets.tolist() + labels.tolist()

    def __len__(self) -> int:
        return self._real_count + len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[tuple[Any, Any]]:
        """Several items; the synthetic ones among them are decoded together."""
        places = [range(len(self))[i] for i in indices]  # negative ones count from the end
        chosen = [int(self.chosen[place - self._real_count]) for place in places if place >= self._real_count]
        pictures = iter(self._pictures(chosen))
        label_transform = self.synthetic.target_transform or getattr(_innermost(self.real), "target_transform", None)
        items = []
        for place in places:
            if place < self._real_count:
                image, label = self.real[place]
            else:
                image, label = next(pictures), (label_transform or int)(self.targets[place])
            items.append((image if self.transform is None else self.transform(image), label))
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

    def __repr__(self) -> str:
        return f"RealAndSynthetic({self._real_count} real, {len(self.chosen)} synthetic, ratio={self.ratio})"


def _labels(model: GLEM, real: Any, names: Names | None, class_map: Any) -> np.ndarray:
    """The real data's label of every flow class, int64 [K]; -1 = none."""
    labels = np.full(model.num_classes, -1)
    if class_map is None:
        fix = "Give class_map, the real data's label for every class of the flow."
        if names is None:
            return np.arange(model.num_classes)
        index = match_classes(model, real, fix=fix)
        labels[index] = np.arange(len(index))
        return labels
    for i, label in enumerate(class_values(model, class_map, "class_map", None)):
        labels[i] = -1 if label is None else check_whole(f"class_map for {model.classes[i]!r}", label, -1)
    if names is not None and labels.max() >= len(names[1]):
        raise DataError(f"class_map gives label {labels.max()}; the real data has labels from 0 to {len(names[1]) - 1}")
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
