"""Images of 16 bits, of floats and of many channels: files, ranges, and files that must not be loaded."""

from __future__ import annotations

import gc
import io
import pickle
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.errors import BadImageError, DataError
from glem_augment.images import open_data
from glem_augment.images.arrays import read_array
from glem_augment.images.cropping import fit
from glem_augment.images.dataset import ImageData, as_image_data

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
        for options in ({}, {"cache_bytes": 0}, {"image_size": (6, 7), "channels": 1}):
            data = open_data(path, **options)
            assert data.pixel_range == PixelRange("uint16", 0, 65535) and data.image_shape == (1, 6, 7)
            assert np.array_equal(data.tensor()[:, 0].numpy(), X16) and data[2][0].dtype == torch.uint16
    path = folder(tmp_path / "f", ".tiff", lambda file, i: Image.fromarray(F12[i, 0]).save(file))
    assert np.array_equal(open_data(path, value_range=(-20, 20)).tensor()[:, 0].numpy(), F12[:, 0])
    assert open_data(path, value_range=(-20, 20)).subset([3])[0][0].dtype == torch.float32


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_arrays_keep_their_channels_and_values(tmp_path: Path, cache_bytes: int) -> None:
    whole = (F12 * 10).round()
    for name, dtype, wanted in (
        ("a", np.float32, torch.float32),
        ("b", np.float64, torch.float32),
        ("c", ">i2", torch.int16),
        ("d", np.uint8, torch.uint8),
    ):
        x = (F12 if wanted == torch.float32 else np.abs(whole)).astype(dtype)
        path = folder(tmp_path / name, ".npy", lambda file, i, x=x: np.save(file, np.asfortranarray(x[i])))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = open_data(path, cache_bytes=cache_bytes)
        assert data.image_shape == (12, 6, 7) and data.tensor().dtype == wanted
        assert np.array_equal(
            data.tensor().numpy(), x.astype(np.dtype(dtype).newbyteorder("=")).astype(data.pixel_range.dtype)
        )
        if wanted == torch.uint8:
            assert data.pixel_range == UINT8 and not caught
        else:
            assert (data.pixel_range.low, data.pixel_range.high) == (x.min(), x.max())
            assert len(caught) == 1 and "is measured" in str(caught[0].message)
    path = folder(tmp_path / "e", ".NPZ", lambda file, i: np.savez_compressed(file.open("wb"), image=X16[i]))
    assert np.array_equal(open_data(path, cache_bytes=cache_bytes).tensor()[:, 0].numpy(), X16)


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_values_outside_a_stated_range_are_clipped_with_a_warning(tmp_path: Path, cache_bytes: int) -> None:
    path = folder(tmp_path, ".npy", lambda file, i: np.save(file, X16[i]))
    with pytest.warns(UserWarning, match="outside uint16 from 100 to 4095, which are clipped"):
        found = open_data(path, cache_bytes=cache_bytes, value_range=(100, 4095)).tensor()
    assert np.array_equal(found[:, 0].numpy(), X16.clip(100, 4095))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_data(path, cache_bytes=cache_bytes, value_range=(0, 65535)).pixel_range.bits == 16


def test_resized_values_are_rounded_to_the_nearest() -> None:
    x = torch.from_numpy(X16[:1])
    wanted = fit(x.float(), 3, 3).round()
    assert torch.equal(fit(x, 3, 3).float(), wanted) and fit(x, 3, 3).dtype == torch.uint16


def test_images_of_different_kinds_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, ".npy", lambda file, i: np.save(file, F12[i, : 12 - (i == 3)]))
    for cache_bytes in (2**20, 0):
        with pytest.raises(BadImageError, match=r"3\.npy has 11 channels of float32 where 12 channels of float32"):
            open_data(path, cache_bytes=cache_bytes, value_range=(-20, 20)).tensor()
    Image.new("L", (7, 6)).save(tmp_path / "a" / "first.png")
    with pytest.raises(BadImageError, match=r"first\.png has 3 channels of uint8"):
        open_data(path, value_range=(-20, 20))
    rgb = Image.fromarray(np.zeros((6, 7, 3), np.uint8))
    rgb.save(tmp_path / "rgb.png")
    whole = (tmp_path / "rgb.png").read_bytes()
    # Pillow writes no colour of 16 bits: the header says so, the pixels are never decoded.
    header = bytearray(whole)
    header[24] = 16
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "b" / "colour.png").write_bytes(header)
    with pytest.raises(BadImageError, match=r"colour\.png has more than 8 bits per channel, which PIL drops"):
        open_data(path, value_range=(-20, 20), cache_bytes=0)


def test_bmp_of_16_bits_per_pixel_is_an_8_bit_image(tmp_path: Path) -> None:
    """5, 6 and 5 bits of three colours."""
    (tmp_path / "a").mkdir()
    masks = (0xF800, 0x07E0, 0x001F)
    about = struct.pack("<IiiHHIIiiII3I", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0, *masks)
    pixels = struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF)
    head = struct.pack("<2sIHHI", b"BM", 14 + len(about) + len(pixels), 0, 0, 14 + len(about))
    (tmp_path / "a" / "0.bmp").write_bytes(head + about + pixels)
    x = open_data(tmp_path).tensor()
    assert x.dtype == torch.uint8 and x[0, :, 1, 0].tolist() == [255, 0, 0] and x[0, :, 0, 1].tolist() == [255] * 3


def npy(shape: str, dtype: str = "<f4", body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npy file with any header."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little") + text + body


