"""Labelled images of one shape: `ImageData`, which `open_data` opens."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glem_augment.codec.pixel_range import DEFAULT_RANGES, UINT8, PixelRange
from glem_augment.distributed import Share, progress_bar, share
from glem_augment.errors import BadImageError, DataError
from glem_augment.images.matching import ClassMap, Integers, check_names, check_targets, match_classes
from glem_augment.images.readers import dtype_of, resize_and_crop
from glem_augment.images.sources import Source, open_source, tensor_source, warn_of_lost_bits

Limits: TypeAlias = tuple[float, float] | PixelRange

_LOOKED_AT = 64  # images whose values tell how many bits they use
CACHE_BYTES = 2 * 2**30
_STATE = (
    "give value_range=(low, high) (--value-range LOW HIGH), the values of black and white, for example x.min() and "
    "x.max() of the training images"
)


class ImageData(Dataset):
    """Labelled images of one shape and dtype, uint8 in most sets. Item i is `(tensor [C,H,W], int)`.

    >>> data = open_data("bundled:fashion-mnist", "train")
    >>> x, y = next(data.batches(range(1000), batch_size=128))  # uint8 [B,C,H,W], int64 [B]

    Attributes:
        targets: int64 [N], indices into `classes`.
        classes: K names in index order.
        class_ids: K folder names, WordNet ids or digits.
        named: whether the data named its classes; otherwise `classes` are "0", "1", ...
        image_shape: (C,H,W).
        pixel_range: the dtype of the images and the range of their values.
        name: the folder or data set, as text.
        unstated: of "image_size" and "channels", what `open_data` read from the images, so that one may change it.
        encoded: whether batches hold a flow's numbers in place of pixels, see `with_numbers`.
    """

    encoded = False

    def __init__(
        self,
        source: Source,
        image_shape: tuple[int, int, int],
        pixels: torch.Tensor | None = None,
        pixel_range: PixelRange = UINT8,
        clip: bool = True,
    ) -> None:
        """The images of a source. `pixels`: the same images decoded, [N,C,H,W]. `clip`: see `_in_range`."""
        self._source, self._pixels, self._clip = source, pixels, clip
        self._rows = np.arange(len(source))  # of `_pixels`, which subsets share
        self.image_shape, self.pixel_range = image_shape, pixel_range
        self.name = source.name
        self.targets, self.named = source.targets, source.named
        self.classes, self.class_ids = list(source.classes), list(source.class_ids)
        self.unstated: list[str] = []

    @classmethod
    def from_tensors(
        cls,
        x: torch.Tensor,
        y: Integers,
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
        name: str = "tensors",
        value_range: Limits | None = None,
    ) -> ImageData:
        """Images x [N,C,H,W] with labels y, N class indices, under K unique names (and ids).

        For dtypes and `value_range` see `open_data`.
        """
        source = tensor_source(x, y, classes, class_ids, name)
        found = _range_of(dtype_of(source.items), name, value_range)
        pixels = _in_range(source.items, found, name, value_range is not None)
        return cls(source, (x.shape[1], x.shape[2], x.shape[3]), pixels, found)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as [C,H,W] (a copy), and its class index."""
        if self._pixels is not None:
            return self._pixels[self._rows[index]].clone(), int(self.targets[index])
        image = _read(self._source, range(len(self))[index], self.image_shape, self.pixel_range.torch_dtype)
        return _in_range(image, self.pixel_range, self.name, self._clip), int(self.targets[index])

    def __repr__(self) -> str:
        return f"ImageData({self.name!r}, {len(self)} images {self.image_shape}, {len(self.classes)} classes)"

    def tensor(self) -> torch.Tensor:
        """All images as [N,C,H,W], in order, decoded if they are not in memory. Do not write to them."""
        if self._pixels is None:
            pixels = _decode(self._source, self.image_shape, self.pixel_range.torch_dtype)
            return _in_range(pixels, self.pixel_range, self.name, self._clip)
        whole = len(self._pixels) == len(self) and bool((self._rows == np.arange(len(self))).all())
        return self._pixels if whole else self._pixels[torch.from_numpy(self._rows)]

    def batches(
        self, indices: Integers, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (images [B,C,H,W], int64 [B]) in the order of `indices`; the last one may be smaller.

        Images that are not kept in memory are decoded by a `DataLoader` with `workers` processes.
        """
        chosen = check_indices(indices, len(self))
        if self._pixels is None:
            return iter(DataLoader(self, batch_size=batch_size, sampler=chosen.tolist(), num_workers=workers))
        rows = torch.from_numpy(self._rows[chosen]).split(batch_size)
        labels = torch.from_numpy(self.targets[chosen]).split(batch_size)
        return ((self._pixels[part], y) for part, y in zip(rows, labels, strict=True) if len(part))

    def shared_batches(
        self, indices: np.ndarray, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Share]]:
        """This rank's part of every batch of `batches`, and its share of the batch."""
        parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        shares = [share(len(part)) for part in parts]
        own = [part[each.rows] for part, each in zip(parts, shares, strict=True)]
        # Only the last batch may be smaller, so only the last part may be smaller or empty.
        loaded = self.batches(np.concatenate(own), max(1, len(own[0])), workers)
        return ((x, y, each) for (x, y), each in zip(loaded, shares, strict=False))

    def some(self, count: int) -> torch.Tensor:
        """Up to `count` images, evenly spread, as [n,C,H,W]."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))
        return torch.cat([x for x, _ in self.batches(chosen, count)])

    def subset(self, indices: Integers) -> ImageData:
        """The images at `indices`, in that order, sharing the pixels in memory; errors as in `check_indices`."""
        chosen = check_indices(indices, len(self))
        other = copy.copy(self)
        other._rows, other.targets = self._rows[chosen], self.targets[chosen]
        other._source = self._source.subset(chosen)
        return other

    @property
    def repeated(self) -> str:
        """Two names of an image that is there several times, as in a subset of repeated indices; "" if none is."""
        return self._source.repeated

    def where(self, index: int) -> str:
        """The path of image `index`, or a description where it has no path."""
        return self._source.where(index)

    def with_targets(
        self, targets: Integers, classes: Sequence[str], class_ids: Sequence[str] | None = None
    ) -> ImageData:
        """The same images under other labels, for example a model's; errors as in `check_targets`."""
        other = copy.copy(self)
        other.classes, other.class_ids = list(classes), list(classes if class_ids is None else class_ids)
        check_names(other.classes, other.class_ids)
        other.targets, other.named = check_targets(targets, len(self), len(classes)), True
        return other

    def with_numbers(self, numbers: torch.Tensor) -> ImageData:
        """The same images, whose batches hold their `numbers` [N, ...] for a flow, such as latents encoded once."""
        other = copy.copy(self)
        other._pixels, other._rows, other.encoded = numbers, np.arange(len(self)), True
        return other

    def rows_of_classes(self, max_per_class: int | None = None) -> list[np.ndarray]:
        """Indices of each class's images, of at most `max_per_class`. DataError: a class without images."""
        rows = [np.flatnonzero(self.targets == index)[:max_per_class] for index in range(len(self.classes))]
        empty = [self.classes[index] for index, found in enumerate(rows) if not len(found)]
        if empty:
            raise DataError(
                f"{self.name} has no images of {len(empty)} of its {len(rows)} classes ({', '.join(empty[:10])}): add "
                "some, or name only the classes that it has (data.with_targets)"
            )
        return rows


LabelledImages: TypeAlias = Any  # an argument for `open_data`; other libraries' data sets have no common type


def open_data(
    data: LabelledImages,
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    value_range: Limits | None = None,
) -> ImageData:
    """Open labelled images.

    Args:
        data: one of

            - `"bundled:fashion-mnist"`: 100 real images per class and split, 1x28x28, inside the package;
            - `"bundled:photographs"`: three photographs of 3x256x256 pixels, one class, inside the package;
            - an ImageFolder (any split) of images or arrays, or a folder with ImageFolders named train, test, val,
              validation, ... (test and val stand in for each other if only one is there). Classes are in torchvision's
              order, or, in a folder that `SyntheticDataset.export` wrote, in the order of its labels;
            - a data set of `timm.data.create_dataset`, as `NAME@ROOT`: `torch/cifar10@data` and
              `torch/fashion_mnist@data` (in torchvision's layout, never downloaded), `hfds/ylecun/mnist`, or a .tar
              file with one folder per class;
            - a data set of torchvision or timm, or a Subset of one: its images without its transforms;
            - a Hugging Face `Dataset` with one column of images and one of class labels;
            - (images [N,C,H,W], N labels), or any data set that gives (PIL image or tensor [C,H,W], int).

            Arrays are .npy: [C,H,W] of 1 to 16 channels, or [H,W]. Images and tensors are uint8, uint16, int16 or
            float32, all of one dtype; float16 and float64 arrays are read as float32. PNG and TIFF files may be grey of
            16 bits, TIFF also of floats. More than 4 channels of at most 4 columns are taken for [H,W,C] and refused.
        split: train, test, val, ..., for data given by name.
        image_size: (H,W), or one number for both: images are resized to cover it (bilinear with antialias) and cropped
            at the centre. None: the size that they share.
        channels: 1 (luma) or 3. None: 1 if all images are grey, otherwise 3. Arrays, and images of more than 8 bits,
            keep their channels. As in torchvision and timm, transparency and EXIF orientation are ignored, and
            animations give their first frame.
        cache_bytes: keep all decoded images in memory if they take no more than this.
        value_range: (low, high), the values of black and white, or the `pixel_range` of a model or of training images,
            which test images need. Values outside are clipped, with a warning. None: the range that an export has
            stored, 0 to 255 for uint8, 0 to 65535 for uint16, 0 to 1 for floats; floats outside it and int16 are
            errors.

    Returns:
        The data, decoded if they fit in `cache_bytes`.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: a wrong `image_size`, `channels` or `value_range`.
        BadImageError: an image that cannot be read, has more pixels than PIL opens, bits that PIL drops, NaN, or
            another dtype or number of channels than the first image.
        DataError: an unknown name or split, a class without images, different sizes without `image_size`, a range that
            must be stated.
        TypeError: another kind of `data`, or labels that are no integers.
    """
    size, source = _pair(image_size), open_source(data, split)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    if len(source) == 0:
        raise DataError(f"{source.name} holds no images")
    channels_found, height, width, dtype = source.header(0)
    value_range = source.pixel_range if value_range is None else value_range
    pixel_range = _range_of(dtype, source.name, value_range)
    warn_of_lost_bits(data, pixel_range)
    if size is None or channels is None:
        channels_found, height, width = _common_shape(source, size is None)
    height, width = size or (height, width)
    shape, pixels = (channels or channels_found, height, width), None
    if isinstance(source.items, torch.Tensor) and source.items.shape[1:] == shape:
        pixels = source.items if len(source.items) == len(source) else source.items[torch.from_numpy(source.rows)]
    elif len(source) * math.prod(shape) * pixel_range.bits // 8 <= cache_bytes:
        pixels = _decode(source, shape, pixel_range.torch_dtype)
    clip = value_range is not None
    if pixels is not None:
        pixels = _in_range(pixels.contiguous(), pixel_range, source.name, clip)
    out = ImageData(source, shape, pixels, pixel_range, clip)
    if not clip:
        _hint_at_fewer_bits(out)
    if not isinstance(source.items, torch.Tensor):  # all its images have one shape
        out.unstated = [word for word, value in (("image_size", size), ("channels", channels)) if value is None]
    return out


def _range_of(dtype: str, name: str, value_range: Limits | None) -> PixelRange:
    """The stated range, or the default of a dtype. DataError: there is none, or images of another dtype."""
    if isinstance(value_range, PixelRange):
        if value_range.dtype != dtype:
            raise DataError(
                f"{name} has images of {dtype}, the model takes {value_range}: fit a model to these images (GLEM.fit)"
            )
        return value_range
    if value_range is not None:
        if np.shape(value_range) != (2,):
            raise ValueError(f"value_range must be (low, high), got {value_range!r}")
        return PixelRange(dtype, *np.asarray(value_range).tolist())
    if dtype not in DEFAULT_RANGES:
        raise DataError(f"{name} has images of {dtype}: {_STATE}")
    return DEFAULT_RANGES[dtype]


def _in_range(pixels: torch.Tensor, pixel_range: PixelRange, name: str, clip: bool) -> torch.Tensor:
    """The images, clipped to their range with a warning, or without `clip` a DataError that asks for the range."""
    if pixel_range.whole:
        return pixels
    values = pixels.numpy()
    low, high = np.array([pixel_range.low, pixel_range.high], values.dtype)
    if low <= values.min() and values.max() <= high:
        return pixels
    if not clip:
        raise DataError(f"{name} has values from {values.min():.6g} to {values.max():.6g}, outside [0, 1]: {_STATE}")
    warnings.warn(f"{name} has values outside {pixel_range}, which are clipped", stacklevel=3)
    return torch.from_numpy(values.clip(low, high))


def _hint_at_fewer_bits(images: ImageData) -> None:
    """Warn where images of uint16 hold values of at most 14 bits."""
    if images.pixel_range.dtype != "uint16":
        return
    highest = int(images.some(_LOOKED_AT).numpy().max())
    if 0 < highest < 2**14:
        warnings.warn(
            f"{images.name} has values up to {highest} and is taken to go from 0 to 65535: if its images have fewer "
            f"bits, {_STATE}",
            stacklevel=3,
        )


def as_image_data(
    data: LabelledImages,
    image_shape: tuple[int, int, int],
    classes: Sequence[str] | None = None,
    pixel_range: PixelRange = UINT8,
    **options: Any,
) -> ImageData:
    """`data` as an ImageData of shape `image_shape` (C, H, W) and range. DataError: an ImageData of another.

    Other data is opened by `open_data` with `options`, resized and converted. `classes` replace the data's names.
    """
    channels, height, width = image_shape
    if not isinstance(data, ImageData):
        options["value_range"] = pixel_range
        data = open_data(data, image_size=(height, width), channels=channels if channels in (1, 3) else None, **options)
    names = data.classes if classes is None else [str(name) for name in classes]
    if classes is not None:
        ids = data.class_ids if data.named and len(names) == len(data.class_ids) else None
        data = data.with_targets(data.targets, names, ids)
    if data.image_shape != image_shape:
        raise DataError(
            f"{data.name} has images of shape {data.image_shape}, the model takes {image_shape}: give images of "
            f"{channels} channels, opened with open_data(..., image_size=({height}, {width}))"
        )
    if data.pixel_range != pixel_range:
        raise DataError(
            f"{data.name} has images of {data.pixel_range}, the model takes {pixel_range}: open them with "
            "open_data(..., value_range=model.pixel_range), or fit a model to them (GLEM.fit)"
        )
    return data


def images_for(model: Any, data: LabelledImages, class_map: ClassMap = None, **options: Any) -> ImageData:
    """`data` as an ImageData of the shape and the classes of a GLEM (`match_classes`); `options` of `open_data`.

    Labels of data that names no classes are the model's indices.
    """
    images = as_image_data(data, model.image_shape, pixel_range=model.pixel_range, **options)
    targets = images.targets
    if images.named or class_map is not None:
        targets = match_classes(model, images, class_map)[targets]
    return images.with_targets(targets, model.classes, model.class_ids)


def _common_shape(source: Source, same_size: bool) -> tuple[int, int, int]:
    """(C, H, W) of the first image; C = 1 of a grey one only if no image is RGB.

    BadImageError: a file that is no image. DataError: different sizes, with `same_size`.
    """
    if isinstance(source.items, torch.Tensor):
        return source.header(0)[:3]
    first, counts = source.header(0), np.empty(len(source), dtype=np.int64)  # of channels

    def one(index: int) -> None:
        counts[index], *size, _ = source.header(index)
        if same_size and tuple(size) != first[1:3]:
            raise DataError(
                f"{source.name} holds images of different sizes: {source.where(0)} is {first[1]}x{first[2]}, "
                f"{source.where(index)} is {size[0]}x{size[1]}; give image_size=(height, width)"
            )

    _for_each(source, one, "looking at")
    return (3 if first[0] == 1 and (counts == 3).any() else first[0]), first[1], first[2]


def _read(source: Source, index: int, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Image `index` of a source as [C,H,W] of that shape. BadImageError: other channels, or another dtype."""
    pixels = source.pixels(index, shape[0])
    if len(pixels) != shape[0] or pixels.dtype != dtype:
        raise BadImageError(
            f"{source.where(index)} has {len(pixels)} channels of {pixels.dtype}, not {shape[0]} of {dtype}: give all "
            "images alike"
        )
    return resize_and_crop(pixels, *shape[1:])


def _decode(source: Source, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """The images of a source as [N,C,H,W]."""
    out = torch.empty(len(source), *shape, dtype=dtype)

    def one(index: int) -> None:
        out[index] = _read(source, index, shape, dtype)

    _for_each(source, one, "decoding")
    return out


def _for_each(source: Source, task: Callable[[int], None], verb: str) -> None:
    """Run `task` for the index of every image, on threads; the first error in the order of images stops the rest.

    PIL and torch release the GIL while they decode.
    """
    blocks = [range(i, min(i + 32, len(source))) for i in range(0, len(source), 32)]  # a million tasks take a gigabyte

    def run(block: range) -> int:
        for index in block:
            task(index)
        return len(block)

    threads = min(source.threads, os.cpu_count() or 1)
    with progress_bar(f"{verb} {source.name}", total=len(source)) as bar, ThreadPoolExecutor(threads) as pool:
        for done in pool.map(run, blocks):
            bar.update(done)


def _pair(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = tuple(image_size) if isinstance(image_size, Sequence) else (image_size,)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
    return pair[0], pair[1]


def check_indices(indices: Integers, count: int) -> np.ndarray:
    """Indices as int64 [n]; negative ones count from the end. TypeError: no integers. IndexError: out of range."""
    chosen = np.asarray(indices)
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"indices must be integers, got {chosen.dtype}")
    return np.arange(count)[chosen.astype(np.int64).reshape(-1)]
