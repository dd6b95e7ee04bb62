"""SyntheticDataset: images drawn from the classes of a GLEM, by index.

An image depends on model, seed, class and place in the class alone: not on batches, order, workers, or on how many
images there are. `draws` says how.
"""

from __future__ import annotations

import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from glem_augment.checks import check_choice, check_whole
from glem_augment.distributed import progress_bar
from glem_augment.images.dataset import check_indices
from glem_augment.images.matching import ClassMap
from glem_augment.images.readers import as_pil
from glem_augment.io import expand
from glem_augment.model.glem import GLEM, as_model
from glem_augment.names import FORMATS, DrawSource, Format
from glem_augment.synthetic.draws import Draws
from glem_augment.synthetic.export import export_set
from glem_augment.synthetic.per_class import PerClass, class_counts, label_order, open_real


class SyntheticDataset(Dataset):
    """A map-style data set of synthetic images, in the order of the model's classes, with torchvision's attributes.

    Items are (PIL image, int). Images that are not 8-bit grey or RGB are tensors [C,H,W] of the data's dtype. The first
    use of an image decodes its block of 8 to 64 images of its class, which stays in a cache. Every DataLoader worker
    has a cache. So for workers, and for shuffled sets larger than the cache, call `preload` first, or `export` and read
    the files.

    An image with values that leave the range by more than its width, or are not finite, is drawn again up to 4 times.

    Args:
        model: a GLEM (with fitted modes for source "rfcm"), or its name (see `GLEM.from_pretrained`). It must not
            change afterwards.
        per_class: images of each class: a number for all, a list of K numbers, a table of class names, or "balance",
            which fills up each class of `real` to its largest class. Classes that a table lacks get no images.
        temperature: factor on the standard deviation. None: 0.9, or 1.0 for a private model, for whose
            sets lower temperatures were worse.
        seed: int >= 0; seed, class and place within the class fix an item's latent.
        transform: PIL image (or tensor) -> anything; target_transform: int -> anything. A DataLoader makes batches of
            tensors alone, so it needs a transform such as torchvision's `ToTensor()`.
        source: "gaussian": the diagonal Gaussian of the class. "rfcm": mean and full covariance of its real latents.
            None: rfcm, or gaussian if the model has no modes.
        device: where to decode; None: where the model is.
        cache_bytes: memory for decoded images in each process; one block is always kept.
        real: real images, see `open_data`, for "balance". Labels, also in exports, are the class numbers
            of `real`, so `ConcatDataset([real, synthetic])` has one numbering; further classes of the model follow.
        class_map: how the classes of `real` map to the model's, see `match_classes`.

    Raises:
        ValueError: `real` with a private model, since real images would decide the set or the order of its classes; or
            arguments that make no sense, or have no effect with this source.
    """

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        per_class: PerClass = 100,
        temperature: float | None = None,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: DrawSource | None = None,
        device: torch.device | str | None = None,
        cache_bytes: int = 256 * 2**20,
        real: Any = None,
        class_map: ClassMap = None,
    ) -> None:
        self.cache_bytes = check_whole("cache_bytes", cache_bytes, 0)
        self.model = as_model(model).on(device)
        matched = None
        if real is not None:
            self.model.refuse_if_private("real=")
            matched = open_real(self.model, real, class_map)
        elif class_map is not None:
            raise ValueError("class_map has no effect without real=: leave it out")
        self.counts = class_counts(self.model, per_class, matched)
        self.transform, self.target_transform = transform, target_transform
        order = label_order(self.counts, matched)
        self.draws = Draws(self.model, self.counts, order, source, seed, temperature)
        self.source, self.seed, self.temperature = self.draws.source, self.draws.seed, self.draws.temperature
        self.image_shape: tuple[int, int, int] = self.model.image_shape
        self.pixel_range = self.model.pixel_range
        # As in exports, the real data's classes come first, then further classes of the model.
        numbered = [*order, *(cls for cls in range(self.model.num_classes) if cls not in order)]
        self.classes = [self.model.classes[cls] for cls in numbered]
        self.class_ids = [self.model.class_ids[cls] for cls in numbered]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.targets: list[int] = np.repeat(np.argsort(numbered), self.counts).tolist()
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._preloaded: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        c, h, w = self.image_shape
        drawn = f"temperature {self.temperature:g}, source {self.source!r}, seed {self.seed}"
        classes = sum(count > 0 for count in self.counts)
        return f"SyntheticDataset({len(self)} images {c}x{h}x{w} of {classes} classes, {drawn}, from {self.model!r})"

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index`: (image, label) after the transforms."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Several items, as in `__getitem__`; each of their blocks is decoded once."""
        items = []
        for index, image in zip(indices, map(as_pil, self.images(indices)), strict=True):
            label = int(self.targets[index])
            image = image if self.transform is None else self.transform(image)
            items.append((image, label if self.target_transform is None else self.target_transform(label)))
        return items

    def images(self, indices: Sequence[int]) -> Tensor:
        """Images of several items, [n, C, H, W] of the data's dtype on the CPU."""
        chosen = check_indices(indices, len(self))
        if self._preloaded is not None:
            return self._preloaded[torch.from_numpy(chosen)]
        out = torch.empty(len(chosen), *self.image_shape, dtype=self.pixel_range.torch_dtype)
        for block, rows, places in self._blocks(chosen):
            out.numpy()[rows] = self._cached(*block).numpy()[places]  # torch can't index uint16
        return out

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Latents z of several items, float32 [n, d] on the model's device."""
        chosen = check_indices(indices, len(self))
        out = torch.empty(len(chosen), self.model.dim, device=self.model.device)
        for block, rows, places in self._blocks(chosen):
            out[rows] = self.draws.draw(*block).latents[places]
        return out

    def preload(self) -> None:
        """Decode all images now and keep them in memory. DataLoader workers that start later share it."""
        out = torch.empty(len(self), *self.image_shape, dtype=self.pixel_range.torch_dtype)
        for block in progress_bar("preload", self.draws.blocks(), unit="block"):
            rows = self._rows(*block)
            out[rows.start : rows.stop] = self.draws.draw(*block).images
        self._preloaded = out
        self._cached.cache_clear()

    def export(
        self,
        folder: str | os.PathLike[str],
        format: Format = "imagefolder",  # noqa: A002  (the word users expect)
        license: str | None = None,  # noqa: A002  (the Hub's word)
    ) -> Path:
        """Write all images, without the transforms, with glem-provenance.json and a README.

        Labels are the class numbers of `real`, then of further classes of the model that have images; without `real`
        the model's class numbers. A class without images has no folder, and torchvision's ImageFolder would number the
        later folders differently. So classes.json holds the label of every folder; `open_data` and `RealAndSynthetic`
        know it from the record. The same export to the same folder writes missing files, and so finishes a killed
        export.

        Args:
            format: "imagefolder" (folder/<class>/NNNNNN.png of 8 bits or grey of 16 bits, .npy of other images), or
                "webdataset" (data/train-*.tar of 8-bit grey or RGB images, which timm and the Hub read).
            license: the licence of the model's training images, which samples inherit. None: the licence in the model's
                record.

        Raises:
            FileExistsError: the folder holds an export of other images, or any other files.
            ModuleNotFoundError: "webdataset" needs the package of that name.
            OSError: the disk is full or cannot be written; the message names the path.
        """
        check_choice("format", format, FORMATS)
        export_set(self.draws, folder, format, license)
        return expand(folder)

    @functools.cached_property
    def _cached(self) -> Any:
        """The images of a block, of which the last ones are kept."""
        edges = self.draws.edges
        largest = (edges[-1] - edges[-2]) * math.prod(self.image_shape) * self.pixel_range.torch_dtype.itemsize
        blocks = max(1, self.cache_bytes // largest)
        return functools.lru_cache(blocks)(lambda cls, number: self.draws.draw(cls, number).images)

    def _rows(self, cls: int, number: int) -> range:
        """The items of a block."""
        places = self.draws.places(cls, number)
        return range(self._starts[cls] + places.start, self._starts[cls] + places.stop)

    def _blocks(self, index: np.ndarray) -> Iterator[tuple[tuple[int, int], list[int], np.ndarray]]:
        """For each block: (class, number), the rows of `index` [n] with items of it, and the places of these items."""
        cls = np.searchsorted(self._starts, index, side="right") - 1
        number = np.searchsorted(self.draws.edges, index - self._starts[cls], side="right") - 1
        rows: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, block in enumerate(zip(cls.tolist(), number.tolist(), strict=True)):
            rows[block].append(row)
        for block, at in rows.items():
            yield block, at, index[at] - self._rows(*block).start

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_cached"}  # a copy gets a new cache
