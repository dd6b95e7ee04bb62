"""Exports: the manifest, running one again, runs that were killed, and other people's files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked import on_ranks
from PIL import Image
from torchvision.datasets import ImageFolder

from glem_augment import GLEM, ImageData, SyntheticDataset
from glem_augment.checks import FORMATS
from glem_augment.data.classes import match_classes
from glem_augment.model.weights import WEIGHTS
from glem_augment.synthetic import export as _export
from glem_augment.synthetic.export import PROVENANCE, class_folders
from glem_augment.synthetic.latents import REAL_IMAGES

NAMES = ["Bag", "T-shirt/top", "Ankle boot"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glem_augment.synthetic.dataset.BLOCK", 4)


def make_model(seed: int = 0) -> GLEM:
    torch.manual_seed(seed)
    model = GLEM.create("mef_tiny", (1, 8, 8), NAMES, depth=[1, 1], blocks=[1, 1], width=[4, 4])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def make(model: GLEM | None = None, **options: Any) -> SyntheticDataset:
    return SyntheticDataset(model or make_model(), **{"per_class": 10, "seed": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    """Everything in the folder, hidden files as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PROVENANCE).read_text())


def counting(data: SyntheticDataset, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The blocks that are decoded from now on."""
    decoded, real = [], data.decoded_block

    def decode(cls: int, number: int) -> Any:
        decoded.append((cls, number))
        return real(cls, number)

    monkeypatch.setattr(data, "decoded_block", decode)
    return decoded


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    data = make(model, transform=np.asarray)
    folder = data.export(tmp_path / "out", progress=False, license="mit")
    manifest = manifest_of(folder)
    assert manifest["synthetic"] is True and manifest["complete"] is True and manifest["count"] == 30
    assert manifest["settings"] == data.settings() and manifest["settings"]["seed"] == 1
    assert manifest["license"] == "mit" and manifest["model"]["class_names"] == NAMES
    weights = (tmp_path / "model" / WEIGHTS).read_bytes()
    assert manifest["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    expected = [
        (name, first, min(4, 10 - first)) for name in ("Bag", "T-shirt_top", "Ankle boot") for first in (0, 4, 8)
    ]
    assert [(s["folder"], s["first"], s["count"]) for s in manifest["shards"]] == expected
    for shard in manifest["shards"]:
        numbers = range(shard["first"], shard["first"] + shard["count"])
        content = b"".join((folder / shard["folder"] / f"{i:06d}.png").read_bytes() for i in numbers)
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert len(files(folder)) == 32  # and nothing else
    assert json.loads((folder / "classes.json").read_text()) == {"Bag": 0, "T-shirt_top": 1, "Ankle boot": 2}
    opened = ImageFolder(folder)
    index = match_classes(model, opened)
    for path, target in opened.samples:
        item = int(Path(path).stem) + 10 * int(index[target])
        assert np.array_equal(np.asarray(Image.open(path)), data.images([item])[0, 0])


def test_running_it_again_checks_and_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make().export(tmp_path / "out", progress=False, license="mit")
    whole = files(folder)

    def again(expected: list[tuple[int, int]], **options: Any) -> None:
        data = make()
        decoded = counting(data, monkeypatch)
        data.export(folder, progress=False, **options)
        assert sorted(decoded) == sorted(expected) and files(folder) == whole  # with the licence that was stated once

    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    again([])
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}  # no image was written
    (folder / "Bag" / "000005.png").unlink()
    path = folder / "T-shirt_top" / "000009.png"
    path.write_bytes(path.read_bytes()[:-20])
    path = folder / "Ankle boot" / "000000.png"
    path.write_bytes(path.read_bytes()[:-20] + bytes([path.read_bytes()[-20] ^ 1]) + path.read_bytes()[-19:])
    again([(0, 1), (1, 2), (2, 0)])
    shutil.rmtree(folder / "Bag")
    again([(0, 0), (0, 1), (0, 2)], overwrite=True)
    (folder / "classes.json").write_text("{")
    shards = [{**shard, "sha256": ["?"]} for shard in manifest_of(folder)["shards"]]
    (folder / PROVENANCE).write_text(json.dumps(manifest_of(folder) | {"shards": shards}))
    again([(cls, number) for cls in range(3) for number in range(3)])
    make().export(folder, progress=False, license="cc0-1.0")
    assert manifest_of(folder)["license"] == "cc0-1.0"


def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 images in 9 blocks, and in 4 shards; a rank is killed, and another number of ranks goes on."""
    monkeypatch.setattr("glem_augment.synthetic.publish.MIN_SHARD", 8)
    monkeypatch.setattr(_export, "SAVE_SECONDS", 0.0)
    alone = make(min_confidence=0.34)
    whole = {form: files(alone.export(tmp_path / "alone" / form, form, progress=False)) for form in FORMATS}

    def export(form: str, blocks: int = 9) -> Any:
        data, drawn = make(min_confidence=0.34), itertools.count()
        decode = data.decoded_block

        def decoded_block(cls: int, number: int) -> Any:
            if next(drawn) == blocks and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(cls, number)

        data.decoded_block = decoded_block
        data.export(tmp_path / form, form, progress=False, distributed=True)
        return data.acceptance(), next(drawn)

    found = on_ranks(2, lambda: export("imagefolder"))
    assert found == [(alone.acceptance(), 5), (alone.acceptance(), 4)]
    lost, killed = on_ranks(2, lambda: export("webdataset", blocks=2))
    assert killed is None and "lost" in str(lost)
    assert [drawn for _, drawn in on_ranks(3, lambda: export("webdataset"))] == [0, 1, 1]
    for form in FORMATS:
        assert files(tmp_path / form) == whole[form]


def test_other_settings_are_never_mixed(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    before = files(folder)
    for options, words in (
        ({"seed": 2}, r"seed 1 \(not 2\)"),
        ({"per_class": 11}, r"count 30 \(not 33\)"),
        ({"model": make_model(1)}, "weights"),
        ({"min_confidence": 0.5}, r"min_confidence None \(not 0.5\)"),
    ):
        with pytest.raises(FileExistsError, match=f"other images.*{words}.*overwrite=True"):
            make(**options).export(folder, progress=False)
        assert files(folder) == before
    for key, value, word in (
        ("generator", "glem-augment 0.0", "generator"),
        ("classes", [*manifest_of(folder)["classes"], {"folder": "more", "count": 1}], "classes"),
        ("model", manifest_of(folder)["model"] | {"bits": 5}, "model"),
    ):
        (folder / PROVENANCE).write_text(json.dumps(manifest_of(folder) | {key: value}))
        with pytest.raises(FileExistsError, match=word):
            make().export(folder, progress=False)
        (folder / PROVENANCE).write_bytes(before[PROVENANCE])
    # The record of the training makes no image.
    model = make_model()
    model.config.training = {"note": "the same weights"}
    make(model).export(folder, progress=False)
    assert manifest_of(folder)["model"]["training"] == model.config.training


@pytest.mark.parametrize(
    "name", ["Bag/20240101.png", "Bag/000010.png", "Bag/0000001.png", "Bag/notes.txt", "more/000000.png"]
)
def test_files_of_others_are_never_touched(tmp_path: Path, name: str) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"mine")
    before = files(folder)
    for options, overwrite in itertools.product([{}, {"per_class": 20}], [False, True]):  # 20 would have an image 10
        with pytest.raises(FileExistsError, match=f"it holds '{name[:4]}.*which no export wrote"):
            make(**options).export(folder, progress=False, overwrite=overwrite)
        assert files(folder) == before


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    own = tmp_path / "out" / "Bag" / "000000.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"the user's own")
    with pytest.raises(FileExistsError, match="not empty, it holds no earlier export"):
        make().export(tmp_path / "out", progress=False, overwrite=True)
    with pytest.raises(FileExistsError, match="a file, not a folder"):
        make().export(own, progress=False)
    with pytest.raises(ValueError, match="'webdataset'; got 'wds'"):
        make().export(tmp_path / "new", format="wds")
    assert own.read_bytes() == b"the user's own" and not (tmp_path / "new").exists()
    # A link in place of a class folder is not followed.
    folder = make().export(tmp_path / "linked", progress=False)
    (folder / "Bag").rename(tmp_path / "mine")
    (folder / "Bag").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="holds 'Bag'"):
        make(seed=2).export(folder, progress=False, overwrite=True)
    assert len(list((tmp_path / "mine").iterdir())) == 10


