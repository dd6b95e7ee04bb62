"""Publishing synthetic images: a data set on the Hub for `datasets.load_dataset`, or WebDataset shards in a folder.

On the Hub they are an image folder (`data/train/<class>/NNNNNN.png` with `metadata.jsonl`). It takes at most 10,000
files in a folder and 25,000 in a commit. Shards (`data/train-*.tar`) have no such limit; they get a card too, so that
their folder can be uploaded as it is.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData
from tqdm import tqdm

from glem_augment.errors import DataError
from glem_augment.hub.cards import CardFacts, data_name, escape, licence_of, trained_on
from glem_augment.hub.files import LIBRARY
from glem_augment.hub.upload import upload, write_card
from glem_augment.io import atomic_write, lock_folder, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.export import (
    CLASS_FILE,
    PROVENANCE,
    InLabelOrder,
    as_png,
    export_imagefolder,
    licence_note,
    naming,
    provenance,
    read_manifest,
    stated_licence,
)

# Limits of the Hub for one commit, and for one folder of a repository.
MAX_FILES, MAX_FILES_IN_FOLDER = 25_000, 10_000
# A loader gives each worker whole shards, and surplus workers nothing. So there are many shards, of at least 32 images.
MAX_SHARDS, MIN_SHARD = 64, 32
_BLOCK = 1_000  # images decoded at a time
# A description of the shards for timm's reader. The Hub's loaders read *.tar alone.
_SHARDS_INFO = "data/_info.json"
_UNFINISHED = ".glem-unfinished"  # the folder inside an export in which its files are made


def push_dataset(
    dataset: InLabelOrder,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    license_name: str | None = None,
    license_link: str | None = None,
    commit_message: str | None = None,
    **target: Any,
) -> CommitInfo:
    """Upload all images of `dataset` with a data card, in one commit that removes what an earlier push left in `data/`.

    Args:
        dataset: its classes become the names of the column `label`, in index order.
        repo_id: `org/name` of a data set, which is made if it does not exist.
        license, license_name, license_link: of the images that the flow was trained on, whose licence the samples
            inherit; an identifier of the Hub. By default the one in the flow's record; where there is none either, the
            card says that it is unknown, with a warning.
        commit_message: by default one that gives the number of images.
        target: `private`, `token` and `revision`, see `hub.upload.upload`.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        DataError: more images than the Hub takes as single files. OSError: no space for temporary files.
    """
    if max(dataset.counts) > MAX_FILES_IN_FOLDER or len(dataset) > MAX_FILES - 100:  # there are a few other files
        raise DataError(
            f"{len(dataset)} images are more than the Hub takes as single files: export them with format='webdataset', "
            f"and upload that folder (hf upload {repo_id} FOLDER --repo-type dataset)"
        )
    facts = CardFacts(license, license_name, license_link)
    message = commit_message or f"Upload {len(dataset)} synthetic images with {LIBRARY}"
    return upload(
        repo_id,
        "dataset",
        lambda name, folder: write_dataset(dataset, folder, name, facts, "imagefolder"),
        message,
        replace="data/*",
        **target,
    )


def write_dataset(
    dataset: InLabelOrder, folder: Path, repo_id: str, facts: CardFacts, layout: str, progress: bool = True
) -> None:
    """Write a data set of the Hub to an empty folder: images with their labels, provenance, card."""
    facts = replace(facts, license=stated_licence(facts.license, dataset))
    write = _write_imagefolder if layout == "imagefolder" else _write_shards
    written = write(dataset, folder, progress)
    # The model's config is left out: it may name private folders.
    manifest = {key: value for key, value in written.items() if key != "model"} | {
        "format": layout,
        "loaded_from": _origin(dataset.model),
        "license": licence_note(facts.license_name or facts.license, dataset),
    }
    write_json(folder / PROVENANCE, manifest)
    write_card(_card(dataset, repo_id, facts, manifest), folder)


def _origin(model: GLEM) -> str | None:
    """`org/name@commit`, if the model is still as it was loaded from there."""
    if model.origin is None or model.origin_file is None or not model.origin_file.is_file():
        return None
    unchanged = hashlib.sha256(model.origin_file.read_bytes()).hexdigest() == weights_sha256(model)
    return model.origin if unchanged else None


# ---- images ------------------------------------------------------------------------------------------------------


def _write_imagefolder(dataset: InLabelOrder, folder: Path, progress: bool) -> dict[str, Any]:
    """Export the images, and add the table of labels that `datasets` reads. Returns the manifest of the export."""
    images = folder / "data" / "train"
    export_imagefolder(dataset, images, progress=progress)
    manifest = json.loads((images / PROVENANCE).read_text(encoding="utf-8"))
    (images / PROVENANCE).unlink()
    (images / CLASS_FILE).unlink()
    index = itertools.count()
    with atomic_write(images / "metadata.jsonl", "w") as file:
        for label, entry in enumerate(manifest["classes"]):
            for i in range(entry["count"]):
                row = {"file_name": f"{entry['folder']}/{i:06d}.png", "label": label, "index": next(index)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return manifest


def _write_shards(dataset: InLabelOrder, folder: Path, progress: bool) -> dict[str, Any]:
    """Write image i to shard i mod S, so that every shard holds every class. Returns the manifest."""
    count = min(MAX_SHARDS, -(-len(dataset) // MIN_SHARD))
    data = folder / "data"
    paths = [data / f"train-{i:05d}-of-{count:05d}.tar" for i in range(count)]
    data.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(dataset), unit="image", desc="export", disable=not progress)
    with bar, naming(data), ExitStack() as stack:
        shards = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
        for start in range(0, len(dataset), _BLOCK):
            indices = range(start, min(len(dataset), start + _BLOCK))
            for index, image in zip(indices, dataset.images(indices), strict=True):
                shard = shards[index % count]
                _add_file(shard, f"{index:08d}.png", as_png(image))
                _add_file(shard, f"{index:08d}.cls", str(dataset.targets[index]).encode())
                bar.update()
    split = {
        "name": "train",
        "num_samples": len(dataset),
        "filenames": [path.name for path in paths],
        "shard_lengths": [len(range(i, len(dataset), count)) for i in range(count)],
    }
    write_json(folder / _SHARDS_INFO, {"splits": {"train": split}})
    return {**provenance(dataset), "complete": True, "images_not_finite": dataset.non_finite}


def _add_file(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without a time, so that the same images give the same shards
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


# ---- shards in a folder ------------------------------------------------------------------------------------------


def export_shards(
    dataset: InLabelOrder,
    folder: Path,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002
    progress: bool = True,
) -> Path:
    """Write WebDataset shards, card and provenance to `folder`. They appear there together, once all are finished."""
    check_shards_folder(folder, overwrite)
    unfinished = folder / _UNFINISHED
    with lock_folder(folder):
        shutil.rmtree(unfinished, ignore_errors=True)  # an earlier export may have been killed
        try:
            write_dataset(dataset, unfinished, folder.resolve().name, CardFacts(license), "webdataset", progress)
            for path in folder.glob("data/train-*-of-*.tar"):  # of an earlier export
                path.unlink()
            (folder / "data").mkdir(exist_ok=True)
            for path in sorted(unfinished.rglob("*.*")):  # the provenance comes last
                os.replace(path, folder / path.relative_to(unfinished))
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def check_shards_folder(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `folder` is new, empty, or holds shards that `overwrite` allows to replace."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    if not folder.exists() or all(path.name in (_UNFINISHED, ".lock") for path in folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty: give another folder, or --overwrite")
    if (read_manifest(folder / PROVENANCE) or {}).get("format") != "webdataset":
        raise FileExistsError(f"{folder} holds no earlier export of shards and is left alone: give another folder")


# ---- the card ----------------------------------------------------------------------------------------------------


def _card(dataset: InLabelOrder, repo_id: str, facts: CardFacts, manifest: dict[str, Any]) -> DatasetCard:
    """The card; its metadata tell `datasets` where the images are and what the classes are called."""
    as_folder = manifest["format"] == "imagefolder"
    image, label = columns = ("image", "label") if as_folder else ("png", "cls")
    names = {str(i): name for i, name in enumerate(dataset.classes)}
    features: list[dict[str, Any]] = [
        {"name": image, "dtype": "image"},
        {"name": label, "dtype": {"class_label": {"names": names}}},
    ]
    path = "data/train/**" if as_folder else "data/train-*.tar"
    config: dict[str, Any] = {"config_name": "default", "data_files": [{"split": "train", "path": path}]}
    if as_folder:
        features.append({"name": "index", "dtype": "int64"})
        # If there is a metadata file, `datasets` takes the names of the classes from here alone.
        config["features"] = copy.deepcopy(features)  # the same list twice would become a YAML alias
    else:
        features += [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
    data = DatasetCardData(
        **facts.licence(),
        annotations_creators=["machine-generated"],
        task_categories=["image-classification"],
        tags=["synthetic", LIBRARY],
        dataset_info={"features": features},
        configs=[config],
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_body(dataset, repo_id, facts, columns, manifest)}")


def _body(
    dataset: InLabelOrder, repo_id: str, facts: CardFacts, columns: tuple[str, str], manifest: dict[str, Any]
) -> str:
    c, h, w = dataset.image_shape
    loaded = f"`{manifest['loaded_from']}` on the Hub" if manifest["loaded_from"] else "a local model"
    made = "drawn from a class-conditional normalizing flow. None is a photograph, and none should be taken for one."
    derived = "Samples derive"
    if dataset.source == "mixup":
        made = "made by a class-conditional normalizing flow: each is a real image, moved part of the way to another."
        real = escape(data_name(dataset.real_name)) if dataset.real_name else "not recorded"
        derived = f"Mixtures derive from real images ({real}) and"
    settings = "\n".join(f"| {key} | {escape(value)} |" for key, value in manifest["settings"].items())
    return f"""# {escape(repo_id)}

**These images are synthetic.** {len(dataset):,} images, {c}x{h}x{w} (channels x height x width), of
{len(dataset.classes)} classes, {made}
They are for training image classifiers together with real images; measure on real ones only.

```python
from datasets import load_dataset

data = load_dataset("{repo_id}", split="train")
image, label = data[0]["{columns[0]}"], data[0]["{columns[1]}"]
```

## How they were made

| | |
|---|---|
| generator | {manifest["generator"]} |
| flow | {loaded}, weights with SHA-256 `{manifest["weights_sha256"]}` |
| the flow was trained on | {trained_on(dataset.model.config.training)} |
| images whose values were not finite and were replaced | {manifest["images_not_finite"]} |
{settings}

With these settings of `SyntheticDataset`, the same flow, version and kind of machine, they can be drawn again.

## Licence

{derived} from the images that the flow was trained on, and inherit their licence. {licence_of(facts)}

## Limits

The labels are the classes that the flow was asked for; a person would call some of the images something else. They
repeat the biases and gaps of the training images, and may resemble single ones.
"""
