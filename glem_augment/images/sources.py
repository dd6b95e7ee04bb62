"""Sources of labelled images: a bundled set, a folder, another library's data set, or tensors."""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import DatasetFolder, VisionDataset
from torchvision.datasets.folder import default_loader, find_classes, make_dataset

from glem_augment.checks import closest
from glem_augment.codec.pixel_range import DTYPES, PixelRange
from glem_augment.errors import BadImageError, DataError
from glem_augment.images.matching import (
    Integers,
    check_names,
    check_targets,
    feature_column,
    named_classes,
    of_hugging_face,
    readable_names,
)
from glem_augment.images.readers import (
    EXTENSIONS,
    as_pil,
    check_layout,
    dtype_of,
    read,
    shape_of,
    to_tensor,
    with_its_bits,
)
from glem_augment.io import expand

# Names of the folders of a split, the preferred one first. If only test or val exists, it serves for both.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VAL = ("val", "validation", "valid", "eval")
_SPLIT_FOLDERS = dict.fromkeys(_TRAIN, _TRAIN) | dict.fromkeys(_TEST, _TEST + _VAL) | dict.fromkeys(_VAL, _VAL + _TEST)
_BUNDLED = ("bundled:fashion-mnist", "bundled:photographs")
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
# Files of `SyntheticDataset.export`: the manifest, and the label of every class, even one whose folder is missing.
PROVENANCE, CLASS_FILE = "glem-provenance.json", "classes.json"
TIMM_PREFIXES = ("torch/", "hfds/")


@dataclass
class Source(Dataset):
    """Labelled images that are opened one by one; for `classes`, `class_ids`, `targets` and `named` see `ImageData`.

    Item i is (PIL image in mode L or RGB, int), or (tensor [C,H,W], int) for other images.

    Args:
        name: the folder or data set, as text.
        items: paths, a tensor [N,C,H,W], or a data set. `key` finds the image in an item of a data set.
        targets: int64 [N].
        class_ids, classes: ids and names in index order; both empty if the data names none: they become numbers.
        rows: int64 [N], the items that are the images; all by default.
        pixel_range: the range that an export or an `ImageData` has.
        threads: how many may open images at once: 1 for data sets, whose items may share one file handle.
    """

    name: str
    items: Any
    targets: Any
    class_ids: list[str]
    classes: list[str]
    key: int | str | None = None
    rows: Any = None
    pixel_range: PixelRange | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        self.named, self.targets = bool(self.classes), np.asarray(self.targets)
        self.targets = check_targets(self.targets, len(self.targets), len(self.classes) or None)
        if not self.named:
            self.classes = self.class_ids = [str(i) for i in range(self.targets.max(initial=-1) + 1)]
        if self.rows is None:
            self.rows = np.arange(len(self.targets))
        self.paths = self.items if isinstance(self.items, list) and self.key is None else None
        if self.key is None:
            self.threads = 8

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        with self._opened(index) as image:
            return as_pil(to_tensor(image, shape_of(image)[0])), int(self.targets[index])

    def subset(self, rows: np.ndarray) -> Source:
        """The images `rows`, in that order."""
        names, ids = (self.classes, self.class_ids) if self.named else ([], [])
        return replace(self, rows=self.rows[rows], targets=self.targets[rows], classes=names, class_ids=ids)

    @property
    def repeated(self) -> str:
        """Two names of an image that is there several times; "" if there is none."""
        image: Any
        first: dict[Any, int] = {}
        for index, row in enumerate(self.rows.tolist()):
            image = row
            if self.paths is not None:  # links are the same file
                file = os.stat(self.paths[row])
                image = file.st_dev, file.st_ino
            if first.setdefault(image, index) != index:
                return f"{self.where(first[image])} and {self.where(index)}"
        return str(getattr(self.items, "repeated", "")) if self.key is not None else ""

    def where(self, index: int) -> str:
        """The path of image `index`, or a description where it has no path."""
        row = int(self.rows[index])
        if self.paths is not None:
            return self.paths[row]
        return str(hasattr(self.items, "filename") and self.items.filename(row) or f"image {row} of {self.name}")

    def header(self, index: int) -> tuple[int, int, int, str]:
        """(C, H, W) of image `index`, and the name of its dtype. Raises BadImageError."""
        with self._opened(index) as image:
            return *shape_of(image), dtype_of(image)

    def pixels(self, index: int, channels: int) -> Tensor:
        """Image `index` as [C,H,W], not resized; 8-bit images are converted to 1 or 3 `channels`. BadImageError."""
        with self._opened(index) as image:
            found = to_tensor(image, channels)
            if found.is_floating_point() and not bool(found.isfinite().all()):
                raise ValueError("it has values that are NaN or infinite")
            return found

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image | Tensor]:
        """Open image `index`. An error in the `with` block becomes a BadImageError that names the image."""
        try:
            item = self.items[int(self.rows[index])]
            image = self._image(item if self.key is None else item[self.key])
            if isinstance(image, Tensor):
                check_layout(tuple(image.shape), self.where(index))
                yield image
                return
            with image:
                yield image
        except BadImageError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise BadImageError(
                f"{self.where(index)} cannot be read as an image ({type(error).__name__}: {error}); remove or replace "
                "it"
            ) from error

    def _image(self, item: Any) -> Image.Image | Tensor:
        """The image of an item: a path, an open file (of timm), a PIL image, or a tensor or array [C,H,W]."""
        if isinstance(item, str):
            return read(item)
        if hasattr(item, "read"):
            with item:
                return read(io.BytesIO(item.read()))
        if isinstance(item, Image.Image):
            copy = with_its_bits(item).copy()  # it is closed after use
            copy.format = item.format  # without it, `dtype_of` can't know that "I" has 16 bits
            return copy
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(np.array(item))
        if isinstance(item, Tensor) and dtype_of(item) in DTYPES:
            return as_pil(item.contiguous())
        found = getattr(item, "dtype", type(item).__name__)
        raise TypeError(
            f"it is {found}, no PIL image or tensor of {', '.join(DTYPES)}: give the data set without its transform"
        )


