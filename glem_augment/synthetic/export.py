"""Writing a synthetic set as an ImageFolder or as WebDataset shards, with a record of how it was made.

The record, glem-provenance.json, says "complete": false until all files are there, and until then `open_data` refuses
the folder. Each file is written atomically, and draws are deterministic. So the same export again, on any number of
ranks, draws only the blocks of which a file is missing or empty.
"""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import encode_png

from glem_augment import __version__
from glem_augment.distributed import gather, progress_bar, rank, world_size
from glem_augment.errors import DataError
from glem_augment.images.sources import CLASS_FILE, PROVENANCE, read_record
from glem_augment.io import atomic_write, expand, file_sha256, remove_left_overs, write_json
from glem_augment.model.config import data_names, licence_id
from glem_augment.model.files import weights_sha256
from glem_augment.names import Format
from glem_augment.synthetic.draws import Draws

# Many shards, since a loader gives each worker whole shards; a shard has 4 blocks or more.
MAX_SHARDS, SHARD_BLOCKS = 64, 4
MOST_REJECTED = 0.05  # more rejected samples than this part of all are reported
_IN_PNG = ((1, "uint8"), (3, "uint8"), (1, "uint16"))  # channels and dtypes that PNG files hold
_README = """\
---
{head}task_categories: [image-classification]
tags: [synthetic, glem-augment]
---

# Synthetic images

{count} images, {shape} (channels x height x width), of {classes} classes, drawn from a class-conditional
model; none is a photograph.
A label is the class that the model was asked for; glem-provenance.json lists the classes in the order of their labels.

- Made by: {generator}
- Model: {model}, SHA-256 of the weights {weights_sha256}
- Training images of the model: {trained_on}
- Settings: {settings}
{privacy}
{licence}
"""
_log = logging.getLogger(__name__)


def export_set(
    draws: Draws,
    folder: str | os.PathLike[str],
    form: Format,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    shared: bool = False,
    command: str | None = None,
) -> int:
    """Write the images of a set; see `SyntheticDataset.export`.

    Args:
        shared: all ranks of the process group make this call, and each writes some of the files.
        command: the command that finishes the export after a kill, for an error message.

    Returns:
        How many images whose values are not finite or leave [0, 1] by more than 1 all ranks wrote in this call.
    """
    folder = expand(folder)
    if form == "webdataset":
        draws.model.pixel_range.need_8_bits("the format webdataset", draws.model.image_shape[0])
    old = read_provenance(folder)
    record = _record(draws, form, license or (old or {}).get("license"))
    if old is not None and (found := _differences(old, record)):
        raise FileExistsError(f"{folder} holds an export of other images ({'; '.join(found[:4])}): give another folder")
    this, ranks, group = 0, 1, None
    if shared and world_size() > 1:  # the first rank to finish may wait for hours, longer than the default timeout
        this, ranks = rank(), world_size()
        group = torch.distributed.new_group(timeout=timedelta(days=30), backend="gloo")

    def wait(count: int = 0) -> int:
        """Wait for all ranks; the sum of their counts."""
        return sum(gather(count, group)) if ranks > 1 else count

    if this == 0:
        write_json(folder / PROVENANCE, record | {"finish": command or f"export the same set to {folder} again"})
        if form == "imagefolder":
            write_json(folder / CLASS_FILE, {entry["folder"]: entry["index"] for entry in record["classes"]})
        with atomic_write(folder / "README.md", "w") as file:
            file.write(_readme(draws, record))
    wait()  # the record comes before any image
    write = _write_images if form == "imagefolder" else _write_shards
    out_of_range = wait(write(draws, folder, record, slice(this, None, ranks)))
    if this == 0:
        remove_left_overs(folder.rglob(".*.tmp"))
        write_json(folder / PROVENANCE, record | {"complete": True})  # last: from now on the set is complete
        _warn(folder, record, out_of_range)
    wait()
    return out_of_range


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """The record of the export in a folder, finished or not; None if the folder is missing or empty.

    Raises:
        FileExistsError: the folder holds something without such a record.
    """
    with suppress(DataError):
        if (record := read_record(folder)) is not None:
            return record
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return None
    raise FileExistsError(f"{folder} is not empty, and holds no export that can be finished: give another folder")


