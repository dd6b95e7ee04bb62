"""Labelled images of one shape, opened from anywhere."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glem_augment.data.pixels import fit, in_threads
from glem_augment.data.sources import ArraySource, Source, open_source
from glem_augment.errors import BadImageError, DataError

CACHE_BYTES = 2 * 2**30


class ImageData(Dataset):
    """Labelled uint8 images of one shape. Item i is `(uint8 tensor [C,H,W], int)`.

    >>> data = open_data("bundled:fashion-mnist", "train")
    >>> x, y = next(data.batches(range(1000), batch_size=128))  # uint8 [B,C,H,W], int64 [B]

    Attributes:
        targets: int64 [N], indices into `classes`.
        classes: K names in index order.
        class_ids: K folder names, WordNet ids or digits.
        image_shape: (C,H,W).
        name: what it was opened from.
        skipped: the image and the reason, of every image that `open_data(..., skip_bad=True)` left out.
    """

    def __init__(self, source: Source, image_shape: tuple[int, int, int], name: str) -> None:
        self._source = source
        self._pixels: torch.Tensor | None = None  # all decoded images, if they fit in memory; subsets share them
        self._rows = np.arange(len(source))  # the images of `_pixels`, or else of the source, that belong to this set
        self.image_shape = image_shape
        self.name = _printable(name)
        self.targets = source.targets
        self.classes, self.class_ids = list(source.classes), list(source.class_ids)
        self.skipped: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_tensors(
        cls,
        x: torch.Tensor,
        y: torch.Tensor | np.ndarray | Sequence[int],
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
        name: str = "tensors",
    ) -> ImageData:
        """Wrap images x, uint8 [N,C,H,W], with labels y, N class indices, under K unique names (and identifiers).

        TypeError: `x` is not uint8, or `y` holds no integers. DataError: no images, or see `with_targets`.
        """
        if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8:
            raise TypeError(f"x must be a uint8 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 4 or x.numel() == 0:
            raise DataError(f"x must be [N,C,H,W] with at least one image, got shape {tuple(x.shape)}")
        channels, height, width = x.shape[1:]
        source = ArraySource(list(classes), list(classes), np.zeros(len(x), np.int64), [], name)
        data = cls(source, (channels, height, width), name).with_targets(y, classes, class_ids)
        data._pixels = x.detach().cpu().contiguous()
        return data

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as uint8 [C,H,W] (a copy), and its class index."""
        row = int(self._rows[index])
        image = self._decoded(row) if self._pixels is None else self._pixels[row].clone()
        return image, int(self.targets[index])

    def __repr__(self) -> str:
        return f"ImageData({self.name!r}, {len(self)} images {self.image_shape}, {len(self.classes)} classes)"

    def tensor(self) -> torch.Tensor:
        """All images as uint8 [N,C,H,W], in order. They may be shared, so do not write to them.

        Images that are not kept in memory are decoded by the call.
        """
        if self._pixels is None:
            return self._decode(progress=False)
        whole = len(self._pixels) == len(self) and bool((self._rows == np.arange(len(self))).all())
        return self._pixels if whole else self._pixels[torch.from_numpy(self._rows)]

    def batches(
        self, indices: Sequence[int] | np.ndarray | torch.Tensor, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (uint8 [B,C,H,W], int64 [B]) in the order of `indices`; the last one may be smaller.

        Images that are not kept in memory are decoded by a `DataLoader` with `workers` processes. Wrong indices (see
        `subset`) and a `batch_size` below 1 (ValueError) are refused at the call.
        """
        chosen = _check_indices(indices, len(self))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if self._pixels is None:
            return iter(DataLoader(self, batch_size=batch_size, sampler=chosen.tolist(), num_workers=workers))
        rows = torch.from_numpy(self._rows[chosen]).split(batch_size)
        labels = torch.from_numpy(self.targets[chosen]).split(batch_size)
        return ((self._pixels[part], y) for part, y in zip(rows, labels, strict=True) if len(part))

    def subset(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> ImageData:
        """The images at `indices`, in that order, sharing the pixels in memory.

        IndexError: an index outside 0..N-1. TypeError: indices that are not integers.
        """
        chosen = _check_indices(indices, len(self))
        other = copy.copy(self)
        other._rows, other.targets = self._rows[chosen], self.targets[chosen]
        return other

    def with_targets(
        self,
        targets: torch.Tensor | np.ndarray | Sequence[int],
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
    ) -> ImageData:
        """The same images under other labels, for example a flow's.

        DataError: not one label per image, a label outside 0..K-1, repeated names. TypeError: no integers.
        """
        other = copy.copy(self)
        other.targets = _check_targets(targets, len(self), len(classes))
        other.classes, other.class_ids = list(classes), list(classes if class_ids is None else class_ids)
        if len(other.class_ids) != len(other.classes):
            raise DataError(f"there are {len(other.classes)} class names but {len(other.class_ids)} class ids")
        for names in (other.classes, other.class_ids):
            if len(set(names)) != len(names):
                raise DataError(f"class names and ids must be unique, got {names[:12]}")
        return other

    def rows_of_classes(self, max_per_class: int | None = None) -> list[np.ndarray]:
        """Indices of each class's images, or of the first `max_per_class` of them. DataError: a class without any."""
        rows = [np.flatnonzero(self.targets == index)[:max_per_class] for index in range(len(self.classes))]
        empty = [self.classes[index] for index, found in enumerate(rows) if not len(found)]
        if empty:
            names = ", ".join(map(repr, empty[:10])) + (", ..." if len(empty) > 10 else "")
            raise DataError(
                f"{self.name} has no images of {len(empty)} of its {len(rows)} classes ({names}): add some, or name "
                "only the classes that it has (data.with_targets)"
            )
        return rows

    def _decoded(self, row: int) -> torch.Tensor:
        channels, height, width = self.image_shape
        return fit(self._source.pixels(row, channels), height, width)

    def _decode(self, progress: bool) -> torch.Tensor:
        out = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)

        def one(index: int) -> None:
            out[index] = self._decoded(int(self._rows[index]))

        in_threads(one, len(self), f"decoding {self.name}", progress)
        return out


