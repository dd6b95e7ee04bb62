"""Where images come from: the bundled set, image folders, idx files, and the data sets that timm can read.

A source knows the labels and how to open one image; `dataset.py` decides about sizes and channels.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from glem_augment.data.pixels import GREY_MODES, check_header, fit, open_image, to_tensor
from glem_augment.errors import BadImageError, DataError
from glem_augment.io import expand

# Names of the sub-folders that hold a split, the preferred one first. A set with only one held-out part serves it under
# all names of held-out parts.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VAL = ("val", "validation", "valid", "eval")
_SPLIT_FOLDERS = {
    **dict.fromkeys(_TRAIN, _TRAIN),
    **dict.fromkeys(_TEST, _TEST + _VAL),
    **dict.fromkeys(_VAL, _VAL + _TEST),
}
_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


@dataclass
class Source(ABC):
    """Labelled images that can be opened one by one; for the attributes see `ImageData`."""

    classes: list[str]
    class_ids: list[str]
    targets: np.ndarray

    def __post_init__(self) -> None:
        self.targets = np.ascontiguousarray(self.targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def where(self, index: int) -> str:
        """What an error message calls image `index`."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image `index` with its header read."""

    def header(self, index: int) -> tuple[bool, int, int]:
        """Whether image `index` is grey, and its height and width. Raises BadImageError."""
        with self._checked(index) as image:
            return image.mode in GREY_MODES, image.height, image.width

    def pixels(self, index: int, channels: int) -> torch.Tensor:
        """Image `index` as uint8 [C,H,W] in its own size. Raises BadImageError."""
        with self._checked(index) as image:
            return to_tensor(image, channels)

    @contextmanager
    def _checked(self, index: int) -> Iterator[Image.Image]:
        """Open image `index`. Whatever goes wrong in the `with` block becomes a BadImageError that names the image."""
        where = self.where(index)
        try:
            with self.open(index) as image:
                check_header(image, where)
                yield image
        except BadImageError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
            if os.path.isfile(where) and os.path.getsize(where) == 0:
                raise BadImageError(f"{where} is an empty file; remove or replace it") from error
            said = str(error).replace(f": {where!r}", "").replace(f" {where!r}", "")
            raise BadImageError(
                f"{where} cannot be read as an image ({type(error).__name__}: {said}); remove or replace it"
            ) from error


@dataclass
class FolderSource(Source):
    """Image files on disk."""

    paths: Sequence[str]

    def where(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        path = self.paths[index]
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for somebody to write into it
            raise OSError("it is no regular file")
        return open_image(path)


@dataclass
class ArraySource(Source):
    """Images in memory: uint8 arrays [H,W] (grey) or [H,W,3] (RGB), as one array if all have the same shape."""

    arrays: np.ndarray | list[np.ndarray]
    name: str

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])


@dataclass
class ReaderSource(Source):
    """Images of one of timm's readers. timm's own `ImageDataset` is not used, because it replaces an image that it
    cannot read by the next one, with the next one's label."""

    reader: Any

    def where(self, index: int) -> str:
        try:
            return str(self.reader.filename(index) or f"image {index}")
        except Exception:  # this is for error messages: it must not fail on what it reports
            return f"image {index}"

    def open(self, index: int) -> Image.Image:
        with self.reader[index][0] as file:
            return open_image(io.BytesIO(file.read()))


def open_source(spec: str, split: str, size: tuple[int, int] | None, stream_bytes: int) -> Source:
    """Open what `open_data` takes by name. A stream is resized to `size` (H, W) as it is read, and may take up to
    `stream_bytes` of memory."""
    if spec.startswith("bundled:"):
        return _bundled_source(spec.removeprefix("bundled:"), split)
    path = expand(spec)
    if path.is_dir():
        return _idx_source(path, split) if _is_idx(path) else _image_folder(_split_folder(path, split))
    if spec.lower().startswith(TIMM_PREFIXES) or tar_file(spec):
        return _timm_source(spec, split, size, stream_bytes)
    if path.exists():
        raise DataError(f"{spec} is a file; give a folder of images (one folder per class) or a .tar file")
    raise FileNotFoundError(
        f"no such data: {spec}. Give a folder, 'bundled:fashion-mnist', or a timm data set as NAME@ROOT "
        f"with NAME starting with {', '.join(TIMM_PREFIXES)}"
    )


def _bundled_source(name: str, split: str) -> ArraySource:
    """Fashion-MNIST, 100 real images per class and split: one PNG with a row per class and a column per image."""
    if name != "fashion-mnist":
        raise DataError(f"no bundled data set {name!r}; there is 'bundled:fashion-mnist'")
    part = "train" if split in _TRAIN else "test" if split in _TEST + _VAL else None
    if part is None:
        raise DataError(f"bundled:{name} has no split {split!r}; choose 'train' or 'test'")
    file = resources.files("glem_augment").joinpath("bundled", "data", f"{name}-{part}.png")
    with file.open("rb") as stream, Image.open(stream) as image:
        sheet = np.asarray(image.convert("L"))
    rows, columns = sheet.shape[0] // 28, sheet.shape[1] // 28
    arrays = sheet.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    targets = np.repeat(np.arange(rows), columns)
    return ArraySource(_FASHION_CLASSES, [str(i) for i in range(rows)], targets, arrays, f"bundled:{name}")


