"""Synthetic sets as shards with a card, in a folder and as a data set on the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import test_hub
import torch
from hub_server import HubServer
from huggingface_hub import DatasetCard
from test_hub import Pushed, tiny_model

from glem_augment import GLEM, SyntheticDataset
from glem_augment.evaluation import quality_report, train_network
from glem_augment.images.dataset import ImageData
from glem_augment.model.weights import WEIGHTS

PROVENANCE = "glem-provenance.json"
server, pushed = test_hub.server, test_hub.pushed  # fixtures


def push(dataset: SyntheticDataset, server: HubServer, report: Path | None = None) -> dict[str, bytes]:
    commit = dataset.push_to_hub("org/images", license="mit", report=report)
    return server.repo("org/images", "dataset").commits[commit.oid]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_data_set_is_pushed_as_shards(pushed: Pushed, tmp_path: Path) -> None:
    server, model, commit = pushed
    loaded = GLEM.from_pretrained("org/flow")
    dataset = SyntheticDataset(loaded, per_class={"cat": 3, "ant": 2}, temperature=0.5, seed=4)
    tree = push(dataset, server)
    folder = dataset.export(tmp_path / "org" / "images", "webdataset", progress=False, license="mit")
    same = {name: tree.get(name) for name in files(folder) if name != "README.md"}
    assert tree.keys() == {*files(folder), ".gitattributes"} and same.items() <= files(folder).items()
    origin = json.loads(tree[PROVENANCE])
    assert origin["synthetic"] is True and origin["settings"]["temperature"] == 0.5 and origin["settings"]["seed"] == 4
    assert origin["loaded_from"] == f"org/flow@{commit}"
    weights = server.repo("org/flow").commits[commit][WEIGHTS]
    assert origin["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    card = DatasetCard(tree["README.md"].decode())
    # `datasets` reads these fields.
    data = card.data.to_dict()
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.tar"}]
    names = {"class_label": {"names": {"0": "cat", "1": "dog", "2": "ant"}}}
    features = [{"name": "png", "dtype": "image"}, {"name": "cls", "dtype": names}]
    assert data["dataset_info"]["features"][:2] == features
    assert {"synthetic", "glem-augment"} <= set(card.data.tags) and card.data.license == "mit"
    assert "These images are synthetic" in card.text and f"org/flow@{commit}" in card.text
    # What an earlier push left in data/ goes, such as further shards. Files that are not part of the data stay.
    mine = {"data-notes/a.txt": b"mine", "database.txt": b"mine"}
    server.put(
        "org/images", {**mine, "data/train-00001-of-00002.tar": b"", "data/train/cat/000000.png": b""}, "dataset"
    )
    now = push(SyntheticDataset(model, per_class=1), server)
    assert now.keys() == {*tree, *mine} and mine.items() <= now.items()
    # A model that was changed is no longer the one on the Hub.
    loaded.gaussians.mu.add_(0.1)
    assert json.loads(push(SyntheticDataset(loaded, per_class=1), server)[PROVENANCE])["loaded_from"] is None


def test_the_card_shows_the_report_of_the_images(server: HubServer, tmp_path: Path) -> None:
    model = tiny_model()
    x, y = torch.randint(0, 255, (90, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 30
    train, test = (ImageData.from_tensors(images, y[:45], model.classes) for images in x.split(45))
    network, dataset = train_network([], 1, 1, 3), SyntheticDataset(model, per_class=5)
    found = quality_report(dataset, train, test, tmp_path, network, progress=False)
    tree = push(dataset, server, tmp_path)
    assert tree["report.png"] == (tmp_path / "report.png").read_bytes()
    assert json.loads(tree[PROVENANCE])["quality"] == found == json.loads((tmp_path / "report.json").read_text())
    card = tree["README.md"].decode()
    for words in (
        f"| FID | {found['fid']:.3g} |",
        "(copies: near 0)",
        "15 synthetic, 45 real, 45 held-out",
        "report.png",
    ):
        assert words in card
    quality_report(dataset, train, None, tmp_path, network, progress=False)
    assert "copies: near 0" not in push(dataset, server, tmp_path)["README.md"].decode()


def test_the_card_tells_mixtures_of_real_images_from_draws(tmp_path: Path) -> None:
    model = tiny_model(data="private/large")
    x, y = torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), [0, 1, 2] * 2
    real = ImageData.from_tensors(x, y, model.classes, name="somewhere/photos")
    model.fit_modes(real, rank=1)
    drawn, mixed = SyntheticDataset(model, 2), SyntheticDataset(model, 2, source="mixup", real=real)
    folders = [data.export(tmp_path / data.source, "webdataset", progress=False) for data in (drawn, mixed)]
    cards = [(folder / "README.md").read_text() for folder in folders]
    assert all("| the model was trained on | large |" in card for card in cards)
    assert ["derive from real images (photos) and from" in card for card in cards] == [False, True]
    assert "not stated; samples inherit" in json.loads((folders[1] / PROVENANCE).read_text())["license"]
