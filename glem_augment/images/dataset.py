"""ImageData: labelled images of one shape, and `open_data`, which opens them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glem_augment.codec.pixel_range import UINT8, PixelRange, dtype_name
from glem_augment.distributed import Share, share
from glem_augment.errors import BadImageError, DataError
from glem_augment.images.cropping import fit
from glem_augment.images.matching import ClassMap, Integers, check_names, check_targets, match_classes
from glem_augment.images.readers import Source, TensorSource
from glem_augment.images.sources import open_source, tensor_source
from glem_augment.images.threads import in_threads

Limits: TypeAlias = tuple[float, float] | PixelRange

CACHE_BYTES = 2 * 2**30
_RANGES = {"uint8": UINT8, "uint16": PixelRange("uint16", 0, 65535)}  # the ranges of other dtypes are measured
ENLARGED = 3  # times: images that are enlarged as much get a warning
OWN_SIZE, _HEADERS = 224, 32  # the longest side of images in pictures; how many headers `at_own_size` reads


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
        unstated: of "image_size", "channels" and "classes", what was read from the images, so that one may change it.
    """

    def __init__(
        self,
        source: Source,
        image_shape: tuple[int, int, int],
        rows: np.ndarray | None = None,
        pixels: torch.Tensor | None = None,
        pixel_range: PixelRange = UINT8,
        unstated: Sequence[str] = (),
    ) -> None:
        """The images `rows` of a source, or all; `pixels`: the same images decoded, [N,C,H,W]."""
        rows = np.arange(len(source)) if rows is None else rows
        self._source, self._source_rows = source, rows
        self._pixels = pixels  # subsets share them
        self._rows = rows if pixels is None else np.arange(len(rows))  # of `_pixels`, or else of the source
        self.image_shape, self.pixel_range = image_shape, pixel_range
        self.name = _printable(source.name)
        self.targets, self.named = source.targets[rows], source.named
        self.classes, self.class_ids = list(source.classes), list(source.class_ids)
        self.unstated = tuple(unstated)

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
        found = _range_of(source.images.dtype, name, value_range, lambda: _ends(source.images))
        pixels = _clipped(source.images, found, name)
        return cls(source, (x.shape[1], x.shape[2], x.shape[3]), pixels=pixels, pixel_range=found)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as [C,H,W] (a copy), and its class index."""
        row = int(self._rows[index])
        image = self._decoded(row) if self._pixels is None else self._pixels[row].clone()
        return image, int(self.targets[index])

    def __repr__(self) -> str:
        return f"ImageData({self.name!r}, {len(self)} images {self.image_shape}, {len(self.classes)} classes)"

    def tensor(self) -> torch.Tensor:
        """All images as [N,C,H,W], in order, decoded if they are not in memory. Do not write to them."""
        if self._pixels is None:
            pixels = _decode(self._source, self._rows, self.image_shape, self.pixel_range.torch_dtype)
            return _clipped(pixels, self.pixel_range, self.name)
        whole = len(self._pixels) == len(self) and bool((self._rows == np.arange(len(self))).all())
        return self._pixels if whole else self._pixels[torch.from_numpy(self._rows)]

    def _decoded(self, row: int) -> torch.Tensor:
        """Image `row` of the source, read anew."""
        dtype = self.pixel_range.torch_dtype
        return _clipped(_read(self._source, row, self.image_shape, dtype), self.pixel_range, self.name)

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
        other._source_rows = self._source_rows[chosen]
        return other

    @property
    def repeated(self) -> bool:
        """Whether an image is there several times, as in a subset of repeated indices."""
        return self._source.repeats(self._source_rows)

    def where(self, index: int) -> str:
        """The path of image `index`, or a description where it has no path."""
        return _printable(self._source.where(int(self._source_rows[index])))

    def at_own_size(self, longest: int = OWN_SIZE) -> ImageData:
        """The same images at about their stored size, at most `longest` pixels; decoded when they are used.

        The shape has the aspect of `image_shape` and at least its size. Half of the images are at least as large.
        """
        channels, *shape = self.image_shape
        headers = [self._source.header(int(row)) for row in self._source_rows[:: max(1, len(self) // _HEADERS)]]
        largest = np.median([min(height / shape[0], width / shape[1]) for _, height, width, _ in headers])
        scale = max(1.0, min(float(largest), longest / max(shape)))
        if scale == 1:
            return self
        other = copy.copy(self)
        other._pixels, other._rows = None, self._source_rows
        other.image_shape = (channels, round(scale * shape[0]), round(scale * shape[1]))
        other.unstated = tuple(dict.fromkeys(("image_size", *self.unstated)))
        return other

    def with_targets(
        self, targets: Integers, classes: Sequence[str], class_ids: Sequence[str] | None = None
    ) -> ImageData:
        """The same images under other labels, for example a model's; errors as in `check_targets`."""
        other = copy.copy(self)
        other.classes, other.class_ids = list(classes), list(classes if class_ids is None else class_ids)
        check_names(other.classes, other.class_ids)
        other.targets, other.named = check_targets(targets, len(self), len(classes)), True
        # Labels that were numbered among the labels that occur still are.
        other.unstated = tuple(name for name in self.unstated if name != "classes" or self.named)
        return other

    def with_numbers(self, numbers: torch.Tensor) -> ImageData:
        """The same labels with other tensors [N, ...] in place of images, for example their latents."""
        other = copy.copy(self)
        other._pixels, other._rows = numbers, np.arange(len(self))
        other.image_shape = (numbers.shape[-3], numbers.shape[-2], numbers.shape[-1])
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
    unlabelled: bool = False,
    value_range: Limits | None = None,
) -> ImageData:
    """Open labelled images, or images without classes.

    Args:
        data: one of

            - `"bundled:fashion-mnist"`: 100 real images per class and split, 1x28x28, inside the package;
            - `"bundled:photographs"`: three photographs of 3x256x256 pixels, one class, inside the package;
            - an ImageFolder (any split) of images or arrays, or a folder with ImageFolders named train, test, val,
              validation, ... (test and val stand in for each other if only one is there). Classes are in torchvision's
              order, or, in a folder that `SyntheticDataset.export` wrote, in the order of its classes.json;
            - a folder with MNIST-style idx files (`train-images-idx3-ubyte[.gz]`, `t10k-...`);
            - a data set of `timm.data.create_dataset`, as `NAME@ROOT`: `torch/cifar10@data`, `hfds/ylecun/mnist`, or a
              .tar file with one folder per class. A torch/ data set is never downloaded. Columns that are not called
              image and label follow a question mark: `hfds/uoft-cs/cifar100?input_key=img&target_key=fine_label`;
            - a data set of torchvision or timm, or a Subset of one: its images without its transforms;
            - a Hugging Face `Dataset` with one column of images and one of class labels;
            - (images [N,C,H,W], N labels), or any data set that gives (PIL image or tensor [C,H,W], int).

            Arrays are .npy, or .npz of one array: [C,H,W] of 1 to 16 channels, or [H,W]. Images and tensors are uint8,
            uint16, int16 or float32, all of one dtype; float16 and float64 arrays are read as float32. PNG and TIFF
            files may be grey of 16 bits, TIFF also of floats.
        split: train, test, val, ..., for data given by name.
        image_size: (H,W), or one number for both: images are resized to cover it (bilinear with antialias) and cropped
            at the centre. None: the size that they share.
        channels: 1 (luma) or 3. None: 1 if all images are grey, otherwise 3. Arrays, and images of more than 8 bits,
            keep their channels. As in torchvision and timm, transparency and EXIF orientation are ignored, and
            animations give their first frame.
        cache_bytes: keep all decoded images in memory if they take no more than this.
        unlabelled: give all images one class, called "image". A folder may then nest its images in any way (folders
            named train, test, ... are splits), and a tensor [N,C,H,W] needs no labels.
        value_range: (low, high), the values of black and white, or the `pixel_range` of a model or of training images,
            which test images need. None: 0 to 255 for uint8, 0 to 65535 for uint16; for int16 and floats the lowest and
            the highest value of these images, with a warning that names them. Values outside are clipped, with a
            warning.

    Returns:
        The data, decoded if they fit in `cache_bytes`; otherwise every header has been checked.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: a wrong `image_size`, `channels` or `value_range`.
        BadImageError: an image that cannot be read, has more than 33.6 million pixels (67.1 of a JPEG, which is
            decoded at a quarter of its size from 33.6 on), has bits that PIL drops, NaN, or another dtype or number of
            channels than the first image.
        DataError: an unknown name or split, a class without images, different sizes without `image_size`.
        TypeError: another kind of `data`, or labels that are no integers.
    """
    size = _pair(image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    source = open_source(data, split, unlabelled)
    rows = np.arange(len(source))
    if len(rows) == 0:
        raise DataError(f"{source.name} holds no images")
    sizes = np.zeros((len(rows), 2), dtype=np.int64)  # stored height and width
    shape: tuple[int, int, int] | None = None if size is None or channels is None else (channels, *size)
    dtype: torch.dtype = getattr(torch, source.header(int(rows[0]))[3])
    if shape is None or len(rows) * math.prod(shape) * dtype.itemsize > cache_bytes:
        found = _look_at_headers(source, rows, size is None, sizes)
        shape = (channels or found[0], *(size or found[1:]))
    pixels = None
    if isinstance(source, TensorSource) and source.images.shape[1:] == shape:
        pixels = source.images.contiguous()
    elif len(rows) * math.prod(shape) * dtype.itemsize <= cache_bytes:
        pixels = _decode(source, rows, shape, dtype, sizes)

    def ends() -> tuple[float, float]:
        if pixels is not None:
            return _ends(pixels)
        found: list[tuple[float, float]] = []

        def one(index: int) -> None:
            found.append(_ends(_read(source, int(rows[index]), shape, dtype)))

        in_threads(one, len(rows), f"measuring {source.name}", source.threads)
        return min(low for low, _ in found), max(high for _, high in found)

    pixel_range = _range_of(dtype, source.name, value_range, ends)
    pixels = None if pixels is None else _clipped(pixels, pixel_range, source.name)
    _warn_enlarged(source.name, sizes, shape[1:])
    unstated = ["classes"] if source.classes_are_labels and not unlabelled else []
    if not isinstance(source, TensorSource):  # all its images have one shape
        unstated += [name for name, value in (("image_size", size), ("channels", channels)) if value is None]
    unstated = [*dict.fromkeys((*source.unstated, *unstated))]
    return ImageData(source, shape, rows, pixels, pixel_range, unstated)


def _range_of(
    dtype: torch.dtype, name: str, value_range: Limits | None, ends: Callable[[], tuple[float, float]]
) -> PixelRange:
    """The stated range, the default of a dtype, or the range that `ends` measures, with a warning that names it."""
    kind, name = str(dtype).removeprefix("torch."), _printable(name)
    if isinstance(value_range, PixelRange) and value_range.dtype != kind:
        fix = "fit a model to these images (GLEM.fit)"
        raise DataError(f"{name} has images of {kind}, the model takes {value_range}: {fix}")
    known = _RANGES.get(kind) if value_range is None else value_range
    if isinstance(known, PixelRange):
        return known
    if known is not None:
        if np.shape(known) != (2,):
            raise ValueError(f"value_range must be (low, high), got {known!r}")
        return PixelRange(kind, *np.asarray(known).tolist())
    try:
        found = PixelRange(kind, *ends())
    except ValueError as error:
        raise DataError(f"{name}: {error}, or state value_range=(low, high)") from None
    warnings.warn(f"the range of {name} is measured: {found}; state it with value_range=, --value-range", stacklevel=3)
    return found


def _ends(pixels: torch.Tensor) -> tuple[float, float]:
    """The lowest and the highest value."""
    return float(pixels.numpy().min()), float(pixels.numpy().max())  # torch has neither for uint16


def _clipped(pixels: torch.Tensor, pixel_range: PixelRange, name: str) -> torch.Tensor:
    """Images clipped to the range, with a warning if that changes them."""
    if pixel_range in _RANGES.values():
        return pixels
    values = pixels.numpy()
    low, high = np.array([pixel_range.low, pixel_range.high], values.dtype)
    if low <= values.min() and values.max() <= high:
        return pixels
    warnings.warn(f"{_printable(name)} has values outside {pixel_range}, which are clipped", stacklevel=3)
    return torch.from_numpy(values.clip(low, high))


def _warn_enlarged(name: str, sizes: np.ndarray, size: tuple[int, int]) -> None:
    """Warn once if images with stored sizes [N, 2] are enlarged a lot; sizes of 0 are not known."""
    scale = (np.asarray(size) / np.maximum(sizes, 1)).max(1)
    count = int(((scale >= ENLARGED) & (sizes > 0).all(1)).sum())
    if count:
        height, width = sizes[np.where((sizes > 0).all(1), scale, 0).argmax()]
        warnings.warn(
            f"{count} of {len(sizes)} images of {_printable(name)} are enlarged {ENLARGED} times or more, to "
            f"{size[0]}x{size[1]} (one is {height}x{width}): give a smaller image size, or leave them out",
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
        fix = f"open the data with open_data(..., image_size=({height}, {width}), channels={channels})"
        if channels not in (1, 3):  # images are converted to no other number of channels
            fix = f"give images of {channels} channels, opened with image_size=({height}, {width})"
        raise DataError(f"{data.name} has images of shape {data.image_shape}, the model takes {image_shape}: {fix}")
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


def _look_at_headers(source: Source, rows: np.ndarray, same_size: bool, sizes: np.ndarray) -> tuple[int, int, int]:
    """(C, H, W) of the first image; C = 1 of a grey one only if no image is RGB. `sizes` [N, 2] gets all sizes.

    BadImageError: a file that is no image. DataError: different sizes, with `same_size`.
    """
    if isinstance(source, TensorSource):
        _, channels, height, width = source.images.shape
        return channels, height, width
    _, *first, _ = source.header(int(rows[0]))
    counts = np.empty(len(rows), dtype=np.int64)  # of channels

    def one(index: int) -> None:
        row = int(rows[index])
        counts[index], *size, _ = source.header(row)
        sizes[index] = size
        if same_size and size != first:
            raise DataError(
                f"{source.name} holds images of different sizes: {source.where(int(rows[0]))} is "
                f"{first[0]}x{first[1]}, {source.where(row)} is {size[0]}x{size[1]}; give image_size=(height, width)"
            )

    in_threads(one, len(rows), f"looking at {source.name}", source.threads)
    return int(counts[0] if counts[0] not in (1, 3) else max(counts[0], 3 * (counts == 3).any())), first[0], first[1]


def _kind(image: torch.Tensor) -> str:
    """The channels and the dtype of an image [C,H,W], in words."""
    return f"{len(image)} {'channel' if len(image) == 1 else 'channels'} of {dtype_name(image)}"


def _read(
    source: Source, row: int, shape: tuple[int, int, int], dtype: torch.dtype, sizes: np.ndarray | None = None
) -> torch.Tensor:
    """Image `row` of a source as [C,H,W] of that shape. `sizes` [2] gets its stored size."""
    pixels = source.pixels(row, shape[0])
    if (found := _kind(pixels)) != (wanted := _kind(torch.empty(shape, dtype=dtype, device="meta"))):
        raise BadImageError(f"{source.where(row)} has {found} where {wanted} are wanted: give all images alike")
    if sizes is not None:
        sizes[:] = pixels.shape[-2:]
    return fit(pixels, *shape[1:])


def _decode(
    source: Source,
    rows: np.ndarray,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    sizes: np.ndarray | None = None,
) -> torch.Tensor:
    """The images at `rows` of a source as [N,C,H,W]. `sizes` [N, 2] gets their stored sizes."""
    out = torch.empty(len(rows), *shape, dtype=dtype)

    def one(index: int) -> None:
        out[index] = _read(source, int(rows[index]), shape, dtype, None if sizes is None else sizes[index])

    in_threads(one, len(rows), f"decoding {source.name}", source.threads)
    return out


def _pair(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
    return pair[0], pair[1]


def check_indices(indices: Integers, count: int) -> np.ndarray:
    """Indices as int64 [n]; negative ones count from the end. TypeError: no integers. IndexError: out of range."""
    chosen = np.asarray(indices)
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"indices must be integers, got {chosen.dtype}")
    return np.arange(count)[chosen.astype(np.int64).reshape(-1)]


def _printable(text: str) -> str:
    """`text` with Python's escapes for control characters and for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
