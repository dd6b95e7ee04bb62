"""Publishing synthetic images: a data set on the Hub that `datasets.load_dataset` reads, with a card that says how it
was made; and the same layout in WebDataset shards as an export to a folder.

Small sets are an image folder (`data/train/<class>/NNNNNN.png` with `metadata.jsonl`). The Hub takes at most 10,000
files in a folder and 25,000 in a commit, so larger ones are WebDataset shards (`data/train-*.tar`).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData
from tqdm import tqdm

from glem_augment.checks import check_choice
from glem_augment.errors import DataError
from glem_augment.hub.cards import GENERATED, CardFacts, data_name, escape, trained_on
from glem_augment.hub.files import LIBRARY
from glem_augment.hub.upload import CARD, commit_folder, open_repository, warn_without_licence, write_card
from glem_augment.io import atomic_write, lock_folder, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.export import (
    PROVENANCE,
    ImageSet,
    as_png,
    check_space,
    class_folders,
    export_imagefolder,
    licence_note,
    naming,
    provenance,
    read_manifest,
)
from glem_augment.synthetic.latents import REAL_IMAGES

__all__ = ["FORMATS", "check_shards_folder", "export_shards", "push_dataset", "write_dataset"]

FORMATS = ("imagefolder", "webdataset")
# Limits of the Hub for one commit, and for one folder of a repository.
MAX_FILES, MAX_FILES_IN_FOLDER = 25_000, 10_000
# A loader gives each worker whole shards, and surplus workers nothing. So there are many shards, of at least 32 images.
MAX_SHARDS, MIN_SHARD = 64, 32
_BLOCK = 1_000  # images decoded at a time
# A description of the shards for timm's reader. The Hub's loaders read *.tar alone.
_SHARDS_INFO = "data/_info.json"
_MAX_CLASSES = 200  # listed on the card


def push_dataset(
    dataset: ImageSet,
    repo_id: str,
    *,
    format: str | None = None,  # noqa: A002  (the word users expect)
    license: str | None = None,  # noqa: A002  (the Hub's word)
    license_name: str | None = None,
    license_link: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload all images of `dataset` with a data card, in one commit.

    Files that an earlier push left under `data/` are removed in the same commit. Transforms are not applied.

    Args:
        dataset: its classes become the names of the column `label` (`cls` in shards), in index order.
        repo_id: `org/name` of a data set, which is made if it does not exist.
        format: "imagefolder" or "webdataset"; None chooses by the number of images.
        license, license_name, license_link: of the images that the flow was trained on, whose licence the samples
            inherit; an identifier of the Hub. Without it there is a warning, and the card says that it is unknown.
        commit_message, private, token, revision, create_pr: as in `GLEM.push_to_hub`.

    Returns:
        huggingface_hub's `CommitInfo`; `load_dataset(repo_id, revision=info.oid)` reads these very images.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        DataError: too many images for the format. ValueError: another format, or a flow of neither 1 nor 3 channels.
        OSError: no space for the temporary files.
    """
    format = _format(dataset, format)
    facts = CardFacts(license, license_name, license_link)
    warn_without_licence(facts, repo_id)
    target: dict[str, Any] = dict(token=token, revision=revision, create_pr=create_pr)
    # First, because drawing the images may take hours, and a missing permission should show before.
    repo_id = open_repository(repo_id, "dataset", private=private, **target)
    with tempfile.TemporaryDirectory(prefix="glem-push-") as name:
        write_dataset(dataset, Path(name), repo_id, facts, format)
        message = commit_message or f"Upload {len(dataset)} synthetic images with glem-augment"
        return commit_folder(repo_id, "dataset", Path(name), message, **target, replace="data/*")


def write_dataset(
    dataset: ImageSet,
    folder: Path,
    repo_id: str,
    facts: CardFacts,
    format: str,  # noqa: A002
    progress: bool = True,
) -> None:
    """Write what a push would upload to an empty folder: images with their labels, provenance, card."""
    write = _write_imagefolder if format == "imagefolder" else _write_shards
    written = write(dataset, folder, progress)
    # The model's config is left out: it may name private folders.
    manifest = {key: value for key, value in written.items() if key != "model"} | {
        "format": format,
        "loaded_from": _origin(dataset.model),
        "license": licence_note(facts.license_name or facts.license, dataset.source),
    }
    write_json(folder / PROVENANCE, manifest)
    write_card(_card(dataset, repo_id, facts, manifest), folder)


