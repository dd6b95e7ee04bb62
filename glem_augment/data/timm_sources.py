"""Data sets that ``timm.data.create_dataset`` reads, as a ``Source``: torch/, hfds/, wds/, ... and .tar
files.

Written ``NAME@ROOT``: the name that timm expects, and the folder that holds (or caches) the data. Columns or
keys that are not called image and label are named after a question mark:

    torch/cifar10@data            torchvision's CIFAR10 under data/ (never downloaded)
    hfds/ylecun/mnist             Hugging Face datasets; ROOT, optional, is their cache folder
    hfds/uoft-cs/cifar100@cache?input_key=img&target_key=fine_label
    wds/@data/shards              WebDataset shards with an _info.json
    images.tar                    a tar file with one folder per class
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from glem_augment.data.sources import ArraySource, FolderSource, Source
from glem_augment.errors import DataError

__all__ = ["PREFIXES", "timm_source"]

PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
_NEEDS_ROOT = ("torch/", "wds/")
_OPTIONS = ("input_key", "target_key")


class ReaderSource(Source):
    """Random access through a timm reader. Not through timm's ``ImageDataset``: that one replaces an image
    that it cannot read by the next one, with the next one's label."""

    def __init__(self, reader: Any, classes: list[str], targets: np.ndarray):
        super().__init__(classes, classes, targets)
        self.reader = reader

    def where(self, index: int) -> str:
        try:
            name = self.reader.filename(index)
        except Exception:  # this is for error messages: it must not fail on what it reports
            name = None
        return str(name or f"image {index}")

    def open(self, index: int) -> Image.Image:
        with self.reader[index][0] as file:
            return Image.open(io.BytesIO(file.read()))


class ListSource(Source):
    """Images read once from a stream and kept in memory."""

    def __init__(
        self,
        images: list[Image.Image],
        classes: list[str],
        class_ids: list[str],
        targets: np.ndarray,
        name: str,
    ):
        super().__init__(classes, class_ids, targets)
        self.images = images
        self.name = name

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def open(self, index: int) -> Image.Image:
        return self.images[index].copy()  # the caller closes what it gets


def timm_source(
    spec: str, split: str, limit_bytes: int, shrink: Callable[[Image.Image], Image.Image] | None = None
) -> Source:
    """Open ``NAME[@ROOT]`` through ``timm.data.create_dataset``.

    Args:
        spec: see the module's docstring.
        split: passed on; torchvision's sets know train and everything else.
        limit_bytes: how much memory the images of a set without random access may take.
        shrink: applied to every image of such a set as it is read.

    Raises:
        DataError: the set is not there, needs a package that is not installed, or has no integer labels.
    """
    from timm.data import create_dataset

    archive = tar_file(spec)
    address, _, query = spec.partition("?") if archive is None else ("", "", "")
    name, _, root = address.partition("@")
    options: dict[str, Any] = dict(parse_qsl(query))
    if set(options) - set(_OPTIONS):
        raise DataError(f"{spec!r}: after '?' only {' and '.join(_OPTIONS)} can be given, got {query!r}")
    if archive is not None:
        # A handle kept open would be shared, position and all, by threads and forked workers.
        root, options = archive, {"cache_tarfiles": False}
    if name.lower().startswith(_NEEDS_ROOT) and not root:
        raise DataError(f"{spec!r} needs the folder of the data: write {name}@FOLDER")
    try:
        dataset = create_dataset(
            name,
            root=os.path.expanduser(root) or None,
            split=split,
            download=False,
            input_img_mode="",
            **options,
        )
        source = _in_memory(dataset, spec) or _with_paths(dataset) or _with_reader(dataset)
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        # torchvision's advice is an option of its own.
        why = str(error).replace("You can use download=True to download it", f"download it to {root!r} first")
        raise DataError(f"timm cannot open {spec!r}, split {split!r}: {type(error).__name__}: {why}") from error

    return source or _streamed(dataset, spec, limit_bytes, shrink)


