"""Opening labelled images from everywhere: the right pixels and labels, or one clear error."""

from __future__ import annotations

import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.transforms.v2 import functional as F

from glem_augment.errors import BadImageError, DataError
from glem_augment.images.dataset import ImageData, open_data
from glem_augment.images.matching import match_classes
from glem_augment.images.readers import resize_and_crop
from glem_augment.images.sources import CLASS_FILE, PROVENANCE


def png(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", value: int = 100) -> None:
    """A flat image; `size` is (width, height), as PIL has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * len(mode) if mode in ("RGB", "RGBA") else value).save(path)


# ---- in memory -------------------------------------------------------------------------------------------------------


def test_bundled(bundled_train: ImageData, bundled_test: ImageData) -> None:
    for data in (bundled_train, bundled_test):
        assert len(data) == 1000 and data.image_shape == (1, 28, 28)
        assert np.bincount(data.targets).tolist() == [100] * 10
        assert data.class_ids == list("0123456789") and data.classes[9] == "Ankle boot"
        x = data.tensor()
        assert x.dtype == torch.uint8 and x.shape == (1000, 1, 28, 28)
    assert not torch.equal(bundled_train.tensor(), bundled_test.tensor())
    for name, split in (("fashion-mnist", "extra"), ("cars", "test")):
        with pytest.raises(DataError, match=name):
            open_data(f"bundled:{name}", split)
    converted = open_data("bundled:fashion-mnist", "test", image_size=16, channels=3)
    assert converted.image_shape == (3, 16, 16) and torch.equal(converted.tensor()[:, 0], converted.tensor()[:, 2])


def test_items_batches_and_subsets(bundled_train: ImageData) -> None:
    order = np.random.default_rng(0).permutation(1000)[:250]
    batches = list(bundled_train.batches(order, 100))
    assert [len(y) for _, y in batches] == [100, 100, 50]
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert x.dtype == torch.uint8 and y.dtype == torch.int64
    assert torch.equal(x, bundled_train.tensor()[order]) and np.array_equal(y, bundled_train.targets[order])

    subset = bundled_train.subset(order)
    assert torch.equal(subset.tensor(), x) and np.array_equal(subset.targets, y)
    image, label = subset[7]
    assert torch.equal(image, x[7]) and label == int(y[7]) and isinstance(label, int)
    nested = subset.subset([3, 3, 1])
    assert torch.equal(nested.tensor(), x[[3, 3, 1]])
    assert torch.equal(next(iter(nested.batches([2, 0], 2)))[0], x[[1, 3]])
    image.zero_()  # a copy: the cache must not change
    assert torch.equal(subset.tensor()[7], x[7])

    assert torch.equal(bundled_train.subset([-1]).tensor()[0], bundled_train.tensor()[999])
    for error, indices in ((IndexError, [1000]), (TypeError, [0.5])):
        with pytest.raises(error):
            bundled_train.batches(indices, 2)


def test_from_tensors() -> None:
    x = torch.randint(0, 256, (6, 2, 4, 5), dtype=torch.uint8)
    data = ImageData.from_tensors(x, [0, 1, 2, 0, 1, 2], ["a", "b", "c"])
    assert data.image_shape == (2, 4, 5) and data.class_ids == ["a", "b", "c"] and len(data) == 6
    assert torch.equal(data.tensor(), x) and data[4][1] == 1
    relabelled = data.with_targets([1, 1, 1, 0, 0, 0], ["p", "q"])
    assert relabelled.classes == ["p", "q"] and relabelled[0][1] == 1 and torch.equal(relabelled[0][0], x[0])
    for labels, names in (([0, 1, 2, 0, 1, 2], ["a", "b"]), ([-1] * 6, ["a"]), ([0], ["a"]), ([0] * 6, ["a", "a"])):
        with pytest.raises(DataError):
            ImageData.from_tensors(x, labels, names)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_too_large_for_the_cache(image_folder: Path) -> None:
    cached, data = open_data(image_folder), open_data(image_folder, cache_bytes=500)
    order = [11, 0, 4, 4]
    for workers in (0, 2):
        x, y = zip(*data.batches(order, 3, workers=workers), strict=True)
        assert torch.equal(torch.cat(x), cached.tensor()[order])
        assert torch.cat(y).tolist() == cached.targets[order].tolist()
    assert torch.equal(data.subset([3, 2]).tensor(), cached.tensor()[[3, 2]])  # 384 bytes: fits
    assert torch.equal(pickle.loads(pickle.dumps(data))[5][0], cached[5][0])
    (image_folder / "cat" / "2.png").write_text("text")  # headers are checked at once
    with pytest.raises(BadImageError, match="2.png"):
        open_data(image_folder, cache_bytes=500)


def test_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for i in range(count):
                png(tmp_path / split / name / f"{i}.png")
    assert len(open_data(tmp_path)) == 6
    assert len(open_data(tmp_path, "val")) == len(open_data(tmp_path, "validation")) == 4
    assert len(open_data(tmp_path, "test")) == 4  # the only held-out part
    with pytest.raises(DataError, match="extra.*train, val"):
        open_data(tmp_path, "extra")
    png(tmp_path / "val" / "images" / "0.png")  # as in Tiny ImageNet, whose labels are in another file
    with pytest.raises(DataError, match=r"val has the class 'images', which .*train lacks \(its 2 classes .*'a', 'b'"):
        open_data(tmp_path, "val")
    shutil.rmtree(tmp_path / "val" / "images")
    shutil.rmtree(tmp_path / "val" / "b")
    assert open_data(tmp_path, "val").classes == ["a"]  # classes are matched by name
    with pytest.raises(DataError, match=r"one class, but its images lie in 2 folders of .*train: give that one"):
        open_data(shutil.copytree(tmp_path / "train", tmp_path / "nested" / "x" / "train").parents[1])
    inside = tmp_path / "train"
    assert len(open_data(inside, "test")) == 6  # a default, as train is
    with pytest.raises(DataError, match="train"):
        open_data(inside, "val")
    (tmp_path / "val").rename(tmp_path / "other")
    with pytest.raises(DataError, match="test.*train"):
        open_data(tmp_path, "test")


def test_geometry(tmp_path: Path) -> None:
    png(tmp_path / "a" / "0.png", (6, 10), "L", 50)
    png(tmp_path / "a" / "1.png", (6, 10), "1", 1)
    assert open_data(tmp_path).image_shape == (1, 10, 6)
    assert open_data(tmp_path, channels=3).image_shape == (3, 10, 6)
    assert open_data(tmp_path)[1][0].unique().tolist() == [255]
    png(tmp_path / "b" / "0.png", (6, 10), "RGBA", 50)
    data = open_data(tmp_path)
    assert data.image_shape == (3, 10, 6) and data[0][0].unique().tolist() == [50]
    assert data[2][0].unique().tolist() == [50]
    assert open_data(tmp_path, channels=1)[2][0].unique().tolist() == [50]
    for size in (0, 2.5, "8", True):
        with pytest.raises(ValueError, match="image_size"):
            open_data(tmp_path, image_size=size)
    with pytest.raises(ValueError, match="channels"):
        open_data(tmp_path, channels=4)


def test_resizing_is_that_of_torchvision() -> None:
    for shape, size, covered in (((20, 31), (12, 12), (12, 19)), ((9, 7), (12, 8), (12, 9))):
        x = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        wanted = F.center_crop(F.resize(x, covered, antialias=True), size)
        assert torch.equal(resize_and_crop(x, *size), wanted)


def test_mixed_sizes(image_folder: Path) -> None:
    png(image_folder / "dog" / "3.png", (9, 8))
    for options in ({}, {"cache_bytes": 10}):
        with pytest.raises(DataError, match="3.png is 8x9.*image_size"):
            open_data(image_folder, **options)
    assert open_data(image_folder, image_size=4).image_shape == (3, 4, 4)


def broken_files(folder: Path) -> None:
    """Files that must not be used."""
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_bytes(b"<html>404</html>")
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "deep.png")
    # A few hundred bytes that unfold into gigabytes: PIL sees it from the header.
    Image.new("1", (8, 8)).save(folder / "bomb.png")
    bomb = bytearray((folder / "bomb.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "bomb.png").write_bytes(bomb)
    # PIL would start Ghostscript for this one.
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    (folder / "link.png").symlink_to(folder / "nowhere.png")


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_broken_images_among_good_ones(image_folder: Path, tmp_path: Path, cache_bytes: int) -> None:
    broken_files(tmp_path / "bad")
    for path in (tmp_path / "bad").iterdir():
        found = path.rename(image_folder / "dog" / path.name)
        with pytest.raises(BadImageError, match=path.name):  # without a cache, opening reads only the headers
            open_data(image_folder, image_size=8, cache_bytes=cache_bytes).tensor()
        found.unlink()


def test_modes_of_pil_are_read_as_torchvision_and_timm_do(tmp_path: Path) -> None:
    """Of animations, the first frame."""
    (tmp_path / "a").mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for mode, name in (("CMYK", "0.jpg"), ("P", "1.png"), ("RGBA", "2.png"), ("LA", "3.png"), ("1", "4.png")):
        noise.convert(mode).save(tmp_path / "a" / name)
    noise.convert("P").save(tmp_path / "a" / "5.png", transparency=3)
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (200, 20)]
    frames[0].save(tmp_path / "a" / "6.webp", save_all=True, append_images=frames[1:], lossless=True)
    noise.save(tmp_path / "a" / "7.png", format="GIF")
    (tmp_path / "a" / "notes.txt").write_text("not looked at")
    data = open_data(tmp_path)
    for i in range(8):
        with Image.open(data.where(i)) as image:
            expected = np.asarray(image.convert("RGBA" if i == 5 else "RGB").convert("RGB"))
        assert np.array_equal(data[i][0].permute(1, 2, 0).numpy(), expected), i
    with pytest.raises(BadImageError, match="more than 8 bits"):  # would be cut off at 255
        open_data([(Image.new("I", (8, 8), 1000), 0), (Image.new("I", (8, 8), 2000), 1)])


def test_missing_and_empty(tmp_path: Path, image_folder: Path) -> None:
    (image_folder / "eel").mkdir()
    (image_folder / "eel" / "readme.txt").write_text("none yet")
    with pytest.raises(DataError, match="eel"):
        open_data(image_folder)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / PROVENANCE).write_text("{}")
    (tmp_path / "export" / CLASS_FILE).write_text('{"a": 0}')
    for path, error in (
        (tmp_path / "export", DataError),
        (tmp_path / "nothing", DataError),
        (tmp_path / "nowhere", FileNotFoundError),
        (image_folder / "cat" / "0.png", DataError),
    ):
        with pytest.raises(error, match=path.name):
            open_data(path)
    with pytest.raises(FileNotFoundError, match="did you mean nothing"):
        open_data(tmp_path / "nothin")


# ---- other libraries -------------------------------------------------------------------------------------------------


def test_data_sets_of_torchvision_and_timm(image_folder: Path) -> None:
    """Their images as they are stored, whatever transforms they have, with their labels and names."""
    reference, small = open_data(image_folder), open_data(image_folder, image_size=4, channels=1)
    transform: dict[str, Any] = {"transform": F.horizontal_flip, "target_transform": lambda y: y + 1}
    folder = ImageFolder(image_folder, **transform)
    assert reference.class_ids == folder.classes and reference.targets.tolist() == folder.targets

    class Private(VisionDataset):  # as Flowers102 and Food101, which keep their labels for themselves
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            image, label = ImageFolder(image_folder)[index]
            return (image, label) if self.transforms is None else self.transforms(image, label)

        def __len__(self) -> int:
            return 12

    items = [(np.asarray(image).transpose(2, 0, 1), label) for image, label in ImageFolder(image_folder)]
    kinds = (folder, ImageDataset(str(image_folder), **transform), reference, Private("", **transform), items)
    for given, names in zip(kinds, [["bird", "cat", "dog"]] * 3 + [["0", "1", "2"]] * 2, strict=True):
        data = open_data(given)
        assert torch.equal(data.tensor(), reference.tensor()) and data.targets.tolist() == reference.targets.tolist()
        assert data.classes == names and data.named == (names != ["0", "1", "2"])
        part = open_data(Subset(Subset(given, [11, 0, 5, 7]), [0, 1, 2]), image_size=4, channels=1)
        assert torch.equal(part.tensor(), small.subset([11, 0, 5]).tensor())
        assert part.targets.tolist() == [2, 0, 1] and part.classes == names
    (image_folder / "dog" / "3.png").write_bytes(b"damaged")
    with pytest.raises(BadImageError, match="dog/3.png"):
        open_data(folder)


def test_tensors() -> None:
    x, y = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2])
    for given in ((x, y), (x.numpy(), y.tolist()), TensorDataset(x, y), Subset(TensorDataset(x, y), range(6))):
        data = open_data(given)
        assert torch.equal(data.tensor(), x) and data.targets.tolist() == y.tolist() and not data.named
        assert torch.equal(open_data(given, image_size=4)[3][0], resize_and_crop(x[3], 4, 4))
    assert torch.equal(open_data((x[:, :2], y)).tensor(), x[:, :2])
    many = torch.cat([x, x[:, :2]], 1)  # channels
    assert torch.equal(open_data((many, y), image_size=4)[3][0], resize_and_crop(many[3], 4, 4))
    for given in ((x.double(), y), [(x[0].double(), 0)], [5], (i for i in "ab"), (x, y.float())):
        with pytest.raises((TypeError, DataError)):
            open_data(given)


def test_data_sets_of_hugging_face(image_folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    reference = open_data(image_folder)
    items = ImageFolder(image_folder)
    columns = {"img": [image for image, _ in items], "kind": items.targets, "id": list(range(12))}
    features = datasets.Features(
        img=datasets.Image(), kind=datasets.ClassLabel(names=items.classes), id=datasets.Value("int64")
    )
    whole = datasets.Dataset.from_dict(columns, features)
    for given in (whole, whole.with_format("torch"), whole.with_transform(lambda batch: {"x": batch["id"]})):
        data = open_data(given)
        assert torch.equal(data.tensor(), reference.tensor()) and data.classes == reference.classes and data.named
        assert data.targets.tolist() == reference.targets.tolist()
    assert match_classes(["dog", "cat", "bird"], whole).tolist() == [2, 1, 0]
    numbers = open_data(whole.cast_column("kind", datasets.Value("int32")).rename_column("kind", "label"))
    assert numbers.classes == ["0", "1", "2"] and not numbers.named
    for wrong in (whole.remove_columns("kind"), whole.to_iterable_dataset()):
        with pytest.raises((DataError, TypeError)):
            open_data(wrong)


def test_torch_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own file layout, with a few images; its checksums belong to the whole set."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10)) * 2}))
    names = ["airplane", "automobile", *(f"c{i}" for i in range(2, 10))]
    (base / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({CIFAR10.meta["key"]: names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = open_data(f"torch/cifar10@{tmp_path}", "test")
    assert data.classes == names and np.array_equal(data.tensor().numpy(), pixels.reshape(20, 3, 32, 32))
    assert len(open_data(f"torch/cifar10@{tmp_path}", "train")) == 100


def test_tar(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(image_folder, "images")
    data = open_data(tmp_path / "images.tar")
    assert data.classes == ["bird", "cat", "dog"]
    assert torch.equal(data.tensor(), open_data(image_folder).tensor())
    (image_folder / "cat" / "1.png").write_bytes(b"damaged")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(image_folder, "images")
    with pytest.raises(DataError, match="cat/1.png"):
        open_data(tmp_path / "bad.tar")


def test_torch_fashion_mnist(tmp_path: Path) -> None:
    """The idx files in torchvision's layout."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8),
        np.arange(20, dtype=np.uint8) % 10,
    )
    for split in ("train", "t10k"):
        for name, x in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, x.ndim)) + struct.pack(f">{x.ndim}I", *x.shape)
            (raw / f"{split}-{name}-ubyte").write_bytes(head + x.tobytes())
    data = open_data(f"torch/fashion_mnist@{tmp_path}", "test")
    assert np.array_equal(data.tensor()[:, 0], images) and data.targets.tolist() == labels.tolist()
    assert data.classes[9] == "Ankle boot" and data.class_ids == list("0123456789")
    with pytest.raises(DataError, match="torch/mnist@"):
        open_data(tmp_path)


def test_timm_errors(tmp_path: Path) -> None:
    for spec in ("torch/cifar10", f"torch/cifar10@{tmp_path}", f"torch/nonsense@{tmp_path}"):
        with pytest.raises(DataError, match=spec):
            open_data(spec)
