"""Opening the source of images that an argument names: bundled sets, folders, idx files, other libraries' data sets."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from glem_augment.codec.pixel_range import DTYPES, dtype_name
from glem_augment.distributed import progress_bar
from glem_augment.errors import DataError
from glem_augment.images.arrays import EXTENSIONS, MOST_CHANNELS
from glem_augment.images.matching import (
    ONE_CLASS,
    Integers,
    check_names,
    check_targets,
    feature_column,
    named_classes,
    of_hugging_face,
    readable_names,
)
from glem_augment.images.readers import FolderSource, ItemSource, ReaderSource, Source, TensorSource
from glem_augment.io import expand

# Names of the folders of a split, the preferred one first. If only test or val exists, it serves for both.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VAL = ("val", "validation", "valid", "eval")
_SPLIT_FOLDERS = dict.fromkeys(_TRAIN, _TRAIN) | dict.fromkeys(_TEST, _TEST + _VAL) | dict.fromkeys(_VAL, _VAL + _TEST)
HELD_OUT = _TEST + _VAL
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
# Files of `SyntheticDataset.export`: the manifest, and the label of every class, even one whose folder is missing.
_FILES = (*IMG_EXTENSIONS, *EXTENSIONS)
_SYSTEMS = ("@eaDir", "__MACOSX")  # folders that systems make
PROVENANCE, CLASS_FILE = "glem-provenance.json", "classes.json"
TIMM_PREFIXES = ("torch/", "hfds/")


def open_source(data: Any, split: str = "train", unlabelled: bool = False) -> Source:
    """Open an argument of `open_data`. Images are decoded only where labels cannot be read otherwise."""
    if unlabelled:
        return _unlabelled_source(data, split)
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        return _named_source(os.fspath(data), split)
    if isinstance(data, Subset):
        whole, rows = open_source(data.dataset, split), np.asarray(data.indices, dtype=np.int64)
        names, ids = (whole.classes, whole.class_ids) if whole.named else ([], [])
        source = ItemSource(whole.name, names, ids, whole.targets[rows], Subset(whole, rows.tolist()), 0)
        _inherit(source, whole)
        source.threads, source.repeated = whole.threads, whole.repeats(rows)
        source.classes_are_labels = whole.classes_are_labels
        return source
    if isinstance(data, tuple) and len(data) == 2:
        return tensor_source(*data)
    by_index = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not by_index or isinstance(data, IterableDataset | torch.Tensor | np.ndarray):
        raise TypeError(
            "data must be a name, an ImageData, (images, labels), or a data set that has a length and gives "
            f"(image, label) by index; got {type(data).__name__}"
        )
    return _data_set_source(data)


def _unlabelled_source(data: Any, split: str) -> Source:
    """Images as one class, from an argument of `open_source`, a folder of any nesting, or a tensor."""
    if isinstance(data, torch.Tensor):
        data = data, np.zeros(len(data), np.int64)
    folder = expand(data) if isinstance(data, str | os.PathLike) else None
    if folder is not None and folder.is_dir() and not _is_idx(folder):
        inside = _split_folder(folder, split, classes=False)
        _is_export(inside)
        paths = [path for path, _ in make_dataset(inside, {"": 0}, _FILES, allow_empty=True)]
        source: Source = FolderSource(str(folder), [], [], np.zeros(len(paths), np.int64), paths)
    elif of_hugging_face(data) and hasattr(data, "__len__"):
        image = feature_column(data.features, "Image")
        source = ItemSource(type(data).__name__, [], [], np.zeros(len(data), np.int64), data.with_format(None), image)
    else:
        source = copy.copy(open_source(data, split))
    source.classes, source.class_ids, source.named = [ONE_CLASS], [ONE_CLASS], True
    source.targets = np.zeros_like(source.targets)
    return source


def _named_source(spec: str, split: str) -> Source:
    if spec.startswith("bundled:"):
        return _bundled_source(spec.removeprefix("bundled:"), split)
    path = expand(spec)
    if path.is_dir():
        return _idx_source(path, split) if _is_idx(path) else _image_folder(_split_folder(path, split))
    if spec.lower().startswith(TIMM_PREFIXES) or tar_file(spec):
        return _timm_source(spec, split)
    if path.exists():
        raise DataError(f"{spec} is a file; give a folder of images (one folder per class) or a .tar file")
    raise FileNotFoundError(
        f"no such data: {spec}; give a folder, 'bundled:fashion-mnist', or a timm data set: torch/NAME@ROOT, hfds/NAME"
    )


def _bundled_source(name: str, split: str) -> Source:
    """The photographs, one ImageFolder for all splits, or 100 real images of Fashion-MNIST per class and split.

    Fashion-MNIST is one PNG with a row per class and a column per image.
    """
    if name not in ("fashion-mnist", "photographs"):
        raise DataError(f"no bundled data set {name!r}; there are 'bundled:fashion-mnist' and 'bundled:photographs'")
    if split not in _SPLIT_FOLDERS:
        raise DataError(f"bundled:{name} has no split {split!r}; choose 'train' or 'test'")
    folder = resources.files("glem_augment").joinpath("bundled", "data")
    if name == "photographs":
        return replace(_image_folder(Path(str(folder / name))), name=f"bundled:{name}")
    part = "train" if split in _TRAIN else "test"
    with (folder / f"{name}-{part}.png").open("rb") as stream, Image.open(stream) as image:
        sheet = np.asarray(image.convert("L"))
    rows, columns = sheet.shape[0] // 28, sheet.shape[1] // 28
    images = torch.from_numpy(sheet.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(-1, 1, 28, 28))
    targets = np.repeat(np.arange(rows), columns)
    return TensorSource(f"bundled:{name}", _CLOTHES, [str(i) for i in range(rows)], targets, images)


# ---- image folders -----------------------------------------------------------------------------------------------


def without_splits(spec: str) -> bool:
    """Whether the images of `spec`, such as one ImageFolder or archive, stand for every split."""
    folder = expand(spec)
    if spec == "bundled:photographs":
        return True
    return tar_file(spec) is not None or (folder.is_dir() and not _is_idx(folder) and not _split_folders(folder))


def without_test(spec: str) -> bool:
    """Whether `spec` is a folder or an archive that has no images of a split "test", or "val" in its place."""
    folder = expand(spec)
    if not folder.is_dir() or _is_idx(folder):
        return without_splits(spec)
    return not any(name in HELD_OUT for name in _split_folders(folder))


def _image_folder(folder: Path) -> FolderSource:
    """One folder per class, with the classes, the order and the extensions of torchvision's ImageFolder.

    An export has the classes and labels of its classes.json, and some classes may have no folder.
    """
    exported = _is_export(folder)
    if exported and not (folder / CLASS_FILE).is_file():
        raise DataError(f"{folder} holds shards: read them with webdataset or timm, or export them as imagefolder")
    class_ids = _exported_classes(folder) if exported else _folders(folder)
    if not class_ids:
        raise DataError(f"{folder} has no folders: it must be an ImageFolder, with one folder of images per class")
    if systems := [name for name in class_ids if name.startswith(".") or name in _SYSTEMS]:
        raise DataError(f"{folder / systems[0]} is no class, but ImageFolder would count it as one: remove the folder")
    labels = {name: index for index, name in enumerate(class_ids)}
    try:
        samples = make_dataset(folder, labels, _FILES, allow_empty=exported)
    except FileNotFoundError as error:  # classes without images
        raise DataError(f"{folder}: {error}; add images or remove the folders") from None
    if not samples:
        raise DataError(f"{folder} holds no images")
    paths, targets = zip(*samples, strict=True)
    return FolderSource(str(folder), readable_names(class_ids), class_ids, np.asarray(targets), paths)


def _is_export(folder: Path) -> bool:
    """Whether `SyntheticDataset.export` wrote the folder. DataError: it did not finish."""
    try:
        manifest = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        unfinished = manifest.get("complete") is False
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError):
        raise DataError(f"{folder / PROVENANCE} is damaged: run the export again") from None
    if unfinished:
        raise DataError(f"{folder} is an export that did not finish; to finish it, {manifest.get('finish')}")
    return True


def _exported_classes(folder: Path) -> list[str]:
    """The folders of an export in the order of their labels. DataError: classes.json is damaged, or lacks a folder."""
    with suppress(ValueError, TypeError, AttributeError):
        labels = json.loads((folder / CLASS_FILE).read_text(encoding="utf-8"))
        names = sorted(labels, key=labels.__getitem__)
        if [labels[name] for name in names] == list(range(len(names))) and set(_folders(folder)) <= set(names):
            return names
    raise DataError(f"{folder / CLASS_FILE} does not give each class folder a label: run the export again")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _split_folders(folder: Path, split: str = "", classes: bool = True) -> dict[str, Path]:
    """The folders that are named after a usual split or `split`, by their names in lower case.

    A class may be called "test" too, so where there are `classes` a folder counts only if it holds visible folders.
    """
    named = [name for name in _folders(folder) if name.lower() in (*_SPLIT_FOLDERS, split)]
    visible = [n for n in named if not classes or any(not c.startswith(".") for c in _folders(folder / n))]
    return {name.lower(): folder / name for name in visible}


def _split_folder(folder: Path, split: str, classes: bool = True) -> Path:
    """The folder of a split, which is the folder itself if it has no splits."""
    inside = _split_folders(folder, split.lower(), classes)
    if not _SPLIT_FOLDERS.keys() & inside:
        if split.lower() not in _TRAIN + _TEST:  # which are defaults; another split was asked for
            raise DataError(f"{folder} has no splits, such as train/ and val/ folders: leave the split out")
        return folder
    for name in _SPLIT_FOLDERS.get(split.lower(), (split.lower(),)):
        if name in inside:
            return inside[name]
    raise DataError(f"{folder} has no split {split!r}; it holds {', '.join(inside)}")


# ---- idx files ---------------------------------------------------------------------------------------------------


def _idx_files(folder: Path, split: str, kind: str, rank: int) -> list[Path]:
    """MNIST-style files of a split (a pattern), such as train-images-idx3-ubyte.gz."""
    pattern = rf"{split}-{kind}[-.]idx{rank}-ubyte(\.gz)?"
    return [path for path in sorted(folder.iterdir()) if re.fullmatch(pattern, path.name) and path.is_file()]


def _is_idx(folder: Path) -> bool:
    return bool(_idx_files(folder, "(train|t10k|test)", "images", 3))


def _idx_source(folder: Path, split: str) -> TensorSource:
    """MNIST and its relatives. The classes are the labels that occur (EMNIST's letters start at 1)."""
    prefix = "train" if split.lower() in _TRAIN else "(t10k|test)" if split.lower() in _TEST + _VAL else split
    arrays = []
    for kind, rank in (("images", 3), ("labels", 1)):
        found = _idx_files(folder, prefix, kind, rank)
        if not found:
            raise DataError(f"{folder} has no idx file of the {kind} of split {split!r}")
        arrays.append(_read_idx(found[0], rank))
    images, labels = torch.from_numpy(arrays[0])[:, None], check_targets(arrays[1], len(arrays[0]))
    present, targets = np.unique(labels, return_inverse=True)
    class_ids = [str(label) for label in present]
    # Fashion-MNIST is known by the name of the folder, or of the folder above torchvision's "raw".
    parts = [part for part in folder.resolve().parts if part.lower() != "raw"]
    fashion = re.sub("[^a-z]", "", parts[-1].lower()) in ("fashion", "fashionmnist") and present.max(initial=0) < 10
    classes = [_CLOTHES[label] for label in present] if fashion else class_ids
    source = TensorSource(str(folder), classes, class_ids, targets.reshape(-1), images)
    source.classes_are_labels = True
    return source


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of unsigned bytes, LeCun's MNIST format: 0, 0, type 8, rank, big-endian sizes, data."""
    with suppress(gzip.BadGzipFile, EOFError, zlib.error, ValueError):  # the errors of damaged files
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            data = bytearray(file.read())  # writable, for torch
        if data[:4] == bytes((0, 0, 8, rank)):
            shape = np.frombuffer(data, ">u4", rank, offset=4).tolist()
            return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    raise DataError(f"{path} is damaged, or not an idx file of unsigned bytes with {rank} dimension(s): fetch it again")


# ---- other libraries' data sets, and tensors -----------------------------------------------------------------------


def tar_file(spec: str) -> str | None:
    """The path of the .tar file that `spec` names, or None."""
    path = os.path.expanduser(spec)
    return path if path.lower().endswith(".tar") and os.path.isfile(path) else None


def _timm_source(spec: str, split: str) -> Source:
    """`NAME[@ROOT][?input_key=...&target_key=...]`, or a .tar file, opened by `timm.data.create_dataset`."""
    from timm.data import create_dataset

    options: dict[str, Any]
    if root := tar_file(spec):
        # Threads and forked workers would share the position of a handle that is kept open.
        name, options = "", {"cache_tarfiles": False}
    else:
        address, _, query = spec.partition("?")
        name, _, root = address.partition("@")
        root, options = os.path.expanduser(root), dict(parse_qsl(query))
        if set(options) - {"input_key", "target_key"}:
            raise DataError(f"{spec!r}: after '?' only input_key and target_key can be given, got {query!r}")
        if name.lower().startswith("torch/") and not root:
            raise DataError(f"{spec!r} needs the folder of the data: write {name}@FOLDER")
    try:
        dataset = create_dataset(name, root=root or None, split=split, download=False, input_img_mode="", **options)
        return _data_set_source(dataset, spec)
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"timm cannot open {spec!r}, split {split!r}: {type(error).__name__}: {error}") from error


