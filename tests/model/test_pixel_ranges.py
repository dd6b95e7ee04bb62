"""Images of 16 bits, of floats and of many channels, from the files to the model, its moves and its samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import TINY
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from glem_augment import GLEM, GLEMAugment, RealAndSynthetic, SyntheticDataset, open_data
from glem_augment.cli import main
from glem_augment.codec.levels import Levels, Values, draw_noise
from glem_augment.codec.pixel_range import PixelRange
from glem_augment.errors import DataError, ModelFileError
from glem_augment.evaluation.metrics import evaluate
from glem_augment.evaluation.preview import preview
from glem_augment.images.dataset import ImageData
from glem_augment.model.config import GLEMConfig
from glem_augment.model.files import CONFIG
from glem_augment.privacy import Privacy
from glem_augment.training import TrainConfig, Trainer

SIDE = 12
RANGES = {
    "grey16": None,
    "float12": (-1000.0, 1000.0),
    "int2": (-400, 400),
}


def arrays(bundled: ImageData, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """60 images [N,C,H,W] of three kinds of clothes, and their labels."""
    rows = np.flatnonzero(np.isin(bundled.targets, (1, 5, 8)))[::5]
    x, y = bundled.subset(rows).tensor()[:, :, 2:26:2, 2:26:2].numpy(), bundled.targets[rows]
    if kind == "grey16":  # all of the 16 bits are used
        noise = np.random.default_rng(0).integers(0, 257, x.shape)
        return (x.astype(np.int64) * 256 + noise).clip(0, 65535).astype(np.uint16), y
    gy, gx = np.gradient(x.astype(np.float32), axis=(2, 3))
    if kind == "float12":
        out = np.concatenate([x.astype(np.float32), gy, gx, gx * gy / 600] * 3, 1) * np.float32(3.1) - 50
        out[:, :, 0, 0] = 7  # a pixel that never varies
        return out, y
    return np.concatenate([gx, gy], 1).astype(np.int16), y


@pytest.fixture(scope="module")
def root(bundled_train: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind an ImageFolder, with a file per image."""
    root = tmp_path_factory.mktemp("arrays")
    for kind in RANGES:
        for i, (image, label) in enumerate(zip(*arrays(bundled_train, kind), strict=True)):
            folder = root / kind / bundled_train.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "grey16":
                Image.fromarray(image[0]).save(folder / f"{i}.png")
            else:
                np.save(folder / f"{i}.npy", image)
    return root


def opened(root: Path, kind: str) -> ImageData:
    return open_data(root / kind, value_range=RANGES[kind])