def zipped(content: bytes, count: int = 1) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(count):
            archive.writestr(f"{i}.npy", content)
    return buffer.getvalue()


def saved(x: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x, **options)
    return buffer.getvalue()


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("unpickled",)


HOSTILE = {
    "pickled.npy": (saved(np.array([Bomb(), None]), allow_pickle=True), "Python objects, which are never loaded"),
    "objects.npz": (zipped(saved(np.array([Bomb(), None]), allow_pickle=True)), "Python objects"),
    "bare.npy": (pickle.dumps(Bomb()), "cannot be read"),
    "huge.npy": (npy("(16, 100000, 100000)"), "at most 16 channels and 33.6 million values"),
    "huge.npz": (zipped(npy("(1, 9223372036854775807, 2)")), "at most 16 channels"),
    "negative.npy": (npy("(1, -1, 4)"), "an image is"),
    "code.npy": (npy("(1, __import__('os').abort(), 4)"), "cannot be read"),
    "long.npy": (npy("(1, 4, 4)", body=b"x" * 9, version=b"\x02\x00"), "header that no image has"),
    "cut.npy": (npy("(1, 4, 4)", body=b"x" * 9), "cannot be read.*ends after 9 of 64 bytes"),
    "nan.npy": (saved(np.full((1, 4, 4), np.nan, np.float32)), "NaN or infinite"),
    "large.npy": (saved(np.full((1, 4, 4), 1e300)), "NaN or infinite"),
    "hwc.npy": (saved(np.zeros((20, 20, 12), np.float32)), r"channels come first, at most 16: if they are last"),
    "many.npy": (saved(np.zeros((17, 8, 8), np.float32)), "channels come first, at most 16"),
    "vector.npy": (saved(np.zeros(4, np.float32)), "an image is"),
    "empty.npy": (saved(np.zeros((0, 4, 4), np.float32)), "an image is"),
    "complex.npy": (saved(np.zeros((1, 4, 4), np.complex64)), "complex64: save it as"),
    "int64.npy": (saved(np.zeros((1, 4, 4), np.int64)), "int64: save it as uint8, uint16"),
    "table.npy": (saved(np.zeros((1, 4), [("a", "<f4")])), "save it as"),
    "two.npz": (zipped(saved(np.zeros((1, 4, 4))), 2), "holds 2 arrays"),
    "cut.npz": (zipped(saved(np.zeros((1, 4, 4))))[:60], "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(BadImageError, match=message) as caught:
        open_data(tmp_path, value_range=(0, 1)).tensor()
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("range_of", [("float64", 0, 1), ("uint8", 0, 15), ("uint16", 0, 65536), ("uint16", 0.5, 3)])
def test_ranges_that_are_none(range_of: tuple[str, float, float]) -> None:
    with pytest.raises(ValueError, match="dtype of images|range of"):
        PixelRange(*range_of)


def test_more_ranges_that_are_none() -> None:
    for low, high in ((1, 1), (2, 1), (float("nan"), 1), (0, float("inf")), (1e6, 1e6 + 1), (10**400, 1), ("0", 1)):
        with pytest.raises(ValueError, match="range"):
            PixelRange("float32", low, high)  # type: ignore[arg-type]


def test_tensors_have_ranges_too() -> None:
    x, y = torch.from_numpy(F12), torch.tensor([0, 0, 1, 1])
    data = ImageData.from_tensors(x, y, ["a", "b"], value_range=(-20, 20))
    assert torch.equal(data.tensor(), x) and data.pixel_range == PixelRange("float32", -20, 20)
    assert open_data((torch.from_numpy(X16[:, None]), y)).pixel_range.dtype == "uint16"
    ends = np.float32(-20), torch.tensor(20.0)
    assert open_data((x, y), value_range=ends).pixel_range == data.pixel_range  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"value_range must be .low, high., got 5"):
        open_data((x, y), value_range=5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="NaN"):
        open_data((x * float("nan"), y))
    with pytest.raises(DataError, match="state value_range"), np.errstate(all="ignore"):
        open_data((x * 0, y))
    items = open_data([(x[i], int(y[i])) for i in range(4)], value_range=(-20, 20))
    assert torch.equal(items.tensor(), x)
    with pytest.raises(
        DataError, match="float32 from -20 to 20, the model takes float32 from 0 to 1.*value_range=model"
    ):
        as_image_data(data, (12, 6, 7), pixel_range=PixelRange("float32", 0, 1))
    with pytest.raises(DataError, match="has images of float32, the model takes uint8.*GLEM.fit"):
        as_image_data((x, y), (12, 6, 7))
    with pytest.raises(DataError, match=r"give images of 12 channels, opened with image_size=\(6, 7\)"):
        as_image_data((x[:, :1], y), (12, 6, 7), pixel_range=data.pixel_range)


def test_threads_read_headers_while_memory_is_collected(tmp_path: Path) -> None:
    """In Python 3.11 a parser that waits within a finaliser lets the parsers of other threads count wrong."""

    class Waits:
        def __del__(self) -> None:
            time.sleep(0)

    def read(index: int) -> Tensor:
        waits = Waits()
        waits.cycle = waits  # type: ignore[attr-defined]
        del waits
        return read_array(str(tmp_path / "a.npy"))

    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.float32))
    before, often = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20, 2, 2)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(read, range(2000)))) == 2000
    finally:
        gc.set_threshold(*before)
        sys.setswitchinterval(often)