def open_source(data: Any, split: str = "train") -> Source:
    """Open an argument of `open_data`. Images are decoded only where labels cannot be read otherwise."""
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        return _named(os.fspath(data), split)
    if isinstance(data, Subset):
        return open_source(data.dataset, split).subset(np.asarray(data.indices, dtype=np.int64))
    if isinstance(data, tuple) and len(data) == 2:
        return tensor_source(*data)
    by_index = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not by_index or isinstance(data, IterableDataset | Tensor | np.ndarray):
        raise TypeError(
            "data must be a name, an ImageData, (images, labels), or a data set that has a length and gives "
            f"(image, label) by index; got {type(data).__name__}"
        )
    return _data_set(data)


# ---- names ---------------------------------------------------------------------------------------------------------


def _named(spec: str, split: str) -> Source:
    if spec.startswith("bundled:"):
        return _bundled(spec, split)
    path = expand(spec)
    if path.is_dir():
        inside = _split_folder(path, split)
        source = _image_folder(inside)
        _check_classes_of_split(path, inside, source)
        return source
    if spec.lower().startswith(TIMM_PREFIXES) or tar_file(spec):
        return _timm(spec, split)
    if path.exists():
        raise DataError(f"{spec} is a file; give a folder of images (one folder per class) or a .tar file")
    near = closest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    raise FileNotFoundError(
        f"no such data: {spec}{near}; give a folder, {' or '.join(_BUNDLED)}, or a data set of timm: torch/NAME@FOLDER"
    )


def _bundled(name: str, split: str) -> Source:
    """The photographs, one ImageFolder for all splits, or 100 real images of Fashion-MNIST per class and split.

    Fashion-MNIST is one PNG with a row per class and a column per image.
    """
    if name not in _BUNDLED:
        raise DataError(f"no bundled data set {name!r}; there are {' and '.join(_BUNDLED)}")
    if split not in _SPLIT_FOLDERS:
        raise DataError(f"{name} has no split {split!r}; choose 'train' or 'test'")
    folder = resources.files("glem_augment").joinpath("bundled", "data")
    if name == _BUNDLED[1]:
        return replace(_image_folder(Path(str(folder / "photographs"))), name=name)
    with (folder / f"fashion-mnist-{'train' if split in _TRAIN else 'test'}.png").open("rb") as stream:
        sheet = np.asarray(Image.open(stream).convert("L"))
    rows, columns = sheet.shape[0] // 28, sheet.shape[1] // 28
    images = torch.from_numpy(sheet.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(-1, 1, 28, 28))
    return Source(name, images, np.repeat(np.arange(rows), columns), [str(i) for i in range(rows)], _CLOTHES)


def _image_folder(folder: Path) -> Source:
    """One folder per class, with the classes, the order and the extensions of torchvision's ImageFolder, and .npy.

    An export has the classes and labels of its record, and some classes may have no folder.
    """
    record = _finished(folder)
    try:
        folders = find_classes(folder)[0] if record is None else _exported(folder, record, "folder")
        labels = {name: label for label, name in enumerate(folders)}
        samples = make_dataset(folder, labels, EXTENSIONS, allow_empty=record is not None)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} must be an ImageFolder, one folder of images per class (MNIST's files: torch/mnist@ROOT, with "
            f"ROOT/MNIST/raw): {error}"
        ) from None
    paths, targets = [path for path, _ in samples], [label for _, label in samples]
    if record is not None:
        ids, names = (_exported(folder, record, key) for key in ("id", "name"))
        return Source(str(folder), paths, targets, ids, names, pixel_range=_stored_range(record))
    if len(folders) == 1:
        _check_nesting(folder, paths)
    return Source(str(folder), paths, targets, folders, readable_names(folders))