def _data_set_source(data: Any, name: str | None = None) -> Source:
    """A data set of torchvision, timm or Hugging Face, or any data set with items (image, label)."""
    name = name or getattr(getattr(data, "info", data), "dataset_name", None) or type(data).__name__
    ids, names = (getattr(data, "named", True) and named_classes(data)) or ([], [])
    if of_hugging_face(data):  # without its format, which may have renamed the columns
        data, label = data.with_format(None), feature_column(data.features, "ClassLabel")
        return ItemSource(name, names, ids, np.asarray(data[label]), data, feature_column(data.features, "Image"))
    reader: Any = getattr(data, "reader", None)
    if hasattr(reader, "dataset"):  # timm's reader of Hugging Face data
        return ReaderSource(name, names, ids, np.asarray(reader.dataset[reader.label_key]), reader)
    if reader is not None:  # another reader of timm
        labels = reader.targets if hasattr(reader, "targets") else [label for _, label in reader.samples]
        source = ReaderSource(name, names, ids, np.asarray(labels), reader)
        source.classes_are_labels = True
        return source
    if isinstance(data, VisionDataset):
        data = copy.copy(data)
        data.transform = data.target_transform = data.transforms = None
    labels = getattr(data, "targets", getattr(data, "labels", None))
    if labels is None:
        rows = progress_bar("looking for labels", range(len(data)))
        try:
            labels = [int(data[row][1]) for row in rows]
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise DataError(f"{name} has no `targets`, and its items are not (image, int): {error}") from error
    targets = np.asarray(labels)
    if isinstance(data, ImageFolder):
        paths = [path for path, _ in data.samples]
        return FolderSource(str(data.root), names, ids, targets, paths)
    if isinstance(data, VisionDataset) and hasattr(data, "data"):  # CIFAR and MNIST families hold all their pixels
        arrays = np.asarray(data.data)
        if arrays.dtype == np.uint8 and (arrays.ndim == 3 or arrays.shape[-1:] == (3,)):
            images = torch.from_numpy(arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2))
            return TensorSource(name, names, [str(i) for i in range(len(names))], targets, images)
    return _inherit(ItemSource(name, names, ids, targets, data, 0), data)