# ---- image folders -----------------------------------------------------------------------------------------------


def has_splits(folder: Path) -> bool:
    """Whether a folder tells training from test images: by idx files, or ImageFolders named after splits. Otherwise it
    is one ImageFolder, which stands for every split."""
    return _is_idx(folder) or bool(_split_folders(folder))


def _image_folder(folder: Path) -> FolderSource:
    """One folder per class, with the classes, the order and the extensions of torchvision's ImageFolder."""
    class_ids = _folders(folder)
    if not class_ids:
        raise DataError(
            f"{folder} is not an ImageFolder: it must hold one folder of images per class, but has no folders"
        )
    try:
        samples = make_dataset(folder, {name: index for index, name in enumerate(class_ids)}, IMG_EXTENSIONS)
    except FileNotFoundError as error:  # classes without images
        raise DataError(f"{folder}: {error}; add images or remove the folders") from None
    paths, targets = zip(*samples, strict=True)
    return FolderSource(_class_names(class_ids), class_ids, np.asarray(targets), paths)


def _class_names(class_ids: list[str]) -> list[str]:
    """Readable names: first words of the descriptions for ids of ImageNet-1k, otherwise the ids themselves."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_ids):
        return class_ids
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    if not set(info.label_names()).issuperset(class_ids):
        return class_ids
    names = [info.label_name_to_description(name).split(",")[0] for name in class_ids]
    # "crane" and "maillot" each name two classes of ImageNet-1k.
    return [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, class_ids, strict=True)]


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())


def _split_folders(folder: Path, split: str = "") -> dict[str, Path]:
    """The folders that are named after a usual split or `split`, by their names in lower case.

    A class may be called "test" too, so a folder counts only if it holds visible folders itself.
    """
    named = [name for name in _folders(folder) if name.lower() in (*_SPLIT_FOLDERS, split)]
    return {n.lower(): folder / n for n in named if any(not c.startswith(".") for c in _folders(folder / n))}


def _split_folder(folder: Path, split: str) -> Path:
    """The ImageFolder of a split, which is the folder itself if it has no splits."""
    inside = _split_folders(folder, split.lower())
    if not _SPLIT_FOLDERS.keys() & inside:
        return folder
    for name in _SPLIT_FOLDERS.get(split.lower(), (split.lower(),)):
        if name in inside:
            return inside[name]
    raise DataError(f"{folder} has no split {split!r}; it holds {', '.join(inside)}")


# ---- idx files ---------------------------------------------------------------------------------------------------


def _is_idx(folder: Path) -> bool:
    return any(re.fullmatch(r"(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?", name) for name in _files(folder))


def _idx_source(folder: Path, split: str) -> ArraySource:
    """MNIST and its relatives. The classes are the labels that occur (EMNIST's letters start at 1)."""
    names = _files(folder)
    prefix = "train" if split.lower() in _TRAIN else "(t10k|test)" if split.lower() in _TEST + _VAL else split
    found = {}
    for kind, rank in (("images", 3), ("labels", 1)):
        matches = [name for name in names if re.fullmatch(rf"{prefix}-{kind}[-.]idx{rank}-ubyte(\.gz)?", name)]
        if not matches:
            raise DataError(
                f"{folder} has no idx file of the {kind} of split {split!r}; it holds {', '.join(names[:12])}"
            )
        found[kind] = _read_idx(folder / matches[0], rank)
    images, labels = found["images"], found["labels"]
    if len(images) != len(labels):
        raise DataError(f"{folder}: split {split!r} has {len(images)} images but {len(labels)} labels")
    present, targets = np.unique(labels, return_inverse=True)
    class_ids = [str(label) for label in present]
    # The clothes of Fashion-MNIST are known by the name of the folder, or of the one above torchvision's "raw".
    resolved = folder.resolve()
    name = resolved.parent.name if resolved.name.lower() == "raw" else resolved.name
    fashion = re.sub("[^a-z]", "", name.lower()) in ("fashion", "fashionmnist") and present.max(initial=0) < 10
    classes = [_FASHION_CLASSES[label] for label in present] if fashion else class_ids
    return ArraySource(classes, class_ids, targets.reshape(-1), images, str(folder))


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of unsigned bytes, LeCun's MNIST format: 0, 0, type 8, rank, big-endian sizes, data."""
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it may be truncated: fetch it again") from error
    header = 4 + 4 * rank
    if len(data) < header or data[:4] != bytes((0, 0, 8, rank)):
        raise DataError(f"{path} is not an idx file of unsigned bytes with {rank} dimension(s)")
    shape = [int(size) for size in np.frombuffer(data, ">u4", rank, offset=4)]
    if len(data) - header != math.prod(shape):
        raise DataError(f"{path} holds {len(data) - header} bytes instead of {shape}; it is damaged: fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# ---- data sets that timm reads -----------------------------------------------------------------------------------


def tar_file(spec: str) -> str | None:
    """The path of the .tar file that `spec` names, or None."""
    path = os.path.expanduser(spec)
    return path if path.lower().endswith(".tar") and os.path.isfile(path) else None


def _timm_source(spec: str, split: str, size: tuple[int, int] | None, stream_bytes: int) -> Source:
    """Open `NAME[@ROOT][?input_key=...&target_key=...]`, or a .tar file, with `timm.data.create_dataset`."""
    from timm.data import create_dataset

    archive = tar_file(spec)
    address, _, query = spec.partition("?") if archive is None else ("", "", "")
    name, _, root = address.partition("@")
    options: dict[str, Any] = dict(parse_qsl(query))
    if set(options) - {"input_key", "target_key"}:
        raise DataError(f"{spec!r}: after '?' only input_key and target_key can be given, got {query!r}")
    if archive is not None:
        # Threads and forked workers would share the position of a handle that is kept open.
        root, options = archive, {"cache_tarfiles": False}
    if name.lower().startswith(("torch/", "wds/")) and not root:
        raise DataError(f"{spec!r} needs the folder of the data: write {name}@FOLDER")
    root = os.path.expanduser(root)
    try:
        dataset = create_dataset(name, root=root or None, split=split, download=False, input_img_mode="", **options)
        return _random_access(dataset, spec) or _streamed(dataset, spec, size, stream_bytes)
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        # torchvision advises an option of its own.
        why = str(error).replace("You can use download=True to download it", f"download it to {root!r} first")
        raise DataError(f"timm cannot open {spec!r}, split {split!r}: {type(error).__name__}: {why}") from error


def _random_access(dataset: Any, spec: str) -> Source | None:
    """The images of a torchvision data set, or of one of timm's readers; None for a stream."""
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if data is not None and targets is not None:  # torchvision's CIFAR and MNIST families hold all their pixels
        arrays, classes = np.asarray(data), [str(name) for name in dataset.classes]
        if arrays.dtype == np.uint8 and (arrays.ndim == 3 or arrays.shape[-1:] == (3,)):
            return ArraySource(classes, [str(i) for i in range(len(classes))], np.asarray(targets), arrays, spec)
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if samples and hasattr(dataset, "classes"):  # torchvision's sets of image files (ImageFolder, ImageNet, Places365)
        # ImageNet's names are tuples of synonyms, of which the first is not always unique.
        names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in dataset.classes]
        ids = [str(i) for i in getattr(dataset, "wnids", names)]
        paths, labels = zip(*samples, strict=True)
        return FolderSource(names, ids, np.asarray(labels), [str(path) for path in paths])
    reader: Any = getattr(dataset, "reader", None)
    if not hasattr(reader, "__getitem__"):
        return None
    # The column of labels of a Hugging Face data set can be read without the images.
    column = reader.dataset[reader.label_key] if hasattr(reader, "dataset") else reader.targets
    classes = _reader_classes(reader, np.asarray(column))
    return ReaderSource(classes, classes, np.asarray(column), reader)


def _streamed(dataset: Iterable[Any], spec: str, size: tuple[int, int] | None, limit: int) -> Source:
    """A stream (WebDataset shards) is read once and kept in memory, in grey or RGB."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "dist_num_replicas"):
        # Under torchrun timm would hand every process another part; here all need the same images.
        reader.dist_rank, reader.dist_num_replicas, reader.global_num_workers = 0, 1, 1
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    held = 0
    for image, target in dataset:
        check_header(image, f"image {len(arrays)} of {spec}")
        pixels = to_tensor(image, 1 if image.mode in GREY_MODES else 3)
        pixels = pixels if size is None else fit(pixels, *size)
        held += pixels.numel()
        if held > limit:
            raise DataError(
                f"{spec!r} has no random access and does not fit in {limit / 2**20:.0f} MiB after {len(arrays)} "
                "images; give image_size (images are then reduced as they are read), raise cache_bytes, or export the "
                "set to an ImageFolder"
            )
        arrays.append(pixels[0].numpy() if len(pixels) == 1 else pixels.movedim(0, -1).contiguous().numpy())
        labels.append(target)
    expected = getattr(reader, "num_samples", 0) or 0
    if len(arrays) < expected:  # timm logs samples that it cannot decode, and goes on without them
        raise DataError(f"{spec!r}: only {len(arrays)} of {expected} images could be read; see timm's warnings")
    targets = np.asarray(labels)
    classes = _reader_classes(reader, targets)
    return ArraySource(classes, [str(i) for i in range(len(classes))], targets, arrays, spec)


def _reader_classes(reader: Any, targets: np.ndarray) -> list[str]:
    """Class names in index order; the index itself where the reader has no name for it."""
    if targets.size == 0:
        raise DataError("the data set holds no images")
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0:
        raise DataError(f"every image needs one class index >= 0, got labels such as {targets[0]!r}")
    class_to_idx = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    names = {index: str(name) for name, index in class_to_idx.items()}
    return [names.get(i, str(i)) for i in range(max(int(targets.max()) + 1, len(names)))]