def _format(dataset: ImageSet, format: str | None) -> str:  # noqa: A002
    if dataset.image_shape[0] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, this flow {dataset.image_shape[0]}")
    most = max(dataset.counts)
    # There are a few other files beside the images.
    fits = most <= MAX_FILES_IN_FOLDER and len(dataset) <= MAX_FILES - 100
    if format is None:
        return "imagefolder" if fits else "webdataset"
    check_choice("format", format, FORMATS)
    if format == "imagefolder" and not fits:
        raise DataError(
            f"{len(dataset)} images, {most} of one class, are more than the Hub takes as single files "
            f"({MAX_FILES}, {MAX_FILES_IN_FOLDER} in a folder): use format='webdataset'"
        )
    return format


def _origin(model: GLEM) -> str | None:
    """`org/name@commit`, if the model is still as it was loaded from there."""
    if model.origin is None or model.origin_file is None or not model.origin_file.is_file():
        return None
    unchanged = hashlib.sha256(model.origin_file.read_bytes()).hexdigest() == weights_sha256(model)
    return model.origin if unchanged else None


# ---- images ------------------------------------------------------------------------------------------------------


def _write_imagefolder(dataset: ImageSet, folder: Path, progress: bool) -> dict[str, Any]:
    """Export the images, and add the table of labels that `datasets` reads. Returns the manifest of the export."""
    images = folder / "data" / "train"
    export_imagefolder(dataset, images, progress=progress)
    manifest = json.loads((images / PROVENANCE).read_text(encoding="utf-8"))
    (images / PROVENANCE).unlink()
    names = [
        (label, f"{entry['folder']}/{i:06d}.png")
        for label, entry in enumerate(manifest["classes"])
        for i in range(entry["count"])
    ]
    with atomic_write(images / "metadata.jsonl", "w") as file:
        for index, (label, name) in enumerate(names):
            row = {"file_name": name, "label": label, "index": index}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return manifest


def _write_shards(dataset: ImageSet, folder: Path, progress: bool) -> dict[str, Any]:
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
    asked = provenance(dataset, class_folders(dataset.class_ids, dataset.classes))
    return {**asked, "complete": True, "images_not_finite": dataset.non_finite}