@pytest.mark.parametrize("kind", RANGES)
def test_from_files_to_moves_samples_and_files(root: Path, kind: str, tmp_path: Path) -> None:
    data = opened(root, kind)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    GLEM.fit(data, rank=8).save(tmp_path / "model")
    model = GLEM.from_pretrained(tmp_path / "model")
    assert model.pixel_range == data.pixel_range and f"{len(x[0])}x{SIDE}x{SIDE}" in repr(model)
    # An image comes back: levels exactly, floats up to their rounding.
    back = model.pixel_range.from_floats(model.decode(model.encode(x)[0]))
    assert back.dtype == x.dtype
    assert torch.equal(back, x) or (kind == "float12" and torch.allclose(back, x, atol=1e-3, rtol=0))
    found = evaluate(model, data, round_trip=8)
    assert found["accuracy"] > 0.9 and found["round_trip"]["max_error"] < 1e-3 and found["bits"] == 8 * x.itemsize
    # Moves keep dtype, layout and range, and images that are not selected.
    aug = GLEMAugment(model, "noise", p=0.5, seed=0)
    before, memory = x.clone(), x.contiguous(memory_format=torch.channels_last)
    out, labels = aug(memory, y)
    same = (out == x).flatten(1).all(1)
    assert out.dtype == x.dtype and out.stride() == memory.stride() and labels is y and torch.equal(x, before)
    assert abs(int(same.sum()) - len(x) // 2) <= 1 and aug.stats["rejected"] == 0
    low, high = model.pixel_range.low, model.pixel_range.high
    assert float(out.double().min()) >= low and float(out.double().max()) <= high
    moved = (out[~same].double() - x[~same].double()).abs().mean() / (high - low)
    assert 1e-4 < float(moved) < 0.3
    # Samples, their files, and real images beside them.
    made = SyntheticDataset(model, per_class=3, seed=1)
    drawn = made.images(range(9))
    assert drawn.dtype == x.dtype and torch.equal(made[4][0], drawn[4]) and made[4][1] == 1
    made.preload()
    assert torch.equal(made.images([8, 0]), drawn[[8, 0]])
    made.export(tmp_path / "made")
    assert {path.suffix for path in (tmp_path / "made").glob("*/*")} == {".png" if kind == "grey16" else ".npy"}
    again = open_data(tmp_path / "made")  # the export has stored the range
    assert torch.equal(again.tensor(), drawn) and again.pixel_range == model.pixel_range
    for real, synthetic in ((data, again), (root / kind, made)):
        both = RealAndSynthetic(real, synthetic)
        assert torch.equal(both[len(x)][0], drawn[0]) and torch.equal(torch.as_tensor(both[1][0]), x[1])
    with pytest.raises(DataError, match=data.pixel_range.dtype):
        made.export(tmp_path / "shards", "webdataset")
    assert preview(model, data, rows=2).width > 0


@pytest.mark.parametrize("kind", ["grey16", "float12"])
def test_a_flow_on_such_images_is_a_bijection_with_exact_densities(root: Path, kind: str) -> None:
    data = opened(root, kind)
    x = data.tensor()[:4]
    model = GLEM.create("mef_tiny", data.image_shape, data.classes, pixel_range=data.pixel_range, **TINY).eval()
    model.flow.initialise(model.numbers(x))
    assert float(model.round_trip_error(x).max()) < 0.02 and model.adapt(data).modes is not None
    # log p(x) = log p(h) + log |dh/dx|, with dh/dx one over the number of levels, or over the width of the range.
    h, (z, logdet) = model.numbers(x), model.encode(x)
    width = 65536 if kind == "grey16" else 2000
    want = model.flow(h)[1].double() - math.log(width) * model.dim
    assert torch.allclose(logdet.double(), want, rtol=1e-6)
    assert z.shape == (4, model.dim)


def test_noise_stays_within_its_level_of_16_bits() -> None:
    codec = Levels((1, 1, 65536), pixel_range=PixelRange("int16", -(2**15), 2**15 - 1))
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, 1, 1, -1)
    for noise in (None, 3, torch.Generator().manual_seed(0), draw_noise(x, torch.Generator().manual_seed(1))):
        h = codec.encode(x, noise)
        assert torch.equal(((h.double() + 0.5) * 65536).floor() - 2**15, x.double())
        assert -0.5 <= float(h.min()) and float(h.max()) < 0.5
    u = (codec.encode(x, 3).double() + 0.5) * 65536 % 1
    assert abs(float(u.mean()) - 0.5) < 0.01 and abs(float(u.var()) - 1 / 12) < 0.005
    floats = torch.arange(65536).view(1, 1, 1, -1) / 65535  # the same images as floats in [0, 1]
    assert torch.equal(codec.encode(floats.float(), 3), codec.encode(x, 3))
    assert torch.allclose(codec.decode(codec.encode(x)), floats.float(), atol=1e-6)
    few = Levels((1, 1, 3), pixel_range=PixelRange("uint16", 100, 4000))
    values = torch.tensor([100, 2000, 4000], dtype=torch.int32).to(torch.uint16).view(1, 1, 1, 3)
    assert few.pixel_range.from_floats(few.decode(few.encode(values))).tolist() == values.tolist()
    assert few.logdet() == pytest.approx(-3 * math.log(3901))
    exact = Values((1, 1, 3), PixelRange("float32", -2, 6))
    v = torch.tensor([-2.0, 0.5, 6.0]).view(1, 1, 1, 3)
    assert exact.encode(v, 1).flatten().tolist() == [-0.5, -0.1875, 0.5] and torch.equal(
        exact.decode(exact.encode(v)), v
    )