# What methods of a model take: opened data, a pair (images uint8 [N,C,H,W], labels int64 [N]), or a name.
LabelledImages: TypeAlias = ImageData | tuple[torch.Tensor, torch.Tensor] | str | os.PathLike[str]


def open_data(
    spec: str | os.PathLike[str],
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = True,
    skip_bad: bool = False,
) -> ImageData:
    """Open labelled images.

    Args:
        spec: one of

            - `"bundled:fashion-mnist"`: 100 real images per class and split, 1x28x28, inside the package;
            - an ImageFolder (any split), or a folder with ImageFolders named train, test, val, validation, ... (test
              and val stand in for each other if only one is there). Classes are in torchvision's order;
            - a folder with MNIST-style idx files (`train-images-idx3-ubyte[.gz]`, `t10k-...`);
            - what `timm.data.create_dataset` reads, as `NAME@ROOT`: `torch/cifar10@data`, `hfds/ylecun/mnist`,
              `wds/@shards` (extra `wds`), or a .tar file with one folder per class. What torch/ names is never
              downloaded. Columns that are not called image and label follow a question mark:
              `hfds/uoft-cs/cifar100?input_key=img&target_key=fine_label`.
        split: train, test, val, ...
        image_size: (H,W), or one number for both: images are resized to cover it (bilinear with antialias) and cropped
            at the centre. None: the size that they share.
        channels: 1 (luma) or 3. None: 1 if all images are grey, otherwise 3. As in torchvision and timm, transparency
            and EXIF orientation are ignored, and animations give their first frame.
        cache_bytes: keep all decoded images in memory if they take no more than this.
        progress: show a bar on stderr when decoding takes longer than two seconds.
        skip_bad: leave out images that cannot be used, and list them in `skipped`. All images are then decoded once
            before anything else. A bad image of a stream (shards) is always an error.

    Returns:
        The data, decoded if they fit in `cache_bytes`; otherwise every header has been checked.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: a wrong `image_size` or `channels`.
        BadImageError: an image that cannot be read, or exceeds `PIL.Image.MAX_IMAGE_PIXELS` or 8 bits per channel.
        DataError: an unknown name or split, a class without images, different sizes without `image_size`.
    """
    size = _pair(image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    name = os.fspath(spec)
    source = open_source(name, split, size, cache_bytes)
    if len(source) == 0:
        raise DataError(f"{name} holds no images")
    bad = _bad_images(source, name, progress) if skip_bad else {}
    rows = np.asarray([row for row in range(len(source)) if row not in bad])
    try:
        shape = None if size is None or channels is None else (channels, *size)
        if shape is None or len(rows) * math.prod(shape) > cache_bytes:
            grey, found = _look_at_headers(source, rows, name, size is None, progress)
            shape = (channels or (1 if grey else 3), *(size or found))
        data = ImageData(source, shape, name).subset(rows)
        data.skipped = tuple((_printable(where), _printable(why)) for where, why in bad.values())
        if len(data) * math.prod(shape) <= cache_bytes:
            ready = _ready_pixels(source, shape)
            data._pixels = data._decode(progress) if ready is None else ready
            data._rows = np.arange(len(data))
    except BadImageError as error:
        raise BadImageError(
            f"{error}, or leave such images out with skip_bad=True (glem train, adapt, eval and preview: --skip-bad)"
        ) from error
    return data


def as_image_data(
    data: LabelledImages,
    image_shape: tuple[int, int, int],
    classes: Sequence[str] | None = None,
    split: str = "train",
    progress: bool = True,
) -> ImageData:
    """`data` as an ImageData of shape `image_shape` (C, H, W), for the methods of a model.

    Images of data given by name are resized and converted. `classes` are names to use instead of the data's (of a pair:
    "0", "1", ...). DataError: images of another shape. TypeError: another kind of `data`.
    """
    channels, height, width = image_shape
    names = None if classes is None else [str(name) for name in classes]
    if isinstance(data, str | os.PathLike):
        wanted = channels if channels in (1, 3) else None
        data = open_data(data, split, image_size=(height, width), channels=wanted, progress=progress)
    elif isinstance(data, tuple):
        x, y = data
        count = int(torch.as_tensor(y).max()) + 1 if len(y) else 0
        data = ImageData.from_tensors(x, y, names or [str(index) for index in range(count)])
    elif not isinstance(data, ImageData):
        raise TypeError(f"data must be an ImageData, a name, or (images, labels); got {type(data).__name__}")
    if names is not None and names != data.classes:
        data = data.with_targets(data.targets, names, data.class_ids if len(names) == len(data.class_ids) else None)
    if data.image_shape != image_shape:
        raise DataError(
            f"{data.name} has images of {' x '.join(map(str, data.image_shape))} (channels x height x width), the flow "
            f"takes {channels} x {height} x {width}: open the data with open_data(..., image_size=({height}, {width}), "
            f"channels={channels})"
        )
    return data


def _bad_images(source: Source, name: str, progress: bool) -> dict[int, tuple[str, str]]:
    """Where and why of every image that can't be decoded, by row. DataError: a class without any that can."""
    found: dict[int, tuple[str, str]] = {}

    def one(row: int) -> None:
        try:
            source.pixels(row, 1)
        except BadImageError as error:
            where = source.where(row)
            found[row] = (where, str(error).removeprefix(where).strip())

    in_threads(one, len(source), f"checking {name}", progress)
    bad = dict(sorted(found.items()))
    left = np.delete(source.targets, list(bad))
    empty = np.setdiff1d(source.targets, left)
    if len(empty):
        where, why = next(reason for row, reason in bad.items() if source.targets[row] in empty)
        names = ", ".join(source.classes[index] for index in empty[:10])
        raise DataError(
            f"no image of {len(empty)} of the {len(source.classes)} classes of {name} can be used ({names}): "
            f"{where}: {why}"
        )
    return bad


def _look_at_headers(
    source: Source, rows: np.ndarray, name: str, same_size: bool, progress: bool
) -> tuple[bool, tuple[int, int]]:
    """Whether all images at `rows` are grey, and (H, W) of the first.

    All headers are read, so that bad files (BadImageError) and, with `same_size`, images of different sizes (DataError)
    show before any work is done.
    """
    if isinstance(source, ArraySource) and isinstance(source.arrays, np.ndarray):
        height, width = source.arrays.shape[1:3]
        return source.arrays.ndim == 3, (height, width)
    _, *first = source.header(int(rows[0]))
    grey = np.empty(len(rows), dtype=bool)

    def one(index: int) -> None:
        row = int(rows[index])
        grey[index], *size = source.header(row)
        if same_size and size != first:
            raise DataError(
                f"{name} holds images of different sizes: {source.where(int(rows[0]))} is {first[0]}x{first[1]}, "
                f"{source.where(row)} is {size[0]}x{size[1]}; give image_size=(height, width)"
            )

    in_threads(one, len(rows), f"looking at {name}", progress)
    return bool(grey.all()), (first[0], first[1])


def _ready_pixels(source: Source, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """The arrays of a source as [N,C,H,W], if they need neither resizing nor conversion."""
    arrays = source.arrays if isinstance(source, ArraySource) else None
    if not isinstance(arrays, np.ndarray) or arrays.shape[1:3] != shape[1:]:
        return None
    planes = arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2)
    # A copy, because idx arrays are read-only views of the bytes of their file.
    return torch.from_numpy(np.array(planes, order="C")) if planes.shape[1] == shape[0] else None


def _pair(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
    return pair[0], pair[1]


def _check_indices(indices: Sequence[int] | np.ndarray | torch.Tensor, count: int) -> np.ndarray:
    chosen = np.asarray(indices)
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"indices must be integers, got {chosen.dtype}")
    chosen = chosen.astype(np.int64).reshape(-1)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= count):
        raise IndexError(f"indices must lie in 0..{count - 1}, got {chosen.min()}..{chosen.max()}")
    return chosen


def _check_targets(y: torch.Tensor | np.ndarray | Sequence[int], count: int, num_classes: int) -> np.ndarray:
    targets = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if targets.shape != (count,):
        raise DataError(f"there must be one label for each of the {count} images, got shape {targets.shape}")
    if not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {targets.dtype}")
    if targets.size and (targets.min() < 0 or targets.max() >= num_classes):
        raise DataError(
            f"labels must lie in 0..{num_classes - 1} for {num_classes} classes, got {targets.min()}..{targets.max()}"
        )
    return np.ascontiguousarray(targets, dtype=np.int64)


def _printable(text: str) -> str:
    """`text` with Python's escapes for control characters and for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
