"""Images of 16 bits, of floats and of many channels: files, ranges, and files that must not be loaded."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.errors import BadImageError, DataError
from glem_augment.images import open_data
from glem_augment.images.dataset import ImageData, as_image_data
from glem_augment.images.readers import check_layout, resize_and_crop

RNG = np.random.default_rng(0)
X16 = RNG.integers(0, 65536, (4, 6, 7)).astype(np.uint16)
F12 = RNG.normal(0, 3, (4, 12, 6, 7)).astype(np.float32)


def folder(path: Path, name: str, write: Callable[[Path, int], object]) -> Path:
    """Two classes of two files."""
    for i in range(4):
        file = path / "ab"[i // 2] / f"{i}{name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, i)
    return path


def test_png_and_tiff_of_16_bits_and_tiff_of_floats_keep_every_value(tmp_path: Path) -> None:
    for name in (".png", ".tif"):
        path = folder(tmp_path / name, name, lambda file, i: Image.fromarray(X16[i]).save(file))
        for cache_bytes in (2**20, 0):
            data = open_data(path, cache_bytes=cache_bytes)
            assert data.pixel_range == PixelRange("uint16", 0, 65535) and data.image_shape == (1, 6, 7)
            assert np.array_equal(data.tensor()[:, 0].numpy(), X16) and data[2][0].dtype == torch.uint16
    x = torch.from_numpy(X16[:1])  # resized values are rounded to the nearest
    assert torch.equal(resize_and_crop(x, 3, 3).float(), resize_and_crop(x.float(), 3, 3).round())
    path = folder(tmp_path / "f", ".tiff", lambda file, i: Image.fromarray(F12[i, 0]).save(file))
    assert np.array_equal(open_data(path, value_range=(-20, 20)).tensor()[:, 0].numpy(), F12[:, 0])


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_arrays_keep_their_channels_and_values(tmp_path: Path, cache_bytes: int) -> None:
    whole = np.abs((F12 * 10).round())
    for dtype, wanted in ((np.float32, "float32"), (np.float64, "float32"), (">i2", "int16"), (np.uint8, "uint8")):
        x = (F12 if wanted == "float32" else whole).astype(dtype)
        path = folder(tmp_path / str(dtype), ".npy", lambda file, i, x=x: np.save(file, np.asfortranarray(x[i])))
        ends = (0, 255) if wanted == "uint8" else (-200, 200)
        data = open_data(path, cache_bytes=cache_bytes, value_range=ends)
        assert data.image_shape == (12, 6, 7) and data.pixel_range == PixelRange(wanted, *ends)
        assert np.array_equal(data.tensor().numpy(), x.astype(wanted))
        if wanted == "uint8":
            assert open_data(path).pixel_range == UINT8
            continue
        with pytest.raises(DataError, match="value_range"):  # without a cache when the images are read
            open_data(path, cache_bytes=cache_bytes).tensor()
    unit = folder(tmp_path / "unit", ".npy", lambda file, i: np.save(file, np.abs(F12[i]) / 100))
    assert open_data(unit, cache_bytes=cache_bytes).pixel_range == PixelRange("float32", 0, 1)


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_values_outside_a_stated_range_are_clipped_with_a_warning(tmp_path: Path, cache_bytes: int) -> None:
    path = folder(tmp_path, ".npy", lambda file, i: np.save(file, X16[i]))
    with pytest.warns(UserWarning, match="clipped"):
        found = open_data(path, cache_bytes=cache_bytes, value_range=(100, 4095)).tensor()
    assert np.array_equal(found[:, 0].numpy(), X16.clip(100, 4095))


def test_images_of_different_kinds_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, ".npy", lambda file, i: np.save(file, F12[i, : 12 - (i == 3)]))
    for cache_bytes in (2**20, 0):
        with pytest.raises(BadImageError, match=r"3\.npy"):
            open_data(path, cache_bytes=cache_bytes, value_range=(-20, 20)).tensor()
    Image.new("L", (7, 6)).save(tmp_path / "a" / "grey.png")
    with pytest.raises(BadImageError, match=r"grey\.png"):
        open_data(path, value_range=(-20, 20)).tensor()
    # Pillow writes no colour of 16 bits: the header says so, the pixels are never decoded.
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((6, 7, 3), np.uint8)).save(buffer, "PNG")
    header = bytearray(buffer.getvalue())
    header[24] = 16
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "a" / "colour.png").write_bytes(header)
    with pytest.raises(BadImageError, match=r"colour\.png"):
        open_data(path, value_range=(-20, 20), cache_bytes=0)


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("unpickled",)


def npy(shape: str, body: bytes = b"") -> bytes:
    """An .npy file with any header."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def saved(x: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x, **options)
    return buffer.getvalue()


