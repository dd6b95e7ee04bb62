"""Exports: the record, running one again, exports that were killed, shards, and other people's files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import tiny_model
from PIL import Image
from test_ranks import on_ranks
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image
from walk import files_passed, returns

from glem_augment import GLEM, SyntheticDataset, open_data
from glem_augment.cli import main
from glem_augment.errors import DataError
from glem_augment.images.sources import PROVENANCE
from glem_augment.model.files import WEIGHTS
from glem_augment.names import FORMATS
from glem_augment.synthetic.export import class_folders, export_set

NAMES = ["Bag", "T-shirt/top", "Ankle boot"]


def make_model(seed: int = 0) -> GLEM:
    return tiny_model(shape=(1, 8, 8), classes=NAMES, seed=seed, width=[4, 4])


def make(model: GLEM | None = None, **options: Any) -> SyntheticDataset:
    return SyntheticDataset(model or make_model(), **{"per_class": 10, "seed": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    """Everything in the folder, hidden files as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PROVENANCE).read_text())


def counting(data: SyntheticDataset, stop: int | None = None) -> list[tuple[int, int]]:
    """The blocks that are drawn from now on; an interrupt comes instead of number `stop`."""
    drawn, real = [], data.draws.draw

    def draw(cls: int, number: int) -> Any:
        if len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.append((cls, number))
        return real(cls, number)

    data.draws.draw = draw  # type: ignore[method-assign]
    return drawn