def _check_classes_of_split(root: Path, folder: Path, source: Source) -> None:
    """DataError: the folder of a split has classes that the training folder beside it lacks (Tiny ImageNet's val/)."""
    train = next((found for name, found in _split_folders(root).items() if name in _TRAIN), folder)
    known = _folders(train)
    if train != folder and (others := sorted(set(source.class_ids) - set(known))):
        raise DataError(
            f"{folder} has the class {others[0]!r}, which {train} lacks (its {len(known)} classes begin {known[:3]}): "
            "sort the images of each split into the same folders, one per class"
        )


def _check_nesting(folder: Path, paths: list[str]) -> None:
    """DataError: the only class has no images of its own, but folders of images, as x/y/{cat,dog} in place of y."""
    inner = {os.path.dirname(path) for path in paths}
    if len(inner) > 1 and (common := os.path.commonpath(inner)) not in inner:
        raise DataError(
            f"{folder} would be one class, but its images lie in {len(inner)} folders of {common}: give that one"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that `SyntheticDataset.export` wrote; None of another. DataError: it is damaged."""
    if not (folder / PROVENANCE).exists():
        return None
    record = _json(folder / PROVENANCE)
    if record.get("synthetic") is not True or not isinstance(record.get("settings"), dict):
        raise DataError(f"{folder / PROVENANCE} is damaged: export to another folder")
    return record


def _json(path: Path) -> dict[str, Any]:
    """The table in a file of an export. DataError: there is none."""
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
    raise DataError(f"{path} is damaged: export to another folder")


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of an export, None of another folder. DataError: it did not finish."""
    record = read_record(folder)
    if record is not None and record.get("complete") is False:
        raise DataError(f"{folder} is an export that did not finish; to finish it, {record.get('finish')}")
    return record


def _stored_range(record: dict[str, Any] | None) -> PixelRange | None:
    """The range of the images of an export."""
    stored = ((record or {}).get("model") or {}).get("pixel_range")
    try:
        return PixelRange(**stored) if stored else None
    except (TypeError, ValueError) as error:
        raise DataError(f"{PROVENANCE} is damaged ({error}): export to another folder") from None


def _exported(folder: Path, record: dict[str, Any], key: str) -> list[str]:
    """A text of each class of an export, in the order of labels. DataError: the export has shards, or is damaged."""
    if record.get("format") == "webdataset":
        raise DataError(f"{folder} holds shards: read them with webdataset or timm, or export imagefolder")
    try:
        found = [str(entry[key]) for entry in record["classes"]]
    except (LookupError, TypeError):
        found = []
    if not found or len(set(found)) < len(found) or (key == "folder" and any(Path(n).name != n for n in found)):
        raise DataError(f"{folder / PROVENANCE} is damaged: export to another folder")
    return found


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def without_splits(spec: str) -> bool:
    """Whether the images of `spec`, such as one ImageFolder or archive, stand for every split."""
    folder = expand(spec)
    return spec == _BUNDLED[1] or tar_file(spec) is not None or (folder.is_dir() and not _split_folders(folder))


def _split_folders(folder: Path, split: str = "") -> dict[str, Path]:
    """The folders that are named after a usual split or `split`, by their names in lower case.

    A class may be called "test" too, so a folder counts only if it holds visible folders.
    """
    named = [name for name in _folders(folder) if name.lower() in (*_SPLIT_FOLDERS, split)]
    visible = [n for n in named if any(not c.startswith(".") for c in _folders(folder / n))]
    return {name.lower(): folder / name for name in visible}


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, which is the folder itself if it has no splits."""
    inside = _split_folders(folder, split.lower())
    if not _SPLIT_FOLDERS.keys() & inside:
        if split.lower() not in _TRAIN + _TEST:  # which are defaults; another split was asked for
            raise DataError(f"{folder} has no splits, such as train/ and val/ folders: leave the split out")
        return folder
    for name in _SPLIT_FOLDERS.get(split.lower(), (split.lower(),)):
        if name in inside:
            return inside[name]
    raise DataError(f"{folder} has no split {split!r}; it holds {', '.join(inside)}")


# ---- other libraries' data sets, and tensors -----------------------------------------------------------------------


def tar_file(spec: str) -> str | None:
    """The path of the .tar file that `spec` names, or None."""
    path = os.path.expanduser(spec)
    return path if path.lower().endswith(".tar") and os.path.isfile(path) else None


def _timm(spec: str, split: str) -> Source:
    """`NAME[@ROOT]` or a .tar file, opened by `timm.data.create_dataset`; nothing is downloaded to ROOT."""
    from timm.data import create_dataset

    options: dict[str, Any] = {}
    if root := tar_file(spec):
        # Threads and forked workers would share the position of a handle that is kept open.
        name, options = "", {"cache_tarfiles": False}
    else:
        name, _, root = spec.partition("@")
    try:
        path = os.path.expanduser(root) or None
        data = create_dataset(name, path, split, download=False, input_img_mode="", **options)
        source = _data_set(data, spec)
        if hasattr(data, "reader"):  # of timm, without a handle that is kept open
            source.threads = 8
        return source
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(
            f"timm cannot open {spec!r} (NAME@FOLDER), split {split!r}: {type(error).__name__}: {error}"
        ) from error


def _data_set(data: Any, name: str | None = None) -> Source:
    """A data set of torchvision, timm or Hugging Face, or any data set with items (image, label)."""
    name = name or getattr(getattr(data, "info", data), "dataset_name", None) or type(data).__name__
    ids, names = (getattr(data, "named", True) and named_classes(data)) or ([], [])
    if of_hugging_face(data):  # without its format, which may have renamed the columns
        data, label = data.with_format(None), feature_column(data.features, "ClassLabel")
        return Source(name, data, data[label], ids, names, feature_column(data.features, "Image"))
    if (reader := getattr(data, "reader", None)) is not None:  # of timm, whose items would be transformed
        return Source(name, reader, _labels_of_reader(reader), ids, names, 0)
    if isinstance(data, VisionDataset):
        data = copy.copy(data)
        data.transform = data.target_transform = data.transforms = None
    if isinstance(data, DatasetFolder) and data.loader is default_loader:
        return Source(str(data.root), [path for path, _ in data.samples], data.targets, ids, names)
    labels = _labels(data, name)
    if (images := _held_pixels(data)) is not None:
        return Source(name, images, labels, [str(i) for i in range(len(names))], names)
    return Source(name, data, labels, ids, names, 0, pixel_range=getattr(data, "pixel_range", None))


def _labels_of_reader(reader: Any) -> Any:
    """The labels of one of timm's readers."""
    if hasattr(reader, "dataset"):
        return reader.dataset[reader.label_key]
    return reader.targets if hasattr(reader, "targets") else [label for _, label in reader.samples]


def _labels(data: Any, name: str) -> Any:
    """The labels of a data set, from its items if it does not list them. DataError: the items have none."""
    labels = getattr(data, "targets", getattr(data, "labels", None))
    if labels is not None:
        return labels
    try:
        return [int(data[row][1]) for row in range(len(data))]
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise DataError(f"{name} has no `targets`, and its items are not (image, int): {error}") from error


def _held_pixels(data: Any) -> Tensor | None:
    """All images [N,C,H,W] of torchvision's CIFAR and MNIST families, which hold their pixels; None for other data."""
    if not (isinstance(data, VisionDataset) and hasattr(data, "data")):
        return None
    x = np.asarray(data.data)
    if x.dtype != np.uint8 or not (x.ndim == 3 or x.shape[-1:] == (3,)):
        return None
    return torch.from_numpy(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2))