def _inherit(source: ItemSource, inside: Any) -> ItemSource:
    """The source, with what an `ImageData` or a source inside knows of its images."""
    for fact in ("repeated", "unstated"):
        setattr(source, fact, getattr(inside, fact, getattr(source, fact)))
    return source


def tensor_source(
    x: torch.Tensor | np.ndarray,
    y: Integers,
    classes: Sequence[str] = (),
    class_ids: Sequence[str] | None = None,
    name: str = "tensors",
) -> TensorSource:
    """Images x [N,C,H,W] with labels y. TypeError: a dtype of no images. DataError: other shapes or labels."""
    x = torch.as_tensor(x)
    if dtype_name(x) not in DTYPES:
        raise TypeError(f"images must be {', '.join(DTYPES)}, got {x.dtype}")
    if x.ndim != 4 or x.numel() == 0:
        raise DataError(f"images must be [N,C,H,W], and at least one, got shape {tuple(x.shape)}")
    if x.shape[1] > MOST_CHANNELS:
        last = ": if channels are last, give x.permute(0, 3, 1, 2)" if x.shape[3] <= MOST_CHANNELS else ""
        raise DataError(f"images have at most {MOST_CHANNELS} channels, got shape {tuple(x.shape)}{last}")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise DataError(f"{name} has values that are NaN or infinite: replace them")
    ids = list(classes if class_ids is None else class_ids)
    check_names(classes, ids)
    return TensorSource(name, list(classes), ids, check_targets(y, len(x)), x.detach().cpu().contiguous())