def _in_memory(dataset: Any, spec: str) -> Source | None:
    """torchvision's CIFAR and MNIST families hold all their pixels: ``data`` and ``targets``."""
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if data is None or targets is None:
        return None
    arrays, labels = np.asarray(data), np.asarray(targets)
    if arrays.dtype != np.uint8 or labels.ndim != 1 or not (arrays.ndim == 3 or arrays.shape[-1:] == (3,)):
        return None
    classes = [str(name) for name in dataset.classes]
    return ArraySource(arrays, classes, [str(i) for i in range(len(classes))], labels, spec)


def _with_paths(dataset: Any) -> Source | None:
    """torchvision's sets of image files: ``samples`` (ImageFolder, ImageNet) or ``imgs`` (Places365)."""
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if not samples or not hasattr(dataset, "classes"):
        return None
    # ImageNet's names are tuples of synonyms, of which the first is not always unique.
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in dataset.classes]
    ids = [str(i) for i in getattr(dataset, "wnids", names)]
    paths, targets = zip(*samples, strict=True)
    return FolderSource([str(path) for path in paths], names, ids, np.asarray(targets))


def _with_reader(dataset: Any) -> Source | None:
    reader: Any = getattr(dataset, "reader", None)
    if not hasattr(reader, "__getitem__"):
        return None
    if hasattr(reader, "dataset"):  # Hugging Face: a column of labels can be read without touching the images
        targets = np.asarray(reader.dataset[reader.label_key])
    else:
        targets = np.asarray(reader.targets)
    class_to_idx = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    _check_labels(targets)
    names = {index: str(name) for name, index in class_to_idx.items()}
    count = max(int(targets.max()) + 1, len(names))
    return ReaderSource(reader, [names.get(i, str(i)) for i in range(count)], targets)


def _streamed(
    dataset: Iterable[Any], spec: str, limit_bytes: int, shrink: Callable[[Image.Image], Image.Image] | None
) -> Source:
    reader = getattr(dataset, "reader", None)
    if reader is not None and hasattr(reader, "dist_num_replicas"):
        # Under torchrun timm would hand every process another part; here all need the same images.
        reader.dist_rank, reader.dist_num_replicas, reader.global_num_workers = 0, 1, 1
    images: list[Image.Image] = []
    labels: list[int] = []
    held = 0
    try:
        for image, target in dataset:
            image = shrink(image) if shrink is not None else image
            image.load()
            held += image.width * image.height * len(image.getbands())
            if held > limit_bytes:
                raise DataError(
                    f"{spec!r} has no random access and does not fit in {limit_bytes / 2**20:.0f} MiB after "
                    f"{len(images)} images; give image_size (images are then reduced as they are read), "
                    "raise cache_bytes, or export the set to an ImageFolder"
                )
            images.append(image)
            labels.append(target)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{spec!r}: reading image {len(images)} failed: {type(error).__name__}: {error}") from error
    expected = getattr(reader, "num_samples", 0) or 0
    if len(images) < expected:  # timm logs samples that it cannot decode, and goes on without them
        raise DataError(f"{spec!r}: only {len(images)} of {expected} images could be read; see timm's warnings")
    targets = np.asarray(labels)
    _check_labels(targets)
    class_to_idx = getattr(reader, "class_to_idx", None) or {}
    names = {index: str(name) for name, index in class_to_idx.items()}
    ids = [str(i) for i in range(max(int(targets.max()) + 1, len(names)))]
    return ListSource(images, [names.get(int(i), i) for i in ids], ids, targets, spec)


def _check_labels(targets: np.ndarray) -> None:
    if targets.size == 0:
        raise DataError("the data set holds no images")
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0:
        raise DataError(f"every image needs one class index >= 0, got labels such as {targets[0]!r}")


def is_timm_spec(spec: str) -> bool:
    """Whether ``spec`` is for timm to open: it starts with one of timm's prefixes or names a .tar file."""
    return spec.lower().startswith(PREFIXES) or tar_file(spec) is not None


def tar_file(spec: str) -> str | None:
    """The path of the .tar file that ``spec`` names, or None."""
    path = os.path.expanduser(spec)
    return path if path.lower().endswith(".tar") and os.path.isfile(path) else None