def test_other_images_are_refused(root: Path) -> None:
    data = opened(root, "float12")
    model, x, y = GLEM.fit(data, rank=4), data.tensor(), torch.from_numpy(data.targets)
    aug = GLEMAugment(model, "noise")
    for call, named in (
        (lambda: model.encode((x * 255).to(torch.uint8)), "uint8"),
        (lambda: aug(x * 2, y), "1000"),
        (lambda: aug(x[:, :, :10].permute(0, 2, 3, 1), y), "permute"),
        (lambda: GLEM.fit(root / "grey16", flow=model), "uint16"),
        (lambda: GLEM.fit(root / "int2"), "value_range"),
        (lambda: GLEM.fit(data, autoencoder="taef2"), "autoencoder"),
        (lambda: GLEM.fit(data, "taef2", privacy=Privacy(1.0)), "private"),
        (lambda: Trainer(data, TrainConfig(), root / "run"), "training"),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            call()
    normalised = GLEMAugment(model, "noise", p=1.0, mean=-50.0, std=200.0, seed=0)((x + 50) / 200, y)[0]
    assert torch.allclose(normalised * 200 - 50, GLEMAugment(model, "noise", p=1.0, seed=0)(x, y)[0], atol=0.05)


def test_images_of_another_scale_are_refused_or_named(root: Path, tmp_path: Path) -> None:
    data = open_data(root / "float12", value_range=RANGES["float12"])
    model, x, y = GLEM.fit(data, rank=4), data.tensor()[:16], torch.from_numpy(data.targets[:16])
    for other in ((x + 1000) / 2000, (x - x.mean()) / x.std()):
        aug = GLEMAugment(model, "noise", p=1.0, classes=data)
        with pytest.raises(ValueError, match=r"the first 16 images lie .*-1000 to 1000.*before any normalisation"):
            aug(other, y)
        for image, label in zip(other[:7], y, strict=False):  # too few to tell
            aug(image[None], label[None])
        with pytest.raises(ValueError, match="the first 8 images"):
            aug(other[7:8], y[7:8])
        aug(x, y)
    (folder := tmp_path / "cat").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 4096, (8, 8)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    cut_off = ImageFolder(str(tmp_path), v2.PILToTensor())
    with pytest.warns(UserWarning) as said:
        data = open_data(cut_off)
    assert [word in str(w.message) for w, word in zip(said, ("cuts their", "fewer bits"), strict=True)] == [True] * 2
    assert int(cut_off[0][0].max()) == 255 < int(data[0][0].numpy().max())
    with pytest.warns(UserWarning, match="cuts their values off at 255"):
        GLEMAugment(GLEM.fit(data, rank=2), "noise").wrap(DataLoader(Subset(cut_off, [0, 1])))


def test_hostile_ranges_are_refused(root: Path, tmp_path: Path) -> None:
    GLEM.fit(opened(root, "grey16"), rank=2).save(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["pixel_range"] == {"dtype": "uint16", "low": 0, "high": 65535}
    for given in (
        ["uint16", 0, 65535],
        {"dtype": "__class__", "low": 0, "high": 1},
        {"dtype": "float32", "low": 0, "high": 10**400},
        {"dtype": "float32", "low": 0, "high": 1},  # bits are 16
    ):
        (tmp_path / CONFIG).write_text(json.dumps(values | {"pixel_range": given}))
        with pytest.raises(ModelFileError):
            GLEM.from_pretrained(tmp_path)


def test_8_bit_models_have_no_range_in_their_file() -> None:
    config = GLEM.create("identity", (3, 8, 8), ["a"]).config
    assert "pixel_range" not in config.to_dict() and GLEMConfig.from_json(config.to_json()).pixel_range == PixelRange()
    with pytest.raises(ModelFileError, match="pixel_range"):
        facts = {"name": "taef2", "sha256": "", "image_shape": [3, 8, 8]}
        replace(config, autoencoder=facts, pixel_range=PixelRange("uint16", 0, 65535), bits=16)


def test_the_commands(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, made = str(tmp_path / "model"), str(tmp_path / "made")
    assert main(["fit", str(root / "float12"), "--out", model, "--value-range", "-1000", "1000"]) == 0
    assert main(["info", model, "--json"]) == 0
    assert '"pixel_range": "float32 from -1000 to 1000"' in capsys.readouterr().out
    assert main(["generate", model, "--per-class", "2", "--out", made]) == 0
    assert len(list(Path(made).glob("*/*.npy"))) == 6
    assert main(["fit", str(root / "int2"), "--out", model + "2"]) == 2
    assert "--value-range" in capsys.readouterr().err
