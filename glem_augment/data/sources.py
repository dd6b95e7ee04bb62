"""Where images come from: the bundled set, image folders and idx files, each as a ``Source``.

A source knows labels and how to read one image; it decides nothing about sizes or channels (``decoding.py``
does).
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from glem_augment.errors import DataError

__all__ = ["ArraySource", "FolderSource", "Source", "bundled_source", "folder_source"]

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Names of the sub-folders that hold a split, the preferred one first. A set with only one held-out part
# serves it under both names.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VAL = ("val", "validation", "valid", "eval")
_SPLIT_FOLDERS = {
    **dict.fromkeys(_TRAIN, _TRAIN),
    **dict.fromkeys(_TEST, _TEST + _VAL),
    **dict.fromkeys(_VAL, _VAL + _TEST),
}
_IDX_PREFIX = {**dict.fromkeys(_TRAIN, ("train",)), **dict.fromkeys(_TEST + _VAL, ("t10k", "test"))}


class Source(ABC):
    """Labelled images that can be read one by one.

    Attributes:
        classes: K names in index order; class_ids: K identifiers (folder names, wnids, digits).
        targets: int64 [N].
        arrays: uint8 [N,H,W] or [N,H,W,3] when the pixels are in memory already, else None.
    """

    arrays: np.ndarray | None = None

    def __init__(self, classes: Sequence[str], class_ids: Sequence[str], targets: np.ndarray):
        self.classes = list(classes)
        self.class_ids = list(class_ids)
        self.targets = np.ascontiguousarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call image ``index`` in an error message."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image ``index`` with its header read, the pixels perhaps not yet (PIL decodes on demand)."""


class FolderSource(Source):
    """Image files on disk."""

    def __init__(self, paths: list[str], classes: Sequence[str], class_ids: Sequence[str], targets: np.ndarray):
        super().__init__(classes, class_ids, targets)
        self.paths = paths

    def where(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        path = self.paths[index]
        # Opening a pipe would wait for somebody to write into it.
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is no regular file")
        return Image.open(path)


class ArraySource(Source):
    """Images in memory: uint8 [N,H,W] (grey) or [N,H,W,3] (RGB)."""

    def __init__(
        self,
        arrays: np.ndarray,
        classes: Sequence[str],
        class_ids: Sequence[str],
        targets: np.ndarray,
        name: str,
    ):
        super().__init__(classes, class_ids, targets)
        self.arrays = arrays
        self.name = name

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def open(self, index: int) -> Image.Image:
        assert self.arrays is not None
        return Image.fromarray(self.arrays[index])


# ---------------------------------------------------------------------------------------------------- bundled


def bundled_source(name: str, split: str) -> ArraySource:
    """The data sets inside the package: ``fashion-mnist``, split train or test, 100 real images per class
    each.

    Each split is one PNG, a row per class and a column per image (``benchmarks/make_bundled_data.py`` makes
    it).

    Raises:
        DataError: unknown name or split.
    """
    if name != "fashion-mnist":
        raise DataError(f"no bundled data set {name!r}; there is 'bundled:fashion-mnist'")
    part = "train" if split in _TRAIN else "test" if split in _TEST + _VAL else None
    if part is None:
        raise DataError(f"bundled:{name} has no split {split!r}; choose 'train' or 'test'")
    file = resources.files("glem_augment").joinpath("bundled", "data", f"{name}-{part}.png")
    with file.open("rb") as stream, Image.open(stream) as image:
        sheet = np.asarray(image.convert("L"))
    side, classes = 28, FASHION_CLASSES
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    arrays = sheet.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    targets = np.repeat(np.arange(rows), columns)
    digits = [str(i) for i in range(rows)]
    return ArraySource(np.ascontiguousarray(arrays), classes, digits, targets, f"bundled:{name} ({part})")


# ---------------------------------------------------------------------------------------------------- folders


def folder_source(folder: Path, split: str) -> Source:
    """A folder of idx files, an ImageFolder, or a folder that holds ImageFolders named after splits.

    Raises:
        DataError: no such split, no classes, a class without images, or damaged idx files.
    """
    if _is_idx(folder):
        return _idx_source(folder, split)
    return _image_folder(_split_folder(folder, split))


def has_splits(folder: Path) -> bool:
    """Whether a folder tells training from test images: by idx files, or ImageFolders named after splits. Else it is
    one ImageFolder, which stands for every split."""
    return _is_idx(folder) or bool(_splits(folder))


def _is_idx(folder: Path) -> bool:
    return any(_IDX_IMAGES.fullmatch(name) for name in _files(folder))


def _files(folder: Path) -> list[str]:
    # Kaggle's MNIST has folders called like the files.
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _splits(folder: Path) -> list[str]:
    # A class may be called "test"; a split is a folder that holds folders itself.
    return [name for name in _folders(folder) if name.lower() in _SPLIT_FOLDERS and _has_folders(folder / name)]


def _split_folder(folder: Path, split: str) -> Path:
    folders, splits = _folders(folder), _splits(folder)
    if not splits:
        return folder
    beside = [name for name in folders if name not in splits and not name.startswith(".")]
    classes = [name for name in beside if name.lower() not in _SPLIT_FOLDERS and _has_images(folder / name)]
    if classes:
        raise DataError(
            f"{folder} can be read in two ways: {splits[0]!r} holds folders, as a split does, and {classes[0]!r} "
            f"images, as a class does. Open {folder / splits[0]} for the split; for the classes rename the folder "
            f"{splits[0]!r}, or take the folders out of it"
        )
    wanted = _SPLIT_FOLDERS.get(split.lower(), (split,))
    for candidate in wanted:
        for name in folders:
            if name.lower() == candidate.lower() and _has_folders(folder / name):
                return folder / name
    raise DataError(f"{folder} has no split {split!r}; it holds {', '.join(splits)}")


def _has_folders(folder: Path) -> bool:
    # Hidden ones are left by editors and notebooks.
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))