HOSTILE = {
    "pickled": saved(np.array([Bomb(), None]), allow_pickle=True),
    "huge": npy("(16, 100000, 100000)"),
    "code": npy("(1, __import__('os').abort(), 4)"),
    "cut": npy("(1, 4, 4)", b"x" * 9),
    "nan": saved(np.full((1, 4, 4), np.nan, np.float32)),
    "hwc": saved(np.zeros((16, 16, 3), np.float32)),
    "many": saved(np.zeros((17, 8, 8), np.float32)),
    "empty": saved(np.zeros((0, 4, 4), np.float32)),
    "int64": saved(np.zeros((1, 4, 4), np.int64)),
}


def test_hostile_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, content in HOSTILE.items():
        path = tmp_path / "a" / f"{name}.npy"
        path.write_bytes(content)
        with pytest.raises(BadImageError, match=rf"{name}\.npy"):
            open_data(tmp_path).tensor()
        path.unlink()


def test_channels_come_first() -> None:
    for shape in ((16, 16, 3), (12, 12, 3), (12, 1000, 1), (20, 20, 12)):
        with pytest.raises(BadImageError, match=r"permute\(0, 3, 1, 2\)"):
            check_layout(shape, "x")
        with pytest.raises(DataError, match="permute"):
            open_data((torch.zeros(2, *shape), [0, 1]))
        for image in (torch.zeros(shape), np.zeros(shape, np.uint8)):
            with pytest.raises(DataError, match="permute"):
                open_data([(image, 0)])
    for shape in ((16, 8, 8), (12, 6, 7), (3, 16, 3), (4, 4, 4), (1, 1, 1)):
        check_layout(shape, "x")


def test_ranges_that_are_none() -> None:
    kinds = [("float64", 0, 1), ("uint8", 0, 15), ("uint16", 0, 65536), ("uint16", 0.5, 3)]
    ends = ((1, 1), (float("nan"), 1), (1e6, 1e6 + 1), ("0", 1))
    for dtype, low, high in kinds + [("float32", *each) for each in ends]:
        with pytest.raises(ValueError):
            PixelRange(dtype, low, high)  # type: ignore[arg-type]


def test_tensors_have_ranges_too() -> None:
    x, y = torch.from_numpy(F12), torch.tensor([0, 0, 1, 1])
    data = ImageData.from_tensors(x, y, ["a", "b"], value_range=(-20, 20))
    assert torch.equal(data.tensor(), x) and data.pixel_range == PixelRange("float32", -20, 20)
    assert open_data((torch.from_numpy(X16[:, None]), y)).pixel_range.dtype == "uint16"
    assert open_data(data, image_size=5).pixel_range == data.pixel_range
    items = open_data([(x[i], int(y[i])) for i in range(4)], value_range=(-20, 20))
    assert torch.equal(items.tensor(), x)
    with pytest.raises(DataError, match="NaN"):
        open_data((x * float("nan"), y))
    for kind in (x, x.to(torch.int16)):
        with pytest.raises(DataError, match="value_range"):
            open_data((kind, y))
    for given, shape, wanted in (
        (data, (12, 6, 7), PixelRange("float32", 0, 1)),
        ((x, y), (12, 6, 7), UINT8),
        ((x[:, :1], y), (12, 6, 7), data.pixel_range),
    ):
        with pytest.raises(DataError):
            as_image_data(given, shape, pixel_range=wanted)
