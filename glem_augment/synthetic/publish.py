"""Publishing synthetic images: a data set on the Hub for `datasets.load_dataset`, or WebDataset shards in a folder.

On the Hub they are an image folder (`data/train/<class>/NNNNNN.png` with `metadata.jsonl`). It takes at most 10,000
files in a folder and 25,000 in a commit. Shards (`data/train-*.tar`) have no such limit; they get a card too, so that
their folder can be uploaded as it is.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import shutil
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData
from tqdm import tqdm

from glem_augment.errors import DataError
from glem_augment.hub.cards import CardFacts, data_name, escape, licence_of, trained_on
from glem_augment.hub.files import LIBRARY
from glem_augment.hub.upload import upload, write_card
from glem_augment.io import atomic_write, expand, file_sha256, lock_folder, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.export import (
    CLASS_FILE,
    PROVENANCE,
    InLabelOrder,
    export_imagefolder,
    holds_same,
    licence_note,
    provenance,
    read_manifest,
    stated_licence,
)

# Limits of the Hub for one commit, and for one folder of a repository.
MAX_FILES, MAX_FILES_IN_FOLDER = 25_000, 10_000
# A loader gives each worker whole shards, and surplus workers nothing. So there are many shards, of at least 32 images.
MAX_SHARDS, MIN_SHARD = 64, 32
# A description of the shards for timm's reader. The Hub's loaders read *.tar alone.
_SHARDS_INFO = "data/_info.json"
# Keys of a report of `evaluation.quality_report`, and words for people.
_REPORTED = {
    "fid": "FID",
    "coverage": "coverage",
    "density": "density",
    "label_reliability": "share of images that a classifier of real images gives their class",
    "network_accuracy": "the same of held-out real images",
    "ratio": "distance to the nearest training image, over that to the nearest held-out one (copies: near 0)",
}
_UNFINISHED = ".glem-unfinished"  # the folder inside an export in which its files are made


def push_dataset(
    dataset: InLabelOrder,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    license_name: str | None = None,
    license_link: str | None = None,
    report: str | os.PathLike[str] | None = None,
    **target: Any,
) -> CommitInfo:
    """Upload all images of `dataset` with a data card, in one commit that removes what an earlier push left in `data/`.

    Args:
        dataset: its classes become the names of the column `label`, in index order.
        repo_id: `org/name` of a data set, which is made if it does not exist.
        license, license_name, license_link: of the images that the flow was trained on, whose licence the samples
            inherit; an identifier of the Hub. By default the one in the flow's record; where there is none either, the
            card says that it is unknown, with a warning.
        report: a folder that `evaluation.quality_report` wrote, for the card.
        target: `commit_message`, `private`, `token` and `revision`, see `hub.upload.upload`.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        DataError: more images than the Hub takes as single files. OSError: no space for temporary files.
    """
    if max(dataset.counts) > MAX_FILES_IN_FOLDER or len(dataset) > MAX_FILES - 100:  # there are a few other files
        raise DataError(
            f"{len(dataset)} images are more than the Hub takes as single files: export them with format='webdataset', "
            f"and upload that folder (hf upload {repo_id} FOLDER --repo-type dataset)"
        )
    facts = CardFacts(license, license_name, license_link, report=report)
    return upload(
        repo_id,
        "dataset",
        lambda name, folder: write_dataset(dataset, folder, name, facts, "imagefolder"),
        replace="data/*",
        **target,
    )


def write_dataset(
    dataset: InLabelOrder, folder: Path, repo_id: str, facts: CardFacts, layout: str, progress: bool = True
) -> None:
    """Write a data set of the Hub to an empty folder: images with their labels, provenance, card."""
    facts = replace(facts, license=stated_licence(facts.license, dataset))
    quality = facts.report and json.loads((expand(facts.report) / "report.json").read_text(encoding="utf-8"))
    write = _write_imagefolder if layout == "imagefolder" else _write_shards
    written = write(dataset, folder, progress)
    if dataset.rank:
        return
    # The model's config is left out: it may name private folders.
    manifest = {key: value for key, value in written.items() if key != "model"} | {
        "format": layout,
        "loaded_from": _origin(dataset.model),
        "license": licence_note(facts.license_name or facts.license, dataset),
    }
    if facts.report is not None:
        manifest["quality"] = quality
        shutil.copy(expand(facts.report) / "report.png", folder)
    write_json(folder / PROVENANCE, manifest)
    write_card(_card(dataset, repo_id, facts, manifest), folder)


def _origin(model: GLEM) -> str | None:
    """`org/name@commit`, if the model is still as it was loaded from there."""
    if model.origin is None or model.origin_file is None:
        return None
    return model.origin if file_sha256(model.origin_file) == weights_sha256(model) else None


# ---- images ------------------------------------------------------------------------------------------------------


def _write_imagefolder(dataset: InLabelOrder, folder: Path, progress: bool) -> dict[str, Any]:
    """Export the images, and add the table of labels that `datasets` reads. Returns the manifest of the export."""
    images = folder / "data" / "train"
    manifest = export_imagefolder(dataset, images, progress=progress)
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
    """Write image i to shard i mod S, so that every shard holds every class. Returns the manifest.

    Each shard has images of nearly all blocks. So the images are made first, as an ImageFolder in folder/images.
    """
    images, data = folder / "images", folder / "data"
    if dataset.rank == 0:
        shutil.rmtree(data, ignore_errors=True)  # from a run that was killed, perhaps of other images
    manifest = export_imagefolder(dataset, images, overwrite=True, progress=progress)
    folders = [entry["folder"] for entry in manifest["classes"]]
    paths = [
        images / folders[label] / f"{i:06d}.png"
        for label in dict.fromkeys(dataset.targets)
        for i in range(dataset.counts[label])
    ]
    names = shard_names(dataset)
    count = len(names)
    for number in tqdm(range(dataset.rank, count, dataset.ranks), unit="shard", desc="pack", disable=not progress):
        with atomic_write(data / names[number]) as file, tarfile.open(fileobj=file, mode="w") as shard:
            for index in range(number, len(paths), count):
                _add_file(shard, f"{index:08d}.png", paths[index].read_bytes())
                _add_file(shard, f"{index:08d}.cls", str(dataset.targets[index]).encode())
    split = {
        "name": "train",
        "num_samples": len(dataset),
        "filenames": names,
        "shard_lengths": [len(range(i, len(dataset), count)) for i in range(count)],
    }
    if dataset.rank == 0:
        write_json(folder / _SHARDS_INFO, {"splits": {"train": split}})
    dataset.gather(None)
    return {key: value for key, value in manifest.items() if key != "shards"}


def shard_names(dataset: InLabelOrder) -> list[str]:
    count = min(MAX_SHARDS, -(-len(dataset) // MIN_SHARD))
    return [f"train-{i:05d}-of-{count:05d}.tar" for i in range(count)]


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
) -> None:
    """Write WebDataset shards, card and provenance to `folder`. They appear there together, once all are finished."""
    unfinished = folder / _UNFINISHED
    with lock_folder(folder) if dataset.rank == 0 else nullcontext():
        finished = dataset.rank == 0 and _is_finished(dataset, folder, overwrite, license)
        if not dataset.gather(finished)[0]:
            write_dataset(dataset, unfinished, folder.resolve().name, CardFacts(license), "webdataset", progress)
            if dataset.rank == 0:
                # A run that is killed from here on goes on without a manifest, and thus without `overwrite`.
                (folder / PROVENANCE).unlink(missing_ok=True)
                for path in folder.glob("data/train-*-of-*.tar"):  # of an earlier export
                    path.unlink()
                (folder / "data").mkdir(exist_ok=True)
                for path in [*unfinished.glob("data/*"), unfinished / "README.md", unfinished / PROVENANCE]:
                    os.replace(path, folder / path.relative_to(unfinished))
        if dataset.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    dataset.gather(None)


def _is_finished(dataset: InLabelOrder, folder: Path, overwrite: bool, license: str | None) -> bool:  # noqa: A002
    """Whether all shards of these images are there. FileExistsError if there are others, unless overwrite."""
    new, old = provenance(dataset), check_shards_folder(folder)
    if old is None or not holds_same(folder, old | {"model": new["model"]}, new, overwrite):
        return False
    same_licence = license is None or license == old.get("license")
    return same_licence and all((folder / "data" / name).is_file() for name in shard_names(dataset))


def check_shards_folder(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier export of shards; None if the folder is missing, empty or has only an unfinished one.

    Raises:
        FileExistsError: the folder holds anything else. NotADirectoryError: it is a file.
    """
    old = read_manifest(folder / PROVENANCE) or {}
    if old.get("format") == "webdataset":
        return old
    there = {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()
    if there and not (_UNFINISHED in there and there <= {_UNFINISHED, "data", "README.md"}):
        raise FileExistsError(
            f"{folder} is not empty, it holds no earlier export of shards, the only thing that overwrite=True "
            "(--overwrite) replaces: give another folder"
        )
    return None


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


def _quality(report: dict[str, Any]) -> str:
    """The section on a report of `evaluation.quality_report`."""
    found = report | (report["memorisation"] or {})
    rows = "\n".join(f"| {words} | {found[key]:.3g} |" for key, words in _REPORTED.items() if key in found)
    images = ", ".join(f"{count} {name.replace('_', '-')}" for name, count in report["images"].items())
    return f"""
## Quality

| | |
|---|---|
{rows}

Measured on {images} images; features of {escape(report["features"])}.

![Synthetic images beside the nearest real ones](report.png)
"""


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
{_quality(manifest["quality"]) if "quality" in manifest else ""}
## Licence

{derived} from the images that the flow was trained on, and inherit their licence. {licence_of(facts)}

## Limits

The labels are the classes that the flow was asked for; a person would call some of the images something else. They
repeat the biases and gaps of the training images, and may resemble single ones.
"""
