"""Real and synthetic images in one data set, at a ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from glem_augment.checks import check_number
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.synthetic.balance import class_index, for_every_class, targets_and_classes
from glem_augment.synthetic.dataset import SyntheticDataset


class RealAndSynthetic(Dataset):
    """The items of a real data set, then synthetic ones, with the real data's labels.

    Items are what the two data sets give (each applies its own transform; setting `transform` here, as timm's
    create_loader does, sets it on both). Beside an `ImageData`, whose items are uint8 tensors, synthetic ones without a
    transform are such tensors too. A `Subset` is left as it is, since its data set may serve others: what is set here
    comes after it. Classes are matched by name; where the real data names none, its numbers are
    the flow's. A synthetic image's label goes through the synthetic data's `target_transform`, or else the real data's,
    where either has one.

    Args:
        real: a torchvision or timm data set, an `ImageData`, ...: its items are (image, label).
        synthetic: with at least `ratio * len(real)` images (unless ratio is None).
        ratio: synthetic images per real one: 1 doubles the data. They are taken class by class in turn, so that any
            ratio is balanced as `synthetic` is. None: all of them, as for per_class="balance".
        class_map: in place of matching names, the real data's label for each of the flow's K classes: K labels in the
            order of the flow's classes, or a mapping from all its class names, ids or indices to labels. None or -1:
            the real data has no such class, and `synthetic` gives no image of it.

    Attributes:
        real, synthetic: as given; targets: int labels of all items; classes, class_to_idx: the real data's, where it
            names any.

    Raises:
        DataError: classes that do not match, a bad class_map, or too few synthetic images. ValueError, TypeError: a bad
            ratio, or a class_map of another type.
    """

    def __init__(
        self,
        real: Any,
        synthetic: SyntheticDataset,
        ratio: float | None = 1.0,
        class_map: Mapping[Any, int | None] | Iterable[int | None] | None = None,
    ) -> None:
        if not isinstance(synthetic, SyntheticDataset):
            raise TypeError(f"synthetic must be a SyntheticDataset, got {type(synthetic).__name__}")
        if isinstance(real, (tuple, list)):
            raise TypeError(
                f"real must be a data set of (image, label) items, got a {type(real).__name__}: "
                "torch.utils.data.TensorDataset(images, labels) makes one of two tensors"
            )
        self.real, self.synthetic, self.ratio = real, synthetic, ratio
        self._of_subset: Callable[[Any], Any] | None = None
        real_targets, names = targets_and_classes(real)
        if names is not None:
            self.classes: list[str] = list(names[1])
            self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self._label_of = self._labels(names, class_map)
        if ratio is None:
            chosen = np.arange(len(synthetic))
        else:
            count = round(check_number("ratio", ratio, 0.0, math.inf) * len(real))
            if count > len(synthetic):
                raise DataError(
                    f"ratio={ratio:g} of {len(real)} real images needs {count} synthetic ones, there are "
                    f"{len(synthetic)}: raise per_class"
                )
            chosen = np.sort(_in_turn(synthetic.counts)[:count])
        self.chosen = chosen
        labels = self._label_of[np.asarray(synthetic.targets, dtype=np.int64)[chosen]]
        missing = sorted({synthetic.classes[synthetic.targets[i]] for i in chosen[labels < 0].tolist()})
        if missing:
            fix = "give class_map" if class_map is None else "give class_map a label for them"
            raise DataError(
                f"the real data has no class for the synthetic {', '.join(missing[:10])}: {fix}, or leave them out of "
                "per_class"
            )
        self.targets: list[int] = real_targets.tolist() + labels.tolist()
        self._real_count = len(real)

    def _labels(
        self,
        names: tuple[list[str], list[str]] | None,
        class_map: Mapping[Any, int | None] | Iterable[int | None] | None,
    ) -> np.ndarray:
        """The real data's label of every flow class, -1 = none."""
        model = self.synthetic.model
        if class_map is not None:
            return self._given_labels(class_map, None if names is None else len(names[1]))
        index = class_index(model, names, "Give class_map, the real data's label for every class of the flow.")
        if index is None:
            return np.arange(model.num_classes)
        labels = np.full(model.num_classes, -1)
        labels[index] = np.arange(len(index))
        return labels

    def _given_labels(
        self, class_map: Mapping[Any, int | None] | Iterable[int | None], real_classes: int | None
    ) -> np.ndarray:
        """`class_map` as labels, -1 = none; real_classes: None where the real data does not say how many it has."""
        model = self.synthetic.model
        if isinstance(class_map, Mapping):
            try:
                given = for_every_class(model, class_map, "class_map")
            except ValueError as error:
                raise DataError(str(error)) from None
        elif isinstance(class_map, Iterable) and not isinstance(class_map, (str, bytes)):
            given = class_map.tolist() if isinstance(class_map, (np.ndarray, Tensor)) else list(class_map)
        else:
            raise TypeError(f"class_map must be labels or a mapping to labels, got {class_map!r}")
        if len(given) != model.num_classes:
            raise DataError(f"class_map has {len(given)} entries, the flow {model.num_classes} classes")
        labels = np.full(model.num_classes, -1)
        for i, label in enumerate(given):
            if label is None:
                continue
            name = f"class_map for {model.classes[i]!r}"
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
                raise TypeError(f"{name} must be a label of the real data or None, got {label!r}")
            if label < -1 or (real_classes is not None and label >= real_classes):
                high = "up" if real_classes is None else f"to {real_classes - 1}"
                raise DataError(f"{name} is {label}; the real data has labels from 0 {high} (None: no such class)")
            labels[i] = label
        return labels

    @property
    def transform(self) -> Any:
        """The image transform of the real data; setting it sets that of the synthetic images as well, which come to it
        in the mode (RGB, L) that the real ones are in if these are PIL images."""
        return self._of_subset if isinstance(self.real, Subset) else getattr(self.real, "transform", None)

    @transform.setter
    def transform(self, value: Callable[[Any], Any] | None) -> None:
        if isinstance(self.real, Subset):
            if value is not None and getattr(_inside(self.real), "transform", None) is not None:
                raise AttributeError("the data set inside Subset has a transform already: leave it out there")
            like = self.real[0][0] if self._real_count else None
            self._of_subset = value
        elif not hasattr(self.real, "transform"):
            raise AttributeError(f"{type(self.real).__name__} has no transform that could be set: set one inside it")
        else:
            before = self.real.transform
            try:
                # Not None, which a data set of the user's may call.
                self.real.transform = _as_it_is
                like = self.real[0][0] if self._real_count else None
            except BaseException:
                self.real.transform = before
                raise
            self.real.transform = value
        mode = like.mode if isinstance(like, Image.Image) else None
        self.synthetic.transform = value if value is None or mode is None else _InMode(mode, value)

    def __len__(self) -> int:
        return self._real_count + len(self.chosen)

    def is_synthetic(self, index: int) -> bool:
        """Whether item `index` is a synthetic one."""
        return self._place(index) >= self._real_count

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """(image, label); IndexError out of range."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[tuple[Any, Any]]:
        """Several items; the synthetic ones among them are decoded together."""
        places = [self._place(i) for i in indices]
        wanted = [int(self.chosen[p - self._real_count]) for p in places if p >= self._real_count]
        tensors = self.synthetic.transform is None and isinstance(_inside(self.real), ImageData)
        draw = self.synthetic.images if tensors else self.synthetic.pictures
        made = iter(draw(wanted) if wanted else ())
        shaped = self.synthetic.target_transform or _target_transform(self.real) or _as_it_is
        # The number is the real data's by now; what it looks like is for a target_transform to say.
        return [
            self._real_item(place) if place < self._real_count else (next(made), shaped(self.targets[place]))
            for place in places
        ]

    def _real_item(self, place: int) -> tuple[Any, Any]:
        if self._of_subset is None:
            return self.real[place]
        image, *rest = self.real[place]
        return (self._of_subset(image), *rest)

    def weights(self, share: float) -> Tensor:
        """Weights for `torch.utils.data.WeightedRandomSampler` that make `share` of what is drawn synthetic.

        Args:
            share: in [0, 1].

        Returns:
            float64 [len].

        Raises:
            ValueError: out of range, or where there is nothing of one kind.
        """
        check_number("share", share, 0.0, 1.0)
        fake = len(self.chosen)
        if (share > 0 and fake == 0) or (share < 1 and self._real_count == 0):
            raise ValueError(
                f"share={share:g} needs both kinds: there are {self._real_count} real and {fake} synthetic"
            )
        parts = [
            torch.full((n,), s / max(1, n), dtype=torch.float64)
            for n, s in ((self._real_count, 1 - share), (fake, share))
        ]
        return torch.cat(parts)

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else int(index)
        if not 0 <= place < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return place

    def __repr__(self) -> str:
        return f"RealAndSynthetic({self._real_count} real, {len(self.chosen)} synthetic, ratio={self.ratio})"


def _as_it_is(value: Any) -> Any:
    return value


def _inside(real: Any) -> Any:
    """The data set inside torch's Subset."""
    while isinstance(real, Subset):
        real = real.dataset
    return real


def _target_transform(real: Any) -> Callable[[int], Any] | None:
    return getattr(_inside(real), "target_transform", None)


class _InMode:
    """A transform of PIL images that gets them in one mode; a class, so that workers can be sent it."""

    def __init__(self, mode: str, transform: Callable[[Any], Any]) -> None:
        self.mode, self.transform = mode, transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image.convert(self.mode))

    def __repr__(self) -> str:
        return f"_InMode({self.mode!r}, {self.transform!r})"


def _in_turn(counts: list[int]) -> np.ndarray:
    """Indices of all synthetic images: the first of every class, the second, ..."""
    cls = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts])
    return np.lexsort((cls, within))