def warn_of_lost_bits(data: Any, pixel_range: PixelRange) -> None:
    """Warn where a data set of torchvision gives 8 bits of images of `pixel_range`, which `open_data` reads in full."""
    while isinstance(data, Subset):
        data = data.dataset
    if pixel_range.dtype != "uint8" and isinstance(data, DatasetFolder) and data.loader is default_loader:
        warnings.warn(
            f"the model sees images of {pixel_range.dtype}, but torchvision's loader cuts their values off at 255: "
            "train on open_data(folder), or give ImageFolder a loader= that keeps all bits",
            stacklevel=4,
        )


def tensor_source(
    x: Tensor | np.ndarray,
    y: Integers,
    classes: Sequence[str] = (),
    class_ids: Sequence[str] | None = None,
    name: str = "tensors",
) -> Source:
    """Images x [N,C,H,W] with labels y. TypeError: a dtype of no images. DataError: other shapes or labels."""
    x = torch.as_tensor(x)
    if dtype_of(x) not in DTYPES:
        raise TypeError(f"images must be {', '.join(DTYPES)}, got {x.dtype}")
    if x.ndim != 4 or len(x) == 0:
        raise DataError(f"images must be [N,C,H,W], and at least one, got shape {tuple(x.shape)}")
    check_layout(tuple(x.shape[1:]), f"an image of {name}")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise DataError(f"{name} has values that are NaN or infinite: replace them")
    ids = list(classes if class_ids is None else class_ids)
    check_names(classes, ids)
    return Source(name, x.detach().cpu().contiguous(), check_targets(y, len(x)), ids, list(classes))