def test_an_export_is_an_image_folder_with_a_record(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    data = make(model, transform=np.asarray, temperature=0.3)
    folder = data.export(tmp_path / "out", license="mit")
    manifest, readme = manifest_of(folder), (folder / "README.md").read_text()
    assert manifest["synthetic"] is True and manifest["complete"] is True and manifest["count"] == 30
    assert manifest["settings"] == data.draws.settings and manifest["settings"]["seed"] == 1
    assert manifest["license"] == "mit" and "license: mit\n" in readme and "temperature 0.3" in readme
    assert manifest["model"]["class_names"] == NAMES and "finish" not in manifest
    weights = hashlib.sha256((tmp_path / "model" / WEIGHTS).read_bytes()).hexdigest()
    assert manifest["weights_sha256"] == weights and weights in readme
    names = {f"{name}/{i:06d}.png" for name in ("Bag", "T-shirt_top", "Ankle boot") for i in range(10)}
    assert files(folder).keys() == {*names, PROVENANCE, "classes.json", "README.md"}
    assert json.loads((folder / "classes.json").read_text()) == {"Bag": 0, "T-shirt_top": 1, "Ankle boot": 2}
    opened = ImageFolder(folder)
    index = [["Bag", "T-shirt_top", "Ankle boot"].index(name) for name in opened.classes]
    for path, target in opened.samples:
        item = int(Path(path).stem) + 10 * index[target]
        assert np.array_equal(np.asarray(Image.open(path)), data.images([item])[0, 0])


def test_the_same_export_again_writes_what_is_missing(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out", license="mit")
    whole = files(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    for missing, drawn in (
        ([], []),
        (["Bag/000005.png", "T-shirt_top/000009.png", "classes.json"], [(0, 0), (1, 1)]),
    ):
        for name in missing:
            (folder / name).unlink()
        data = make()
        blocks = counting(data)
        data.export(folder)
        assert sorted(blocks) == drawn and files(folder) == whole  # with the licence that was stated once
    (folder / "Bag/000005.png").write_bytes(b"")  # as a power cut may leave it
    assert files(make().export(folder)) == whole
    kept = [path for path, time in times.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == 20  # the blocks that had no gap


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_did_not_finish_is_refused(tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glem_augment.synthetic.export.SHARD_BLOCKS", 2)
    whole, data, again = make().export(tmp_path / "whole", form), make(), make()
    counting(data, stop=4)
    with pytest.raises(KeyboardInterrupt):
        data.export(tmp_path / "out", form)
    with pytest.raises(DataError, match=str(tmp_path / "out")):
        open_data(tmp_path / "out")
    blocks = counting(again)
    again.export(tmp_path / "out", form)
    assert len(blocks) == 2 and files(tmp_path / "out") == files(whole)


def export_share(folder: Path, form: Any, stop: int = 9) -> int:
    """Export the blocks of this rank, and count them; rank 1 is killed at number `stop`."""
    data, drawn = make(), itertools.count()
    draw = data.draws.draw

    def counted(cls: int, number: int) -> Any:
        if next(drawn) == stop and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(cls, number)

    data.draws.draw = counted  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glem_augment.synthetic.export.SHARD_BLOCKS", 2)
        export_set(data.draws, folder / form, form, shared=True)
    return next(drawn)


def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 images in 6 blocks, and in 3 shards; a rank is killed, and another number of ranks goes on."""
    monkeypatch.setattr("glem_augment.synthetic.export.SHARD_BLOCKS", 2)
    assert on_ranks(2, tmp_path / "a", export_share, tmp_path, "webdataset") == [4, 2]
    lost, killed = on_ranks(2, tmp_path / "b", export_share, tmp_path, "imagefolder", 2)
    assert killed is None and "lost" in str(lost)
    assert on_ranks(3, tmp_path / "c", export_share, tmp_path, "imagefolder") == [0, 0, 1]
    for form in FORMATS:
        assert files(tmp_path / form) == files(make().export(tmp_path / "alone" / form, form))


def test_another_set_in_the_same_folder_is_one_error(tmp_path: Path) -> None:
    folder = make().export(tmp_path / "out")
    before = files(folder)
    for options, named in (
        ({"seed": 2}, r"seed 1 \(not 2\)"),
        ({"per_class": 11}, "30"),
        ({"model": make_model(1)}, "weights"),
    ):
        with pytest.raises(FileExistsError, match=named):
            make(**options).export(folder)
        assert files(folder) == before
    (folder / PROVENANCE).write_text(json.dumps(manifest_of(folder) | {"generator": "glem-augment 0.0"}))
    with pytest.raises(FileExistsError, match="generator"):
        make().export(folder)


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    own = tmp_path / "out" / "Bag" / "000000.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"the user's own")
    for target in (tmp_path / "out", own):
        with pytest.raises(FileExistsError, match=str(target)):
            make().export(target)
    for text in ("[" * 100_000, "[]", '{"settings": 1}', "null"):
        (tmp_path / "out" / PROVENANCE).write_text(text)
        with pytest.raises(FileExistsError):
            make().export(tmp_path / "out")
        with pytest.raises(DataError, match=f"{PROVENANCE} is damaged"):
            open_data(tmp_path / "out")
    with pytest.raises(ValueError, match="'wds'"):
        make().export(tmp_path / "new", format="wds")  # type: ignore[arg-type]
    assert own.read_bytes() == b"the user's own" and not (tmp_path / "new").exists()


def test_shards_need_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match="pip install"):
        make().export(tmp_path / "out", "webdataset")
    monkeypatch.undo()
    folder = make().export(tmp_path / "out", "webdataset")
    with pytest.raises(DataError, match="shards"):
        open_data(folder)


def test_many_images_out_of_range_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = GLEM.create("identity", (1, 8, 8), NAMES).eval().requires_grad_(False)
    model.gaussians.mu.copy_(torch.tensor([0.0, 3e38, 0.0])[:, None])
    make(model, temperature=0.1).export(tmp_path / "out")
    assert "10 of 30 images" in caplog.text


def test_glem_generate_passes_few_files(tmp_path: Path) -> None:
    """A reader can follow `glem generate` with balance; flows/ and classes/ are not counted."""
    data = open_data("bundled:fashion-mnist")
    for row in (*range(0, 1000, 50), 1):  # two images of each class, and one more
        folder = tmp_path / "real" / str(data.targets[row])
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(data[row][0]).save(folder / f"{row}.png")
    generate = f"generate bundled:fashion-mnist --per-class balance --real {tmp_path / 'real'}"
    argv = [*generate.split(), "--out", str(tmp_path / "out")]
    passed, _ = files_passed(lambda: main(argv), leave_out=("flows/", "classes/"))
    assert len(set(passed)) <= 24 and len(returns(passed)) <= 39, (set(passed), returns(passed))


def test_class_folders() -> None:
    assert class_folders(["n01440764", "n02102040"], ["tench", "spaniel"]) == ["n01440764", "n02102040"]
    assert class_folders(["0", "1"], ["0", "1"]) == ["0", "1"]
    assert class_folders(["a/b", "../x", "ok"], ["a/b", "-../x", "fine"]) == ["a_b", "x", "ok"]
    assert class_folders(["a/b", "A_b", "???"], ["a/b", "A_b", "???"]) == ["0_a_b", "1_A_b", "2_class_2"]
    assert class_folders(*2 * [["cat", "Cat", "cat_0"]]) == ["0_cat", "1_Cat", "2_cat_0"]
    assert class_folders([".hidden", "x" * 300], [".hidden", "long"]) == ["hidden", "long"]
