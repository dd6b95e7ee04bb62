"""Labelled images of one shape: opening them from anywhere, and matching their classes with a flow's.

Example::

    data = open_data("bundled:fashion-mnist", "train")
    image, label = data[0]                                   # uint8 [1,28,28], int
    for x, y in data.batches(order, batch_size=128): ...     # uint8 [B,C,H,W], int64 [B]
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from glem_augment.data.classes import match_classes
from glem_augment.data.decoding import (
    DEEP_MODES,
    GREY_MODES,
    fit,
    geometry,
    in_threads,
    probe,
    read_image,
    ready_pixels,
    to_tensor,
)
from glem_augment.data.sources import ArraySource, Source, bundled_source, folder_source
from glem_augment.data.timm_sources import PREFIXES, is_timm_spec, timm_source
from glem_augment.errors import BadImageError, DataError
from glem_augment.io import expand

__all__ = ["ImageData", "match_classes", "open_data"]

CACHE_BYTES = 2 * 2**30


class ImageData(Dataset):
    """Labelled uint8 images of one shape.

    Item i is ``(uint8 tensor [C,H,W], int)``. Made by :func:`open_data` or :meth:`from_tensors`.

    Attributes:
        targets: int64 [N], indices into ``classes``.
        classes: K names in index order; class_ids: K folder names, wnids or digits.
        image_shape: (C,H,W).
        name: what it was opened from.
        skipped: file (or place in the data set) and reason, of every image that ``open_data(..., skip_bad=True)``
            left out.
    """

    skipped: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        source: Source,
        image_shape: tuple[int, int, int],
        name: str,
        resize: bool = False,
        cache_bytes: int = CACHE_BYTES,
        indices: np.ndarray | None = None,
        pixels: torch.Tensor | None = None,
        targets: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        class_ids: Sequence[str] | None = None,
    ):
        self._source = source
        self._indices = np.arange(len(source)) if indices is None else indices
        self._pixels = pixels  # uint8, one row per image of the *source*, shared by all subsets
        self._resize = resize
        self._cache_bytes = cache_bytes
        self._tensor: torch.Tensor | None = None
        self.image_shape = image_shape
        self.name = printable(name)
        self.targets = source.targets[self._indices] if targets is None else targets
        self.classes = list(source.classes if classes is None else classes)
        self.class_ids = list(source.class_ids if class_ids is None else class_ids)

    @classmethod
    def from_tensors(
        cls,
        x: torch.Tensor,
        y: torch.Tensor | np.ndarray | Sequence[int],
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
        name: str = "tensors",
    ) -> ImageData:
        """Wrap images that are in memory already.

        Args:
            x: uint8 [N,C,H,W], C 1 or 3 (other counts work too, but cannot be converted).
            y: N class indices.
            classes: K unique names; class_ids: K unique identifiers, by default the names.

        Raises:
            TypeError: ``x`` is not uint8, or ``y`` holds no integers.
            DataError: shapes that do not fit, no images, a label outside 0..K-1, repeated names.
        """
        if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8:
            raise TypeError(f"x must be a uint8 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 4 or x.numel() == 0:
            raise DataError(f"x must be [N,C,H,W] with at least one image, got shape {tuple(x.shape)}")
        targets = _check_targets(y, len(x), len(classes))
        x = x.detach().cpu().contiguous()
        shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
        ids = list(classes) if class_ids is None else list(class_ids)
        _check_names(classes, ids)
        source = ArraySource(np.empty((0,)), classes, ids, targets, name)
        return cls(source, shape, name, cache_bytes=max(x.numel(), CACHE_BYTES), pixels=x)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image ``index`` as uint8 [C,H,W] (a copy), and its class index."""
        return self._image(int(self._indices[index])), int(self.targets[index])

    def __repr__(self) -> str:
        return f"ImageData({self.name!r}, {len(self)} images {self.image_shape}, {len(self.classes)} classes)"

    def _image(self, index: int) -> torch.Tensor:
        if self._pixels is not None:
            return self._pixels[index].clone()
        channels, height, width = self.image_shape
        image = read_image(self._source, index, channels)
        if (image.height, image.width) != (height, width):
            if not self._resize:
                raise DataError(
                    f"{self._source.where(index)} is {image.height}x{image.width} (height x width), the "
                    f"others are {height}x{width}; give image_size to resize all to one size"
                )
            return fit(to_tensor(image), height, width)
        return to_tensor(image)

    def tensor(self) -> torch.Tensor | None:
        """All images as uint8 [N,C,H,W], in order; None if they take more than ``cache_bytes``.

        Decoded once; the result is shared, so do not write to it.

        Raises:
            DataError: an image that cannot be read, or has another size.
        """
        if self._tensor is None and len(self) * int(np.prod(self.image_shape)) <= self._cache_bytes:
            if self._pixels is not None:
                whole = len(self._pixels) == len(self) and bool((self._indices == np.arange(len(self))).all())
                self._tensor = self._pixels if whole else self._pixels[torch.from_numpy(self._indices)]
            else:
                self._tensor = self._decode(progress=False)
        return self._tensor

    def _decode(self, progress: bool, bad: dict[int, BadImageError] | None = None) -> torch.Tensor:
        out = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)

        def one(row: int) -> None:
            try:
                out[row] = self._image(int(self._indices[row]))
            except BadImageError as error:
                if bad is None:
                    raise
                bad[row] = error

        in_threads(one, len(self), f"decoding {self.name}", progress)
        return out

    def _warm(self, progress: bool, bad: dict[int, BadImageError] | None = None) -> None:
        """Decode what fits in the cache, else read every header: bad files show before any work is done.

        With ``bad``, images that can't be used are noted there in place of an error; to find them, all are decoded.
        """
        if len(self) * int(np.prod(self.image_shape)) <= self._cache_bytes:
            if self._pixels is None:
                self._pixels = self._decode(progress, bad)
            return

        def check(index: int) -> None:
            mode, size = probe(self._source, index)
            if size != self.image_shape[1:] and not self._resize:
                raise DataError(
                    f"{self._source.where(index)} is {size[0]}x{size[1]} (height x width), others are "
                    f"{self.image_shape[1]}x{self.image_shape[2]}; give image_size to resize all to one size"
                )

        def check_whole(index: int) -> None:
            assert bad is not None
            try:
                read_image(self._source, index, self.image_shape[0])
                check(index)
            except BadImageError as error:
                bad[index] = error

        in_threads(check if bad is None else check_whole, len(self), f"checking {self.name}", progress)

    def _without(self, bad: dict[int, BadImageError]) -> ImageData:
        """Only the other images.

        Raises:
            DataError: a class of which none is left.
        """
        kept = self.subset([row for row in range(len(self)) if row not in bad])
        kept.skipped = tuple(_reason(self._source.where(row), bad[row]) for row in sorted(bad))
        empty = np.setdiff1d(np.unique(self.targets), np.unique(kept.targets))
        if len(empty):
            names = ", ".join(self.classes[i] for i in empty[:10])
            where, reason = next(
                s for s, row in zip(kept.skipped, sorted(bad), strict=True) if self.targets[row] in empty
            )
            raise DataError(
                f"no image of {len(empty)} of the {len(self.classes)} classes of {self.name} can be used ({names}): "
                f"{where}: {reason}"
            )
        return kept

    def subset(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> ImageData:
        """The images at ``indices``, in that order, sharing the cached pixels.

        Raises:
            IndexError: an index outside 0..N-1; TypeError: indices that are not integers.
        """
        chosen = _check_indices(indices, len(self))
        return self._copy(self._indices[chosen], self.targets[chosen], self.classes, self.class_ids)

    def with_targets(
        self,
        targets: Sequence[int] | np.ndarray | torch.Tensor,
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
    ) -> ImageData:
        """The same images under other labels, such as a flow's: ``with_targets(match[data.targets], ...)``.

        Raises:
            DataError: not one label per image, a label outside 0..K-1, repeated names.
        """
        ids = list(classes) if class_ids is None else list(class_ids)
        _check_names(classes, ids)
        return self._copy(self._indices, _check_targets(targets, len(self), len(classes)), classes, ids)

    def rows_of_classes(self, max_per_class: int | None = None) -> list[np.ndarray]:
        """Indices of each class's images, or of the first `max_per_class` of them.

        Raises:
            DataError: a class without images.
        """
        rows = [np.flatnonzero(self.targets == index)[:max_per_class] for index in range(len(self.classes))]
        empty = [self.classes[index] for index, found in enumerate(rows) if not len(found)]
        if empty:
            names = ", ".join(map(repr, empty[:10])) + (", ..." if len(empty) > 10 else "")
            raise DataError(
                f"{self.name} has no images of {len(empty)} of its {len(rows)} classes ({names}): add some, or name "
                "only the classes that it has (data.with_targets)"
            )
        return rows

    def _copy(
        self, indices: np.ndarray, targets: np.ndarray, classes: Sequence[str], class_ids: Sequence[str]
    ) -> ImageData:
        other = ImageData(
            self._source,
            self.image_shape,
            self.name,
            self._resize,
            self._cache_bytes,
            indices,
            self._pixels,
            targets,
            classes,
            class_ids,
        )
        other.skipped = self.skipped
        return other

    def batches(
        self, indices: Sequence[int] | np.ndarray | torch.Tensor, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches (uint8 [B,C,H,W], int64 [B]) in the order of ``indices``; the last one may be smaller.

        From memory when the images are cached, else decoded by a ``DataLoader`` with ``workers`` processes.

        Raises:
            IndexError, TypeError: see :meth:`subset`; ValueError: ``batch_size`` < 1. Both at the call.
        """
        chosen = _check_indices(indices, len(self))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if self._pixels is None and self._tensor is None:
            return self._loaded_batches(chosen, batch_size, workers)
        return self._cached_batches(chosen, batch_size)

    def _cached_batches(self, chosen: np.ndarray, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._tensor is not None:
            pixels, rows = self._tensor, torch.from_numpy(chosen)
        else:
            assert self._pixels is not None
            pixels, rows = self._pixels, torch.from_numpy(self._indices[chosen])
        labels = torch.from_numpy(self.targets[chosen])
        for start in range(0, len(rows), batch_size):
            yield pixels[rows[start : start + batch_size]], labels[start : start + batch_size]

    def _loaded_batches(
        self, chosen: np.ndarray, batch_size: int, workers: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = DataLoader(self, batch_size=batch_size, sampler=chosen.tolist(), num_workers=workers)
        yield from loader


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

            - ``"bundled:fashion-mnist"``: 100 real images per class and split, 1x28x28, inside the package;
            - an ImageFolder (any split), or a folder with ImageFolders named train, test, val, validation,
              ... (test and val stand in for each other when only one is there). Classes are in torchvision's
              order;
            - a folder with MNIST-style idx files (``train-images-idx3-ubyte[.gz]``, ``t10k-...``);
            - what ``timm.data.create_dataset`` reads, as ``NAME@ROOT``: ``torch/cifar10@data``,
              ``hfds/ylecun/mnist``, ``wds/@shards`` (extra ``wds``), or a .tar file with one folder per class. What
              torch/ names is never downloaded; columns of other names than image and label follow a question mark:
              ``hfds/uoft-cs/cifar100?input_key=img&target_key=fine_label``.
        split: train, test, val, ...
        image_size: (H,W), or one number for both: images are resized (shorter side, bilinear with antialias)
            and cropped at the centre. None: the size that they share.
        channels: 1 (luma) or 3. None: 1 if the images looked at first are grey, else 3. Transparency is
            dropped, EXIF orientation ignored (PIL itself turns TIFF files), the first frame of an animation taken, as
            torchvision and timm do.
        cache_bytes: keep all decoded images in memory if they take no more than this.
        progress: show a bar on stderr when decoding takes longer than two seconds.
        skip_bad: leave out images that cannot be used, and list them in ``skipped``, in place of an error at the
            first; every image is then decoded once before anything else. Of streams (shards), which know no single
            images, a bad one is an error all the same.

    Returns:
        The data, decoded if it fits in ``cache_bytes``; otherwise every header has been checked.

    Raises:
        FileNotFoundError: no such file or folder.
        BadImageError: an image that cannot be read, has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` or more than
            8 bits per channel.
        DataError: an unknown name or split, a class without images (that can be used), images of different sizes
            without ``image_size``.
        ValueError: ``image_size`` or ``channels`` that make no sense.
    """
    size = _check_size(image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    name = os.fspath(spec)
    source = _open_source(name, split, size, cache_bytes)
    if len(source) == 0:
        raise DataError(f"{name} holds no images")
    bad: dict[int, BadImageError] | None = {} if skip_bad else None
    try:
        shape, mixed = geometry(source, size, channels, skip_bad)
        if mixed is not None:
            raise DataError(f"{name} holds images of different sizes: {mixed}; give image_size=(height, width)")
        data = ImageData(source, shape, name, resize=size is not None, cache_bytes=cache_bytes)
        data._pixels = ready_pixels(source, shape)
        data._warm(progress, bad)
    except BadImageError as error:
        if skip_bad:
            raise
        raise BadImageError(
            f"{error}, or leave such images out with skip_bad=True (glem train, adapt, eval and preview: --skip-bad)"
        ) from error
    return data._without(bad) if bad else data


def as_image_data(
    data: ImageData | tuple[torch.Tensor, torch.Tensor] | str | os.PathLike[str],
    image_shape: tuple[int, int, int],
    classes: Sequence[str] | None = None,
    split: str = "train",
    progress: bool = True,
) -> ImageData:
    """`data` as an ImageData of a flow's images.

    Args:
        data: an ImageData; a pair (images uint8 [N,C,H,W], labels int64 [N]); or a name for `open_data`, whose images
            are resized and converted.
        image_shape: (C, H, W).
        classes: names to use instead of the data's (of a pair: "0", "1", ...).
        split: split to open, for data given by name.

    Raises:
        DataError: images of another shape. TypeError: another kind of `data`.
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
    if tuple(data.image_shape) != tuple(image_shape):
        have = data.image_shape
        raise DataError(
            f"{data.name} has images of {have[0]} x {have[1]} x {have[2]} (channels x height x width), the flow takes "
            f"{channels} x {height} x {width}: open the data with open_data(..., image_size=({height}, {width}), "
            f"channels={channels})"
        )
    return data


def _reason(where: str, error: BadImageError) -> tuple[str, str]:
    return printable(where), printable(str(error).removeprefix(where).strip())


def _open_source(name: str, split: str, size: tuple[int, int] | None, cache_bytes: int) -> Source:
    if name.startswith("bundled:"):
        return bundled_source(name.removeprefix("bundled:"), split)
    path = expand(name)
    if path.is_dir():
        return folder_source(path, split)
    if is_timm_spec(name):
        shrink: Callable[[Image.Image], Image.Image] | None = None
        if size is not None:
            height, width = size

            def shrink(image: Image.Image) -> Image.Image:
                if image.mode in DEEP_MODES:
                    return image  # converted it would be white; as it is, it is refused like those of other sets
                grey = image.mode in GREY_MODES
                pixels = to_tensor(image.convert("L" if grey else "RGB"))
                return F.to_pil_image(fit(pixels, height, width))

        return timm_source(name, split, cache_bytes, shrink)
    if path.exists():
        raise DataError(f"{name} is a file; give a folder of images (one folder per class) or a .tar file")
    raise FileNotFoundError(
        f"no such data: {name}. Give a folder, 'bundled:fashion-mnist', or a timm data set as NAME@ROOT "
        f"with NAME starting with {', '.join(PREFIXES)}"
    )


def _check_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    try:
        pair = tuple(image_size) if isinstance(image_size, Iterable) else (image_size, image_size)
        height, width = (operator.index(value) for value in pair)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1 or isinstance(image_size, bool):
        raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
    return height, width


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


def printable(text: str) -> str:
    """The text with what can't be shown or written to a file as it is (control characters, bytes of a file name that
    are no UTF-8) in Python's escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check_names(classes: Sequence[str], class_ids: Sequence[str]) -> None:
    if len(class_ids) != len(classes):
        raise DataError(f"there are {len(classes)} class names but {len(class_ids)} class ids")
    for what, names in (("class names", classes), ("class ids", class_ids)):
        if len(set(names)) != len(names):
            raise DataError(f"{what} must be unique, got {list(names)[:12]}")
