"""Publishing synthetic images: WebDataset shards with a card, in a folder or as a data set on the Hub.

timm reads them, and `datasets.load_dataset` and the Hub's viewer do.
"""

from __future__ import annotations

import io
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

from glem_augment.hub.cards import CardFacts, data_name, escape, licence_of, trained_on
from glem_augment.hub.files import LIBRARY
from glem_augment.hub.upload import upload, write_card
from glem_augment.io import atomic_write, expand, file_sha256, lock_folder, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.dataset import SyntheticDataset
from glem_augment.synthetic.export import (
    ALONE,
    PROVENANCE,
    Ranks,
    export_imagefolder,
    holds_same,
    licence_note,
    provenance,
    read_manifest,
    stated_licence,
)

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
    dataset: SyntheticDataset,
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
        dataset: its classes become the names of the column `cls`, numbered as in an export; the images are `png`.
        repo_id: `org/name` of a data set, which is made if it does not exist.
        license, license_name, license_link: of the images that the flow was trained on, whose licence the samples
            inherit; an identifier of the Hub. By default the one in the flow's record; where there is none either, the
            card says that it is unknown, with a warning.
        report: a folder that `evaluation.quality_report` wrote, for the card.
        target: `commit_message`, `private`, `token` and `revision`, see `hub.upload.upload`.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        OSError: no space for temporary files, which take twice the size of the images.
    """
    facts = CardFacts(license, license_name, license_link, report=report)
    return upload(
        repo_id,
        "dataset",
        lambda name, folder: export_shards(dataset, folder, facts, name=name),
        replace="data/*",
        **target,
    )


def export_shards(
    dataset: SyntheticDataset,
    folder: Path,
    facts: CardFacts,
    overwrite: bool = False,
    progress: bool = True,
    ranks: Ranks = ALONE,
    name: str | None = None,
) -> None:
    """Write WebDataset shards, card and provenance to `folder`. They appear there together, once all are finished.

    `name` is the heading of the card, by default the folder's name.
    """
    report = None if facts.report is None else expand(facts.report)
    quality = {} if report is None else {"quality": json.loads((report / "report.json").read_text(encoding="utf-8"))}
    unfinished = folder / _UNFINISHED
    with lock_folder(folder) if ranks.rank == 0 else nullcontext():
        finished = ranks.rank == 0 and _is_finished(dataset, folder, overwrite, facts.license)
        if not ranks.gather(finished)[0]:
            manifest = _write_shards(dataset, unfinished, progress, ranks)
            if ranks.rank == 0:
                # A run that is killed from here on goes on without a manifest, and thus without `overwrite`.
                (folder / PROVENANCE).unlink(missing_ok=True)
                for path in folder.glob("data/train-*-of-*.tar"):  # of an earlier export
                    path.unlink()
                (folder / "data").mkdir(exist_ok=True)
                for path in unfinished.glob("data/*"):
                    os.replace(path, folder / "data" / path.name)
                # The model's config is left out: it may name private folders.
                manifest = {key: value for key, value in manifest.items() if key not in ("model", "shards")} | {
                    "format": "webdataset",
                    "loaded_from": _origin(dataset.model),
                    "license": licence_note(facts.license_name or facts.license, dataset),
                    **quality,
                }
                if report is not None:
                    shutil.copy(report / "report.png", folder)
                facts = replace(facts, license=stated_licence(facts.license, dataset))
                write_card(_card(dataset, name or folder.resolve().name, facts, manifest), folder)
                write_json(folder / PROVENANCE, manifest)
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    ranks.gather(None)


def _origin(model: GLEM) -> str | None:
    """`org/name@commit`, if the model is still as it was loaded from there."""
    if model.origin is None or model.origin_file is None:
        return None
    return model.origin if file_sha256(model.origin_file) == weights_sha256(model) else None


def _write_shards(dataset: SyntheticDataset, folder: Path, progress: bool, ranks: Ranks) -> dict[str, Any]:
    """Write image i to shard i mod S, so that every shard holds every class. Returns the manifest.

    Each shard has images of nearly all blocks. So the images are made first, as an ImageFolder in folder/images.
    """
    images, data = folder / "images", folder / "data"
    if ranks.rank == 0:
        shutil.rmtree(data, ignore_errors=True)  # from a run that was killed, perhaps of other images
    manifest = export_imagefolder(dataset, images, overwrite=True, progress=progress, ranks=ranks)
    labelled = [
        (images / entry["folder"] / f"{i:06d}.png", entry["index"])
        for entry in manifest["classes"]
        for i in range(entry["count"])
    ]
    names = _shard_names(len(labelled))
    count = len(names)
    for number in tqdm(range(ranks.rank, count, ranks.count), unit="shard", desc="pack", disable=not progress):
        with atomic_write(data / names[number]) as file, tarfile.open(fileobj=file, mode="w") as shard:
            for index in range(number, len(labelled), count):
                path, label = labelled[index]
                _add_file(shard, f"{index:08d}.png", path.read_bytes())
                _add_file(shard, f"{index:08d}.cls", str(label).encode())
    split = {
        "name": "train",
        "num_samples": len(labelled),
        "filenames": names,
        "shard_lengths": [len(range(i, len(labelled), count)) for i in range(count)],
    }
    if ranks.rank == 0:
        write_json(folder / _SHARDS_INFO, {"splits": {"train": split}})
    ranks.gather(None)
    return manifest


def _shard_names(images: int) -> list[str]:
    count = min(MAX_SHARDS, -(-images // MIN_SHARD))
    return [f"train-{i:05d}-of-{count:05d}.tar" for i in range(count)]


def _add_file(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without a time, so that the same images give the same shards
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def _is_finished(dataset: SyntheticDataset, folder: Path, overwrite: bool, license: str | None) -> bool:  # noqa: A002
    """Whether all shards of these images are there. FileExistsError if there are others, unless overwrite."""
    new, old = provenance(dataset), check_shards_folder(folder)
    if old is None or not holds_same(folder, old | {"model": new["model"]}, new, overwrite):
        return False
    same_licence = license is None or license == old.get("license")
    return same_licence and all((folder / "data" / name).is_file() for name in _shard_names(len(dataset)))


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


def _card(dataset: SyntheticDataset, name: str, facts: CardFacts, manifest: dict[str, Any]) -> DatasetCard:
    """The card; its metadata tell `datasets` where the images are and what the classes are called."""
    names = {str(entry["index"]): entry["name"] for entry in manifest["classes"]}
    features = [
        {"name": "png", "dtype": "image"},
        {"name": "cls", "dtype": {"class_label": {"names": names}}},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]
    files = [{"split": "train", "path": "data/train-*.tar"}]
    data = DatasetCardData(
        **facts.licence(),
        annotations_creators=["machine-generated"],
        task_categories=["image-classification"],
        tags=["synthetic", LIBRARY],
        dataset_info={"features": features},
        configs=[{"config_name": "default", "data_files": files}],
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_body(dataset, name, facts, manifest)}")


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


def _body(dataset: SyntheticDataset, name: str, facts: CardFacts, manifest: dict[str, Any]) -> str:
    c, h, w = dataset.image_shape
    loaded = f"`{manifest['loaded_from']}` on the Hub" if manifest["loaded_from"] else "a local model"
    made = "drawn from a class-conditional normalizing flow. None is a photograph, and none should be taken for one."
    derived = "Samples derive"
    if dataset.source == "mixup":
        made = "made by a class-conditional normalizing flow: each is a real image, moved part of the way to another."
        mixed = dataset.sampler.real
        real = escape(data_name(mixed.name)) if mixed and mixed.name else "not recorded"
        derived = f"Mixtures derive from real images ({real}) and"
    settings = "\n".join(f"| {key} | {escape(value)} |" for key, value in manifest["settings"].items())
    return f"""# {escape(name)}

**These images are synthetic.** {len(dataset):,} images, {c}x{h}x{w} (channels x height x width), of
{len(manifest["classes"])} classes, {made}
They are for training image classifiers together with real images; measure on real ones only.

```python
from datasets import load_dataset

data = load_dataset("{name}", split="train")
image, label = data[0]["png"], data[0]["cls"]
```

## How they were made

| | |
|---|---|
| generator | {manifest["generator"]} |
| flow | {loaded}, weights with SHA-256 `{manifest["weights_sha256"]}` |
| the flow was trained on | {trained_on(dataset.model.config.training)} |
| images that are not plausible (values off [0, 1] by more than 1, or not finite) | {manifest["images_implausible"]} |
{settings}

With these settings of `SyntheticDataset`, the same flow, version and kind of machine, they can be drawn again.
{_quality(manifest["quality"]) if "quality" in manifest else ""}
## Licence

{derived} from the images that the flow was trained on, and inherit their licence. {licence_of(facts)}

## Limits

The labels are the classes that the flow was asked for; a person would call some of the images something else. They
repeat the biases and gaps of the training images, and may resemble single ones.
"""