def _has_images(folder: Path) -> bool:
    return any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(folder))


def _image_folder(folder: Path) -> FolderSource:
    """As ``torchvision.datasets.ImageFolder``: same classes, same order, same extensions. Decodes nothing."""
    class_ids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not class_ids:
        raise DataError(
            f"{folder} is not an ImageFolder: it must hold one folder of images per class, but has no folders"
        )
    paths: list[str] = []
    targets: list[int] = []
    empty: list[str] = []
    for index, name in enumerate(class_ids):
        found = [
            os.path.join(root, file)
            for root, files in sorted(_walk(folder / name))
            for file in sorted(files)
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
        if not found:
            empty.append(name)
        paths += found
        targets += [index] * len(found)
    if empty:
        listed = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        raise DataError(
            f"no images ({', '.join(IMG_EXTENSIONS)}) in {len(empty)} of the {len(class_ids)} class folders "
            f"of {folder}: {listed}; add images or remove the folders"
        )
    return FolderSource(paths, _class_names(class_ids), class_ids, np.asarray(targets))


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files, through links, but into no folder that is on the way there already: a link to a parent
    would otherwise give every image dozens of times. DataError for a folder that can't be read, rather than silence."""
    for root, folders, files in os.walk(top, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(root)
        folders[:] = [f for f in folders if not _within(real, os.path.realpath(os.path.join(root, f)))]
        yield root, files


def _unreadable(error: OSError) -> None:
    raise DataError(f"can't read the folder {error.filename}: {error.strerror}; check its permissions") from error


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _class_names(class_ids: list[str]) -> list[str]:
    """Readable names: the first word of the description for ids of ImageNet-1k, else the ids themselves."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_ids):
        return list(class_ids)
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    if not known.issuperset(class_ids):
        return list(class_ids)
    names = [info.label_name_to_description(name).split(",")[0] for name in class_ids]
    # "crane" and "maillot" each name two classes of ImageNet-1k.
    return [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, class_ids, strict=True)]


# ---------------------------------------------------------------------------------------------------- idx
# files

_IDX_IMAGES = re.compile(r"(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")


def _idx_source(folder: Path, split: str) -> ArraySource:
    names = _files(folder)
    prefixes = _IDX_PREFIX.get(split.lower(), (split,))
    found = {}
    for kind, rank in (("images", 3), ("labels", 1)):
        pattern = re.compile(rf"({'|'.join(map(re.escape, prefixes))})-{kind}[-.]idx{rank}-ubyte(\.gz)?")
        matches = [name for name in names if pattern.fullmatch(name)]
        if not matches:
            raise DataError(
                f"{folder} has no idx file of the {kind} of split {split!r}; it holds {', '.join(names[:12])}"
            )
        found[kind] = read_idx(folder / matches[0], rank)
    images, labels = found["images"], found["labels"]
    if len(images) != len(labels):
        raise DataError(f"{folder}: split {split!r} has {len(images)} images but {len(labels)} labels")
    return labelled_arrays(images, labels, str(folder), fashion=_is_fashion(folder))


def _is_fashion(folder: Path) -> bool:
    """Whether a folder of idx files is called Fashion-MNIST: itself, or what it is the "raw" folder of, as torchvision
    has it. Not just any folder above it, which may be called so for other reasons."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name.lower() == "raw" else folder.name
    return re.sub("[^a-z]", "", name.lower()) in ("fashion", "fashionmnist")


def labelled_arrays(images: np.ndarray, labels: np.ndarray, name: str, fashion: bool = False) -> ArraySource:
    """Arrays with integer labels; the classes are the labels that occur, in order (EMNIST's letters start at
    1)."""
    present, targets = np.unique(labels, return_inverse=True)
    class_ids = [str(label) for label in present]
    fashion = fashion and present.size > 0 and int(present[-1]) < len(FASHION_CLASSES)
    classes = [FASHION_CLASSES[label] for label in present] if fashion else class_ids
    return ArraySource(images, classes, class_ids, targets.reshape(-1), name)


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read an idx file of unsigned bytes (Y. LeCun's MNIST format: 0, 0, type 8, rank, big-endian sizes,
    data).

    Args:
        path: the file, gzip-compressed where it ends in ``.gz``.
        rank: the expected number of dimensions.

    Returns:
        uint8 array with ``rank`` dimensions.

    Raises:
        DataError: not this format, or not exactly as many bytes as its header announces.
    """
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it may be truncated: fetch it again") from error
    header = 4 + 4 * rank
    if len(data) < header or data[:4] != bytes((0, 0, 8, rank)):
        raise DataError(
            f"{path} is not an idx file of unsigned bytes with {rank} dimension(s): it starts with "
            f"{data[:4].hex() or 'nothing'} instead of {bytes((0, 0, 8, rank)).hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, offset=4))
    expected = 1
    for size in shape:  # Python integers: a hostile header must not overflow
        expected *= size
    if len(data) - header != expected:
        raise DataError(
            f"{path} announces {' x '.join(map(str, shape))} = {expected} bytes but holds "
            f"{len(data) - header}; it is truncated or damaged: fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