def _add_file(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without a time, so that the same images give the same shards
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


# ---- shards in a folder ------------------------------------------------------------------------------------------


def export_shards(
    dataset: ImageSet,
    folder: Path,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002
    progress: bool = True,
) -> Path:
    """Write WebDataset shards, card and provenance to `folder`, which appears in one step at the end.

    Raises:
        FileExistsError: see `check_shards_folder`.
    """
    folder = check_shards_folder(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.partial")
    with naming(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, len(dataset), dataset.image_shape, archive=True)
    with lock_folder(partial):
        new, old = partial / "new", partial / "old"
        for leftover in (new, old):  # of an export that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            write_dataset(dataset, new, folder.name, CardFacts(license), "webdataset", progress)
            if folder.exists():
                check_shards_folder(folder, overwrite)  # somebody may have put files there in the meantime
                os.replace(folder, old)
            os.replace(new, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def check_shards_folder(folder: Path, overwrite: bool) -> Path:
    """Return `folder` as an absolute path if `export_shards` can write to it.

    Raises:
        FileExistsError: it is not empty, unless `overwrite` is given and it holds an export of shards and nothing else.
        OSError: it is a mount point, which no other folder can replace.
    """
    folder = Path(os.path.realpath(folder))  # a link keeps pointing to the folder
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    if os.path.ismount(folder):
        raise OSError(f"{folder} is a mount point, and shards replace a folder in one step: give a new folder in it")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty: give another folder, or --overwrite")
    if (read_manifest(folder / PROVENANCE) or {}).get("format") != "webdataset":
        raise FileExistsError(f"{folder} holds no earlier export of shards and is left alone: give another folder")
    for path in sorted(folder.rglob("*")):
        if not _is_of_export(path, path.relative_to(folder).as_posix()):
            raise FileExistsError(
                f"{folder} holds {path.relative_to(folder).as_posix()!r}, which is not of an earlier export: move it "
                "away, or give another folder"
            )
    return folder


def _is_of_export(path: Path, name: str) -> bool:
    if name == CARD:  # without the last line it is somebody's own
        return GENERATED in path.read_text(encoding="utf-8", errors="replace")
    return (
        name in (PROVENANCE, "data", _SHARDS_INFO) or re.fullmatch(r"data/train-\d{5}-of-\d{5}\.tar", name) is not None
    )


# ---- the card ----------------------------------------------------------------------------------------------------


def _card(dataset: ImageSet, repo_id: str, facts: CardFacts, manifest: dict[str, Any]) -> DatasetCard:
    """The card; its metadata tell `datasets` where the images are and what the classes are called."""
    as_folder = manifest["format"] == "imagefolder"
    image, label = ("image", "label") if as_folder else ("png", "cls")
    names = {str(i): name for i, name in enumerate(dataset.classes)}
    features: list[dict[str, Any]] = [
        {"name": image, "dtype": "image"},
        {"name": label, "dtype": {"class_label": {"names": names}}},
    ]
    config: dict[str, Any] = {"config_name": "default"}
    if as_folder:
        features.append({"name": "index", "dtype": "int64"})
        config["data_files"] = [{"split": "train", "path": "data/train/**"}]
        # If there is a metadata file, `datasets` takes the names of the classes from here alone.
        config["features"] = copy.deepcopy(features)  # the same list twice would become a YAML alias
    else:
        features += [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
        config["data_files"] = [{"split": "train", "path": "data/train-*.tar"}]
    edges = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    data = DatasetCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        pretty_name=repo_id.split("/")[-1],
        annotations_creators=["machine-generated"],
        task_categories=["image-classification"],
        size_categories=[next((name for edge, name in edges if len(dataset) < edge), "n>10M")],
        tags=["synthetic", LIBRARY],
        dataset_info={"features": features},
        configs=[config],
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_body(dataset, repo_id, facts, (image, label), manifest)}")


def _body(dataset: ImageSet, repo_id: str, facts: CardFacts, columns: tuple[str, str], manifest: dict[str, Any]) -> str:
    c, h, w = dataset.image_shape
    settings = manifest["settings"]
    loaded = f"`{manifest['loaded_from']}` on the Hub" if manifest["loaded_from"] else "a local model"
    licence = facts.license_name or facts.license
    stated = f"as the publisher states: {licence}" if licence else "**not stated: ask its author before you use it**"
    if settings["source"] == "mixup":
        made = (
            "made by a class-conditional normalizing flow: each is a real image, moved part of the way towards another "
            "one of its class. Many are close to the real image that they began with."
        )
        specific = f"| real images | {escape(data_name(dataset.real_name)) if dataset.real_name else 'not recorded'} |"
        inherit = "Mixtures derive from the real images that were mixed, and"
    else:
        made = (
            "drawn from a class-conditional normalizing flow. None is a photograph, and none should be taken for one."
        )
        specific = f"| temperature (factor on the standard deviation) | {settings['temperature']:g} |"
        inherit = "Samples derive"
    classes = "\n".join(
        f"| {entry['index']} | {escape(entry['name'])} | {escape(entry['id'])} | {entry['count']:,} |"
        for entry in manifest["classes"][:_MAX_CLASSES]
    )
    if len(dataset.classes) > _MAX_CLASSES:
        classes += f"\n\nand {len(dataset.classes) - _MAX_CLASSES} more (see {PROVENANCE})"
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
| source | {settings["source"]} |
{specific}
| seed | {settings["seed"]} |
| images whose values were not finite and were replaced | {manifest["images_not_finite"]} |

With the same flow, version and kind of machine, they can be drawn again:

```python
SyntheticDataset(model, {_arguments(settings)})
```

`{PROVENANCE}` holds all of this for programs.

## Licence

{inherit} from the images that the flow was trained on and inherit their licence, {stated}.

## Classes

| label | name | id | images |
|---|---|---|---|
{classes}

## Limits

The labels are the classes that the flow was asked for; it draws some images that a classifier, or a person, would call
something else. The images repeat what is in the training images, with its biases and gaps, and may resemble single
ones.
"""


def _arguments(settings: dict[str, Any]) -> str:
    """The arguments that make the images again. Real images and a user's own oracle can't be written down."""
    mixed = settings["source"] == "mixup"
    left_out = {"oracle", "block", "max_attempts", REAL_IMAGES, *(["temperature"] if mixed else [])}
    shown = [f"{key}={value!r}" for key, value in settings.items() if key not in left_out]
    if mixed or settings["per_class"] == "balance":
        shown.append("real=real")
    if settings.get("oracle", "posterior") != "posterior":
        shown.append("oracle=oracle")
    return ", ".join(shown)