def test_damaged_manifests_are_no_manifests(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    text = (folder / PROVENANCE).read_text()
    for changed in (
        "[" * 100_000,
        text.replace('"settings"', '"settings_"'),
        text.replace('"model": {', '"model": 5, "others": {'),
        text.replace('"folder": "Bag"', '"folder": "../Bag"'),
        text.replace('"count": 10', '"count": "10"'),
        json.dumps({**json.loads(text), "shards": [1, None]}),
    ):
        assert changed != text
        (folder / PROVENANCE).write_text(changed)
        damaged = files(folder)
        with pytest.raises(FileExistsError, match="holds no earlier export"):
            make().export(folder, progress=False, overwrite=True)
        assert files(folder) == damaged


@pytest.mark.parametrize("point", ["removal", "images"])
def test_a_smaller_export_cut_off_while_it_overwrites(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that is, it is known afterwards whose the images of the larger one are, and none of them is left."""
    fresh = files(make(per_class=[5, 0, 5], seed=2).export(tmp_path / "fresh", progress=False))
    folder = make().export(tmp_path / "out", progress=False)
    data = make(per_class=[5, 0, 5], seed=2)

    def cut(*arguments: Any) -> None:
        if point == "removal":
            (arguments[0] / "000000.png").unlink()
        raise KeyboardInterrupt

    owner, name = (shutil, "rmtree") if point == "removal" else (data, "decoded_block")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, cut)
        data.export(folder, progress=False, overwrite=True)
    make(per_class=[5, 0, 5], seed=2).export(folder, progress=False, overwrite=point != "images")
    assert files(folder) == fresh and not (folder / "T-shirt_top").exists()


def test_images_that_are_not_plausible_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = GLEM.create("identity", (1, 8, 8), NAMES).eval().requires_grad_(False)
    model.gaussians.mu.copy_(torch.tensor([0.0, 3e38, 0.0])[:, None])
    folder = make(model, temperature=0.1).export(tmp_path / "out", progress=False)
    manifest = manifest_of(folder)
    assert manifest["images_implausible"] == 10 and "10 of 30 images are not plausible" in caplog.text
    (folder / "T-shirt_top" / "000005.png").unlink()
    data = make(model, temperature=0.1)
    data.images(range(12))  # some of it has been looked at before
    assert data.implausible == 4  # of the block that was decoded
    data.export(folder, progress=False)
    assert manifest_of(folder) == manifest


def test_settings_can_be_written_down(tmp_path: Path) -> None:
    model = make_model()
    x, y = torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 2
    real = ImageData.from_tensors(x, y, NAMES)
    model.fit_modes(real, rank=1)
    options: dict[str, Any] = {"min_confidence": np.float32(0.1), "modes": np.int64(1), "per_class": np.int64(2)}
    data = make(model, source="mixup", real=real, **options)
    settings = manifest_of(data.export(tmp_path / "out", progress=False))["settings"]
    assert settings["modes"] == 1 and settings["oracle"] == "posterior"
    # The hash is of the images, not of latents, whose last bits are the machine's.
    others = (ImageData.from_tensors(255 - x, y, NAMES), ImageData.from_tensors(x, [0, 1, 2, 0, 2, 1], NAMES))
    hashes = [make(model, source="mixup", real=other).settings()[REAL_IMAGES] for other in others]
    assert len({settings[REAL_IMAGES], *hashes}) == 3


def test_class_folders() -> None:
    assert class_folders(["n01440764", "n02102040"], ["tench", "spaniel"]) == ["n01440764", "n02102040"]
    assert class_folders(["0", "1"], ["0", "1"]) == ["0", "1"]
    assert class_folders(["0", "1"], ["T-shirt/top", "Dress"]) == ["T-shirt_top", "Dress"]
    assert class_folders(["a/b", "../x", "ok"], ["a/b", "-../x", "fine"]) == ["a_b", "x", "ok"]
    assert class_folders(["a/b", "A_b", "???"], ["a/b", "A_b", "???"]) == ["0_a_b", "1_A_b", "2_class_2"]
    assert class_folders(*2 * [["cat", "Cat", "cat_0"]]) == ["0_cat", "1_Cat", "2_cat_0"]
    assert class_folders([".hidden", "x" * 300], [".hidden", "long"]) == ["hidden", "long"]
    for names in (NAMES, ["a/b c", "Ünï/code", "x:y*z"]):
        ids = [str(i) for i in range(len(names))]
        folders = class_folders(ids, names)
        assert match_classes(SimpleNamespace(class_ids=ids, classes=names), folders).tolist() == list(range(len(names)))