# ---- the record ------------------------------------------------------------------------------------------------------


def _record(draws: Draws, form: Format, license: str | None) -> dict[str, Any]:  # noqa: A002
    """The record of a set that is not complete: the model that draws the images, and the settings."""
    order, model, config = draws.order, draws.model, draws.model.config
    if config.privacy is not None:
        model.check_promise()
    ids, names = ([values[i] for i in order] for values in (config.class_ids, config.class_names))
    described = {key: value for key, value in config.to_dict().items() if key != "training"}  # may name folders
    sha256 = weights_sha256(model)
    unchanged = model.origin and model.origin_file and file_sha256(model.origin_file) == sha256
    return {
        "synthetic": True,
        "complete": False,
        "format": form,
        "generator": f"glem-augment {__version__}",
        "count": sum(draws.counts),
        "settings": draws.settings,
        "classes": [
            {"index": label, "id": ids[label], "name": names[label], "folder": folder, "count": draws.counts[cls]}
            for label, (cls, folder) in enumerate(zip(order, class_folders(ids, names), strict=True))
        ],
        "image_shape": list(config.image_shape),
        "weights_sha256": sha256,
        "model": json.loads(json.dumps(described, default=str)),
        "loaded_from": model.origin if unchanged else None,
        "trained_on": data_names(config.training),
        "license": license or licence_id(config.training.get("license")) or "not stated",
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How two records describe different images, for people: "temperature 0.8 (not 0.9)", ..."""
    a, b = ({k: table.get(k) for k in ("generator", "format", "count")} | table["settings"] for table in (old, new))
    found = [f"{key} {a.get(key)} (not {b.get(key)})" for key in a | b if a.get(key) != b.get(key)]
    return found + [key for key in ("weights_sha256", "classes", "model") if old.get(key) != new[key]]


def _readme(draws: Draws, record: dict[str, Any]) -> str:
    promise, licence = draws.model.config.promise, licence_id(record["license"]) or "unknown"
    words = f"Licence: {record['license']}. Samples inherit the licence of the training images."
    if not promise:
        words += " Without a promise of\nprivacy they may resemble single training images."
    elif licence == "unknown":  # of images that nobody else has
        words = "Whoever fitted the model decides on the licence, and has stated none."
    about = {
        "head": "" if promise and licence == "unknown" else f"license: {licence}\n",
        "licence": words,
        "shape": "x".join(map(str, record["image_shape"])),
        "classes": len(record["classes"]),
        "model": record["loaded_from"] or "a local model",
        "trained_on": ", then ".join(record["trained_on"]),
        "settings": ", ".join(f"{key} {value}" for key, value in draws.settings.items()),
        "privacy": f"\nPrivacy: {promise}\n" if promise else "",
    }
    return _README.format_map(record | about)


def class_folders(class_ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """A folder name for every class: its id if that is a valid name, else a slug of its name.

    Ids that are numbers are not used, since class 3 of one data set is not class 3 of another. If two folders had one
    name, all names begin with the index of the class.
    """
    numbered = all(i.isdecimal() for i in class_ids) and not all(name.isdecimal() for name in names)
    folders = [
        class_id if _slug(class_id) == class_id and not numbered else _slug(name) or f"class_{index}"
        for index, (class_id, name) in enumerate(zip(class_ids, names, strict=True))
    ]
    if len({folder.casefold() for folder in folders}) == len(folders):  # some file systems do not tell capitals apart
        return folders
    return [f"{index}_{folder}" for index, folder in enumerate(folders)]


def _slug(text: str) -> str:
    """The letters, digits and marks (vowels in many scripts) of a name, and a few more characters."""
    text = unicodedata.normalize("NFC", text)
    kept = (c if c.isalnum() or c in "_.+# -" or unicodedata.category(c)[0] == "M" else "\0" for c in text)
    return re.sub("\0+", "_", "".join(kept)).lstrip("_.+# -")[:100].rstrip("_. ")


def _warn(folder: Path, record: dict[str, Any], out_of_range: int) -> None:
    """Warn where many images are out of range, or torchvision's ImageFolder would number the classes differently."""
    if out_of_range > MOST_REJECTED * record["count"]:
        wild = "%d of %d images are out of range: lower the temperature, or fit the model to images like these"
        _log.warning(wild, out_of_range, record["count"])
    folders = [entry["folder"] for entry in record["classes"]]
    there = sorted(entry["folder"] for entry in record["classes"] if entry["count"])
    if record["format"] == "imagefolder" and len(there) < len(folders) and there != folders[: len(there)]:
        _log.warning(
            "%s has no folder for %d of %d classes, which get no images. So torchvision's ImageFolder numbers classes "
            "differently: use open_data or RealAndSynthetic, or the labels in %s",
            *(folder, len(folders) - len(there), len(folders), CLASS_FILE),
        )


# ---- images --------------------------------------------------------------------------------------------------------


def _is_there(path: Path) -> bool:
    """Whether a file is there and not empty: a power cut may leave empty files."""
    return path.is_file() and path.stat().st_size > 0


def _write_images(draws: Draws, root: Path, record: dict[str, Any], part: slice) -> int:
    """Write root/<class>/NNNNNN.png, or .npy, of this rank's blocks. Returns how many draws are out of range."""
    channels, dtype = draws.model.image_shape[0], draws.model.pixel_range.dtype
    ending = "png" if (channels, dtype) in _IN_PNG else "npy"
    folders = {cls: root / entry["folder"] for cls, entry in zip(draws.order, record["classes"], strict=True)}
    blocks = sorted(draws.blocks(), key=lambda block: -block[1])[part]  # every rank gets as many large blocks
    out_of_range = 0
    with ThreadPoolExecutor(8) as pool:
        for cls, number in progress_bar("export", blocks, unit="block"):
            paths = [folders[cls] / f"{place:06d}.{ending}" for place in draws.places(cls, number)]
            if not all(map(_is_there, paths)):
                drawn = draws.draw(cls, number)
                list(pool.map(_write_image, paths, drawn.images))
                out_of_range += int(drawn.out_of_range.sum())
    return out_of_range


def _write_image(path: Path, image: torch.Tensor) -> None:
    # A sync of every small file takes longer than everything else.
    with atomic_write(path, sync=False) as file:
        if path.suffix == ".npy":
            np.lib.format.write_array(file, image.numpy(), allow_pickle=False)
        elif image.dtype == torch.uint8:
            file.write(encode_png(image).numpy().tobytes())
        else:
            Image.fromarray(image[0].numpy()).save(file, "PNG")


def _write_shards(draws: Draws, root: Path, record: dict[str, Any], part: slice) -> int:
    """Write this rank's shards data/train-*.tar of blocks in random order, and timm's description of all shards."""
    try:
        from webdataset import TarWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError("shards need webdataset: pip install 'glem-augment[webdataset]'") from None
    blocks, out_of_range = draws.blocks(), 0
    blocks = [blocks[i] for i in np.random.default_rng(0).permutation(len(blocks))]  # the same on every rank
    total = min(MAX_SHARDS, -(-len(blocks) // SHARD_BLOCKS))
    names = [f"train-{number:05d}-of-{total:05d}.tar" for number in range(total)]
    labels = {cls: label for label, cls in enumerate(draws.order)}
    starts = np.cumsum([0] + [draws.counts[cls] for cls in draws.order]).tolist()  # the first image of each label
    for number in progress_bar("export", range(total)[part], unit="shard"):
        path = root / "data" / names[number]
        if _is_there(path):
            continue
        # Without times, so that the same images give the same shards.
        with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as archive:
            for cls, block in blocks[number::total]:
                drawn, label = draws.draw(cls, block), labels[cls]
                out_of_range += int(drawn.out_of_range.sum())
                for place, image in zip(draws.places(cls, block), drawn.images, strict=True):
                    png = encode_png(image).numpy().tobytes()
                    archive.write({"__key__": f"{starts[label] + place:08d}", "cls": str(label).encode(), "png": png})
    lengths = [sum(len(draws.places(*block)) for block in blocks[number::total]) for number in range(total)]
    split = {"name": "train", "num_samples": record["count"], "filenames": names, "shard_lengths": lengths}
    write_json(root / "data" / "_info.json", {"splits": {"train": split}})
    return out_of_range
