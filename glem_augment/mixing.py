"""Real and synthetic images in one data set, at a ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from glem_augment._arguments import check_number
from glem_augment.balance import class_index, targets_and_classes
from glem_augment.errors import DataError
from glem_augment.synthetic import SyntheticDataset


class RealAndSynthetic(Dataset):
    """The items of a real data set, then synthetic ones, with the real data's labels.

    Items are what the two data sets give (each applies its own transform). Classes are matched by name; where the
    real data names none, its numbers are the flow's.

    Args:
        real: a torchvision or timm data set, an `ImageData`, ...: its items are (image, label).
        synthetic: with at least `ratio * len(real)` images (unless ratio is None).
        ratio: synthetic images per real one: 1 doubles the data. They are taken class by class in turn, so that any
            ratio is balanced as `synthetic` is. None: all of them, as for per_class="balance".
        class_map: label in the real data of every flow class, in place of matching names.

    Attributes:
        real, synthetic: as given; targets: int labels of all items; classes, class_to_idx: the real data's, where it
            names any.

    Raises:
        DataError: classes that do not match, or too few synthetic images. ValueError, TypeError: a bad ratio.
    """

    def __init__(
        self,
        real: Any,
        synthetic: SyntheticDataset,
        ratio: float | None = 1.0,
        class_map: Iterable[int] | None = None,
    ) -> None:
        if not isinstance(synthetic, SyntheticDataset):
            raise TypeError(f"synthetic must be a SyntheticDataset, got {type(synthetic).__name__}")
        self.real, self.synthetic, self.ratio = real, synthetic, ratio
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
            raise DataError(f"the real data has no class for the synthetic {', '.join(missing[:10])}: give class_map")
        self.targets: list[int] = real_targets.tolist() + labels.tolist()
        self._real_count = len(real)

    def _labels(self, names: tuple[list[str], list[str]] | None, class_map: Iterable[int] | None) -> np.ndarray:
        """The real data's label of every flow class, -1 = none."""
        model = self.synthetic.model
        if class_map is not None:
            found = np.asarray(list(class_map), dtype=np.int64)
            if len(found) != model.num_classes:
                raise DataError(f"class_map has {len(found)} entries, the flow {model.num_classes} classes")
            return found
        index = class_index(model, names)
        if index is None:
            return np.arange(model.num_classes)
        labels = np.full(model.num_classes, -1)
        labels[index] = np.arange(len(index))
        return labels

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
        made = iter(self.synthetic.__getitems__(wanted)) if wanted else iter(())
        items = []
        for place in places:
            if place < self._real_count:
                items.append(self.real[place])
            else:
                image, label = next(made)
                # A target_transform of the synthetic data has the last word on what a label looks like.
                own = self.synthetic.target_transform is None
                items.append((image, self.targets[place] if own else label))
        return items

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


def _in_turn(counts: list[int]) -> np.ndarray:
    """Indices of all synthetic images: the first of every class, the second, ..."""
    cls = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts])
    return np.lexsort((cls, within))
