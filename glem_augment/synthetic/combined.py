"""Real and synthetic images in one data set."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from glem_augment.checks import check_number
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData, LabelledImages, open_data
from glem_augment.images.matching import ClassMap, match_classes, of_hugging_face
from glem_augment.images.readers import as_pil
from glem_augment.images.sources import open_source
from glem_augment.synthetic.dataset import SyntheticDataset


class RealAndSynthetic(Dataset):
    """The items of a real data set, then synthetic ones, with the real data's labels.

    Each data set applies its transform, and `transform` comes after (timm's create_loader sets it). Synthetic images
    are PIL images (RGB beside RGB), or tensors beside an `ImageData` and for images that are not 8-bit grey or RGB.
    Classes are matched by name. If the real data names no classes, its labels are the model's indices. The
    `target_transform` of `synthetic`, or else of `real`, is applied to synthetic labels.

    Args:
        real: a data set with items (image, label), for example of torchvision or timm, an `ImageData`, a Subset, or
            any other argument of `open_data`. Names and Hugging Face data sets give PIL images as they are stored,
            a pair (images, labels) gives tensors.
        synthetic: a `SyntheticDataset`, or the folder of an export.
        share: the data set stays as long as the real one, and each item is with this probability a synthetic image of
            its class, drawn anew by torch's random numbers each time. Advised beside few images. None: all synthetic
            images come after the real ones.
        class_map: how the real data's classes map to the model's, see `match_classes`. The real data may have more
            classes than the model. The model may have further classes, if `synthetic` has no images of them.
        transform: applied to every image, real and synthetic. For a DataLoader it must make tensors of one size from
            PIL images.

    Raises:
        DataError: classes that do not match, or the folder of an unfinished export.

    Attributes:
        targets: int labels of all items. classes, class_to_idx: the classes of the real data, if it names any.
    """

    def __init__(
        self,
        real: LabelledImages,
        synthetic: SyntheticDataset | ImageData | str | os.PathLike[str],
        class_map: ClassMap = None,
        transform: Callable[[Any], Any] | None = None,
        share: float | None = None,
    ) -> None:
        if isinstance(synthetic, str | os.PathLike):
            synthetic = open_data(synthetic)
        if not isinstance(synthetic, SyntheticDataset | ImageData):
            raise TypeError(f"synthetic must be a SyntheticDataset or a folder, got {type(synthetic).__name__}")
        if isinstance(real, tuple):
            real = open_data(real)
        source = open_source(real)
        if isinstance(real, str | os.PathLike) or of_hugging_face(real):
            real = source
        self.real, self.synthetic = real, synthetic
        self.transform = transform
        if source.named:
            self.classes = list(source.classes)
            self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self._real_count = len(source)
        label_of = np.arange(len(synthetic.classes))  # the real data's label of every synthetic class
        if source.named or class_map is not None:
            index = match_classes(synthetic, source, class_map, partial=True)
            label_of[:] = -1
            if len(np.unique(matched := index[index >= 0])) < len(matched):
                raise DataError("one class of the synthetic images stands for several real classes: no label fits")
            label_of[matched] = np.flatnonzero(index >= 0)
        made = np.asarray(synthetic.targets, dtype=np.int64)
        self.share = None if share is None else check_number("share", share, 0.0, 1.0)
        labels = label_of[made]
        missing = sorted({synthetic.classes[cls] for cls in made[labels < 0]})
        if missing:
            names = ", ".join(missing[:10])
            raise DataError(f"the real data has no class for the synthetic {names}: give class_map, or draw none of it")
        self._labels: list[int] = source.targets.tolist() + labels.tolist()
        self.targets = self._labels[: len(self)]
        self._of_label = {y: self._real_count + np.flatnonzero(labels == y) for y in np.unique(labels).tolist()}

    def __len__(self) -> int:
        return self._real_count + (len(self.synthetic) if self.share is None else 0)

    def __repr__(self) -> str:
        shared = "" if self.share is None else f"a share of {self.share:g} of "
        return (
            f"RealAndSynthetic({self._real_count} real and {shared}{len(self.synthetic)} synthetic images of "
            f"{self.synthetic!r})"
        )

    def _place(self, index: int) -> int:
        """The place of item `index` among all real and synthetic images."""
        place = range(len(self))[index]  # negative ones count from the end
        others = self._of_label.get(self._labels[place])
        if self.share is None or others is None or float(torch.rand(())) >= self.share:
            return place
        return int(others[int(torch.randint(len(others), ()))])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[tuple[Any, Any]]:
        """Several items; synthetic images are decoded together."""
        places = [self._place(i) for i in indices]
        chosen = [place - self._real_count for place in places if place >= self._real_count]
        pictures = iter(self._pictures(chosen) if chosen else ())
        label_transform = getattr(self.synthetic, "target_transform", None)
        label_transform = label_transform or getattr(_innermost(self.real), "target_transform", None)
        items = []
        for place in places:
            if place < self._real_count:
                image, label = self.real[place]
            else:
                image, label = next(pictures), (label_transform or int)(self._labels[place])
            items.append((image if self.transform is None else self.transform(image), label))
        return items

    def _pictures(self, indices: list[int]) -> Iterable[Any]:
        """Synthetic images: tensors beside an ImageData, otherwise PIL images, after the transform of `synthetic`."""
        drawn, transform = self.synthetic, getattr(self.synthetic, "transform", None)
        images = drawn.subset(indices).tensor() if isinstance(drawn, ImageData) else drawn.images(indices)
        if transform is None and isinstance(_innermost(self.real), ImageData):
            return images
        pictures: Iterable[Any] = map(as_pil, images)
        if self._beside_rgb:
            pictures = (p.convert("RGB") if isinstance(p, Image.Image) else p for p in pictures)
        return pictures if transform is None else map(transform, pictures)

    @functools.cached_property
    def _beside_rgb(self) -> bool:
        """Whether the real images are RGB, so that a batch with grey synthetic images has one shape."""
        return self._real_count > 0 and getattr(self.real[0][0], "mode", None) == "RGB"


def _innermost(real: Any) -> Any:
    """The data set inside torch's Subset."""
    while isinstance(real, Subset):
        real = real.dataset
    return real
