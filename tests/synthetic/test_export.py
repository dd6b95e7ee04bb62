"""Exports: the manifest, running one again, runs that were killed, shards, and other people's files."""

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
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from forked import on_ranks
from model_cases import tiny_model
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image
from walk import files_passed, returns

from glem_augment import GLEM, DataError, ImageData, RealAndSynthetic, SyntheticDataset, open_data
from glem_augment.checks import FORMATS
from glem_augment.cli import main
from glem_augment.images.matching import match_classes
from glem_augment.images.sources import PROVENANCE
from glem_augment.model.weights import WEIGHTS
from glem_augment.synthetic.export import class_folders
from glem_augment.synthetic.sampler import REAL_IMAGES

NAMES = ["Bag", "T-shirt/top", "Ankle boot"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glem_augment.synthetic.dataset.BLOCK", 4)


def make_model(seed: int = 0) -> GLEM:
    return tiny_model(shape=(1, 8, 8), classes=NAMES, seed=seed, width=[4, 4])


def make(model: GLEM | None = None, **options: Any) -> SyntheticDataset:
    return SyntheticDataset(model or make_model(), **{"per_class": 10, "seed": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    """Everything in the folder, hidden files as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PROVENANCE).read_text())


def counting(data: SyntheticDataset, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The blocks that are drawn from now on."""
    drawn, real = [], data.draw

    def draw(cls: int, number: int) -> Any:
        drawn.append((cls, number))
        return real(cls, number)

    monkeypatch.setattr(data, "draw", draw)
    return drawn


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    data = make(model, transform=np.asarray, temperature=0.3)
    folder = data.export(tmp_path / "out", progress=False, license="mit")
    manifest = manifest_of(folder)
    assert manifest["synthetic"] is True and manifest["complete"] is True and manifest["count"] == 30
    assert manifest["settings"] == data.plan.settings and manifest["settings"]["seed"] == 1
    assert manifest["license"] == "mit" and manifest["model"]["class_names"] == NAMES
    assert "finish" not in manifest
    weights = (tmp_path / "model" / WEIGHTS).read_bytes()
    assert manifest["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    names = [f"{name}/{i:06d}.png" for name in ("Bag", "T-shirt_top", "Ankle boot") for i in range(10)]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    assert (folder / "checksums.sha256").read_text().splitlines() == sums
    assert len(files(folder)) == 33  # and nothing else
    assert json.loads((folder / "classes.json").read_text()) == {"Bag": 0, "T-shirt_top": 1, "Ankle boot": 2}
    opened = ImageFolder(folder)
    index = match_classes(model, opened)
    for path, target in opened.samples:
        item = int(Path(path).stem) + 10 * int(index[target])
        assert np.array_equal(np.asarray(Image.open(path)), data.images([item])[0, 0])


def test_running_it_again_writes_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make().export(tmp_path / "out", progress=False, license="mit")
    whole = files(folder)

    def again(expected: list[tuple[int, int]], **options: Any) -> None:
        data = make()
        drawn = counting(data, monkeypatch)
        data.export(folder, progress=False, **options)
        assert sorted(drawn) == sorted(expected) and files(folder) == whole  # with the licence that was stated once

    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    again([])
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}  # no image was written
    (folder / "Bag" / "000005.png").unlink()
    (folder / "T-shirt_top" / "000009.png").write_bytes(b"")  # as a power cut may leave it
    again([(0, 1), (1, 2)])
    shutil.rmtree(folder / "Bag")
    (folder / "classes.json").write_text("{")
    again([(0, 0), (0, 1), (0, 2)], overwrite=True)
    (folder / "checksums.sha256").unlink()
    again([])
    make().export(folder, progress=False, license="cc0-1.0")
    assert manifest_of(folder)["license"] == "cc0-1.0"


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_did_not_finish_is_refused(tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, drawn = make(), itertools.count()
    draw = data.draw

    def stopping(*block: int) -> Any:
        if next(drawn) == 5:
            raise KeyboardInterrupt
        return draw(*block)

    monkeypatch.setattr(data, "draw", stopping)
    with pytest.raises(KeyboardInterrupt):
        data.export(tmp_path / "out", form, progress=False)
    real = ImageData.from_tensors(data.images(range(30)), data.targets, NAMES)
    for use in (open_data, lambda folder: RealAndSynthetic(real, folder), lambda f: open_data(f, unlabelled=True)):
        with pytest.raises(DataError, match=f"SyntheticDataset to {tmp_path / 'out'}"):
            use(tmp_path / "out")
    again = make()
    blocks = counting(again, monkeypatch)
    again.export(tmp_path / "out", form, progress=False)
    assert len(blocks) == 4 and files(tmp_path / "out") == files(make().export(tmp_path / "b" / "out", form))


def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 images in 9 blocks, and in 4 shards; a rank is killed, and another number of ranks goes on."""
    monkeypatch.setattr("glem_augment.synthetic.export.MIN_SHARD", 8)
    whole = {form: files(make().export(tmp_path / "alone" / form, form, progress=False)) for form in FORMATS}

    def export(form: Any, blocks: int = 9) -> int:
        data, drawn = make(), itertools.count()
        draw = data.draw

        def counted(cls: int, number: int) -> Any:
            if next(drawn) == blocks and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(cls, number)

        data.draw = counted
        data.export(tmp_path / form, form, progress=False, distributed=True)
        return next(drawn)

    assert on_ranks(2, lambda: export("imagefolder")) == [5, 4]
    lost, killed = on_ranks(2, lambda: export("webdataset", blocks=2))
    assert killed is None and "lost" in str(lost)
    assert on_ranks(3, lambda: export("webdataset")) == [0, 1, 1]
    for form in FORMATS:
        assert files(tmp_path / form) == whole[form]


def test_other_settings_are_never_mixed(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    before = files(folder)
    for options, words in (
        ({"seed": 2}, r"seed 1 \(not 2\)"),
        ({"per_class": 11}, r"count 30 \(not 33\)"),
        ({"model": make_model(1)}, "weights"),
    ):
        with pytest.raises(FileExistsError, match=f"{words}.*overwrite=True"):
            make(**options).export(folder, progress=False)
        assert files(folder) == before
    for key, value, word in (
        ("generator", "glem-augment 0.0", "generator"),
        ("classes", [*manifest_of(folder)["classes"], {"folder": "more", "count": 1, "index": 3}], "classes"),
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


@pytest.mark.parametrize(
    "name", ["Bag/20240101.png", "Bag/000010.png", "Bag/0000001.png", "Bag/notes.txt", "more/000000.png"]
)
def test_files_of_others_are_never_touched(tmp_path: Path, name: str) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"mine")
    before = files(folder)
    for options, overwrite in itertools.product([{}, {"per_class": 20}], [False, True]):  # 20 would have an image 10
        with pytest.raises(FileExistsError, match=f"'{name[:4]}"):
            make(**options).export(folder, progress=False, overwrite=overwrite)
        assert files(folder) == before


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    own = tmp_path / "out" / "Bag" / "000000.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"the user's own")
    for target in (tmp_path / "out", own):
        with pytest.raises(FileExistsError):
            make().export(target, progress=False, overwrite=True)
    with pytest.raises(ValueError, match="'wds'"):
        make().export(tmp_path / "new", format="wds")
    assert own.read_bytes() == b"the user's own" and not (tmp_path / "new").exists()
    # A link in place of a class folder is not followed.
    folder = make().export(tmp_path / "linked", progress=False)
    (folder / "Bag").rename(tmp_path / "mine")
    (folder / "Bag").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        make(seed=2).export(folder, progress=False, overwrite=True)
    assert len(list((tmp_path / "mine").iterdir())) == 10


def test_damaged_manifests_are_no_manifests(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", progress=False)
    text = (folder / PROVENANCE).read_text()
    for changed in (
        "[" * 100_000,
        text.replace('"settings"', '"settings_"'),
        text.replace('"folder": "Bag"', '"folder": "../Bag"'),
        text.replace('"count": 10', '"count": "10"'),
        text.replace('"complete": true', '"complete": 1'),
    ):
        assert changed != text
        (folder / PROVENANCE).write_text(changed)
        damaged = files(folder)
        with pytest.raises(FileExistsError):
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

    owner, name = (shutil, "rmtree") if point == "removal" else (data, "draw")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, cut)
        data.export(folder, progress=False, overwrite=True)
    make(per_class=[5, 0, 5], seed=2).export(folder, progress=False, overwrite=point != "images")
    assert files(folder) == fresh and not (folder / "T-shirt_top").exists()


def test_many_images_out_of_range_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = GLEM.create("identity", (1, 8, 8), NAMES).eval().requires_grad_(False)
    model.gaussians.mu.copy_(torch.tensor([0.0, 3e38, 0.0])[:, None])
    make(model, temperature=0.1).export(tmp_path / "out", progress=False)
    assert "10 of 30 images are out of range" in caplog.text


def test_settings_can_be_written_down(tmp_path: Path) -> None:
    model = make_model()
    x, y = torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 2
    real = ImageData.from_tensors(x, y, NAMES)
    model.fit_modes(real, rank=1)
    options: dict[str, Any] = {"alpha": np.float32(0.5), "modes": np.int64(1), "per_class": np.int64(2)}
    data = make(model, source="mixup", real=real, **options)
    settings = manifest_of(data.export(tmp_path / "out", progress=False))["settings"]
    assert settings["modes"] == 1 and settings["alpha"] == 0.5
    plain = make(model, temperature=np.float32(0.5)).plan.settings
    assert json.loads(json.dumps(plain))["temperature"] == 0.5
    for source, options in (("rfcm", {"modes": 1}), ("gaussian", {"alpha": 1.0}), ("mixup", {"temperature": 1.0})):
        with pytest.raises(ValueError, match=f"takes no {min(options)}"):
            make(model, source=source, real=real, **options)
    # The hash is of the images, not of latents, whose last bits are the machine's.
    others = (ImageData.from_tensors(255 - x, y, NAMES), ImageData.from_tensors(x, [0, 1, 2, 0, 2, 1], NAMES))
    hashes = [make(model, source="mixup", real=other).plan.settings[REAL_IMAGES] for other in others]
    assert len({settings[REAL_IMAGES], *hashes}) == 3


def test_shards_replace_an_earlier_export_and_leave_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(folder: Path, seed: int = 1, **options: Any) -> dict[str, bytes]:
        return files(make(seed=seed).export(folder, "webdataset", progress=False, **options))

    folder = tmp_path / "out"
    before = export(folder)
    with pytest.raises(DataError, match="holds shards"):
        open_data(folder)
    (folder / "data" / "train-00007-of-00009.tar").write_bytes(b"of a larger export")
    (folder / "data" / "val-00000.tar").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        export(folder, seed=2)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="tar: no space"):
        patch.setattr("tarfile.TarFile.addfile", Mock(side_effect=full))
        export(folder, seed=2, overwrite=True)
    with monkeypatch.context() as patch:  # the images were all made
        patch.setattr(SyntheticDataset, "draw", None)
        left = export(folder, seed=2)
        assert export(folder, seed=2) == left
    assert left == {**export(tmp_path / "b" / "out", seed=2), "data/val-00000.tar": b"mine"}
    assert left != before
    (folder / "data" / "val-00000.tar").unlink()
    make(seed=2).export(folder, progress=False, overwrite=True)  # an ImageFolder would count data/ as a class
    assert len(open_data(folder)) == len(make(seed=2)) and not (folder / "data").exists()


def test_glem_generate_passes_few_files(tmp_path: Path) -> None:
    """A reader can follow `glem generate` with balance and mixup; flows/ and classes/ are not counted."""
    data = open_data("bundled:fashion-mnist")
    for row in (*range(0, 1000, 50), 1):  # two images of each class, and one more
        folder = tmp_path / "real" / str(data.targets[row])
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(data[row][0]).save(folder / f"{row}.png")
    generate = f"generate bundled:fashion-mnist --per-class balance --source mixup --real {tmp_path / 'real'} --quiet"
    argv = [*generate.split(), "--out", str(tmp_path / "out")]
    passed, _ = files_passed(lambda: main(argv), leave_out=("flows/", "classes/"))
    assert len(set(passed)) <= 23 and len(returns(passed)) <= 30, (set(passed), returns(passed))


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
