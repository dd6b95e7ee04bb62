"""Writing synthetic images to an ImageFolder, with a manifest that says where they came from.

The manifest, glem-provenance.json, holds the settings and a SHA-256 for every shard, a block of images of one class:
what `cat 000064.png 000065.png ... | sha256sum` prints. While an export is under way, it says "complete": false, and
every few seconds each rank lists the shards that it has written in a hidden file beside it. Running an export again, on
any number of ranks, checks every shard and writes what is missing or damaged. classes.json maps every class's folder,
there or not, to its label.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchvision.io import encode_png
from tqdm import tqdm

from glem_augment import __version__
from glem_augment.augment.moves import MOST_PUT_BACK
from glem_augment.data.pixels import usable_cpus
from glem_augment.data.sources import CLASS_FILE, PROVENANCE
from glem_augment.distributed import gather, rank, world_size
from glem_augment.io import atomic_write, write_json
from glem_augment.model.config import licence_id
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.dataset import SyntheticDataset

# Seconds between two saves of the manifest: after a kill, the shards since the last one are drawn again.
SAVE_SECONDS = 5.0
# Files that a kill left under their temporary names, and the lists of ranks.
_LEFT_OVER = re.compile(
    r"\.(\d{6,}\.png|(\.\d+-)?glem-provenance\.json|classes\.json)\.\d+-[0-9a-f]{8}\.tmp|\.\d+-glem-provenance\.json"
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes that write together: this one takes every `count`-th shard from number `rank` on."""

    rank: int = 0
    count: int = 1
    group: torch.distributed.ProcessGroup | None = None

    @classmethod
    def all(cls) -> Ranks:
        """All ranks of the process group, which must all make this call."""
        if world_size() == 1:
            return cls()
        # The first to finish may wait for hours, longer than a group does by default.
        group = torch.distributed.new_group(timeout=timedelta(days=30), backend="gloo")
        return cls(rank(), world_size(), group)

    def gather(self, thing: _T) -> list[_T]:
        """The things of all ranks that write together. None of them goes on before all have come here."""
        return gather(thing, self.group) if self.count > 1 else [thing]


ALONE = Ranks()


class Shard(NamedTuple):
    """Block `number` of the class with this label: so many `images`, numbered from `first`, in the class's folder."""

    label: int
    number: int
    folder: str
    first: int
    images: int

    def paths(self, root: Path) -> list[Path]:
        return [root / self.folder / f"{i:06d}.png" for i in range(self.first, self.first + self.images)]


def export_imagefolder(
    dataset: SyntheticDataset,
    folder: Path,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Write folder/<class>/NNNNNN.png and the manifest, which is returned; see `SyntheticDataset.export`."""
    if ranks.rank == 0:
        _begin(dataset, folder, overwrite, license)
    ranks.gather(None)
    begun = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    shards = [
        Shard(label, number, entry["folder"], first, min(dataset.block, entry["count"] - first))
        for label, entry in enumerate(begun["classes"])
        for number, first in enumerate(range(0, entry["count"], dataset.block))
    ]
    # Large shards first, so that no rank gets all the small ones at the ends of the classes.
    own = sorted(shards, key=lambda shard: -shard.images)[ranks.rank :: ranks.count]
    done = _intact(folder, own, begun["shards"])
    missing = [shard for shard in own if shard not in done]
    saved, total = time.monotonic(), sum(shard.images for shard in missing)
    of = f" of rank 0 of {ranks.count}" if ranks.count > 1 else ""
    with (
        ThreadPoolExecutor(min(8, usable_cpus())) as pool,
        tqdm(total=total, unit="image", desc=f"export{of}", disable=not (progress and missing)) as bar,
    ):
        for shard in missing:
            images, implausible = dataset.decoded_block(dataset.label_order[shard.label], shard.number)
            sha256 = hashlib.sha256(b"".join(pool.map(_write_png, images, shard.paths(folder)))).hexdigest()
            where = {"folder": shard.folder, "first": shard.first, "count": shard.images}
            done[shard] = {**where, "sha256": sha256, "implausible": implausible}
            bar.update(shard.images)
            if time.monotonic() - saved >= SAVE_SECONDS:
                write_json(folder / f".{ranks.rank}-{PROVENANCE}", {**begun, "shards": list(done.values())})
                saved = time.monotonic()
    for others, decoded in ranks.gather((done, dataset.decoded)):
        done |= others
        dataset.decoded.update(decoded)
    manifest = {**begun, "complete": True, **_results([done[shard] for shard in shards])}
    if ranks.rank == 0:
        write_json(folder / PROVENANCE, manifest)
        for path in folder.rglob(".*"):
            if _LEFT_OVER.fullmatch(path.name):
                path.unlink()
    ranks.gather(None)
    return manifest


def _begin(dataset: SyntheticDataset, folder: Path, overwrite: bool, license: str | None) -> None:  # noqa: A002
    """Make the folder ready: no images of another export, a manifest with the shards of earlier runs, classes.json."""
    manifest: dict[str, Any] = provenance(dataset) | {"license": licence_note(license, dataset)}
    old = check_folder(folder)
    if old is not None and not holds_same(folder, old, manifest, overwrite):
        # The earlier manifest stays meanwhile, so that after a kill the remaining images are known to be its own.
        for entry in old["classes"]:
            if (folder / entry["folder"]).is_dir():
                shutil.rmtree(folder / entry["folder"])  # `check_folder` has seen that there are only its images
        old = None
    if license is None and old is not None:
        manifest["license"] = old.get("license", manifest["license"])  # an earlier run may have stated it
    found = [old, *map(read_manifest, sorted(folder.glob(f".*-{PROVENANCE}")))]
    parts = [part for part in found if part is not None and not differences(part, manifest)]
    manifest |= _results(list(_by_place(entry for part in parts for entry in part.get("shards", [])).values()))
    write_json(folder / PROVENANCE, manifest)
    write_json(folder / CLASS_FILE, {entry["folder"]: entry["index"] for entry in manifest["classes"]})


def _results(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"images_implausible": sum(entry["implausible"] for entry in entries), "shards": entries}


def warn_of_numbers(classes: list[dict[str, Any]], folder: Path) -> None:
    """Say so where torchvision's ImageFolder, which numbers the folders that exist, would give another label."""
    folders = [entry["folder"] for entry in classes]
    there = sorted(entry["folder"] for entry in classes if entry["count"])
    if len(there) < len(folders) and there != folders[: len(there)]:
        _log.warning(
            "%s has no folder for %d of %d classes, which get no images, so torchvision's ImageFolder would number the "
            "others differently: open it with open_data or RealAndSynthetic, or take the labels from its %s",
            *(folder, len(folders) - len(there), len(folders), CLASS_FILE),
        )


def warn_of_implausible(dataset: SyntheticDataset) -> None:
    """Say so where many of the images that were drawn are not plausible."""
    if dataset.implausible > MOST_PUT_BACK * len(dataset):
        fix = "adapt the flow to the real images" if dataset.source == "mixup" else "lower the temperature"
        _log.warning(
            "%d of %d images are not plausible, since their values leave [0, 1] by more than 1: %s",
            *(dataset.implausible, len(dataset), fix),
        )


def _write_png(image: Tensor, path: Path) -> bytes:
    """Write an image as a PNG file; its bytes."""
    data = encode_png(image).numpy().tobytes()
    # To sync every one of these small files takes longer than all the rest. What a power cut took is found by the
    # hashes when the export is run again.
    with atomic_write(path, sync=False) as file:
        file.write(data)
    return data


# ---- what is in the folder already -----------------------------------------------------------------------------------


def check_folder(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier export in the folder, finished or not; None if the folder is empty or missing.

    Raises:
        FileExistsError: the folder holds anything that no export wrote, or without its manifest.
    """
    old = read_manifest(folder / PROVENANCE)
    counts = {} if old is None else {entry["folder"]: entry["count"] for entry in old["classes"]}
    for path in sorted(folder.rglob("*")):
        name, parent = path.relative_to(folder).as_posix(), path.parent.name
        image = re.fullmatch(r"([0-9]{6}|[1-9][0-9]{6,})\.png", path.name)
        is_folder = path.is_dir() and not path.is_symlink()
        known = name == PROVENANCE or (name == CLASS_FILE and old is not None)
        if known or _LEFT_OVER.fullmatch(path.name) or (name in counts and is_folder):
            continue
        if name == f"{parent}/{path.name}" and image and int(image[1]) < counts.get(parent, 0):
            continue
        nothing = "no earlier export, the only thing that overwrite=True (--overwrite) replaces"
        found = nothing if old is None else f"{name!r}, which no export wrote"
        raise FileExistsError(f"{folder} is not empty, it holds {found}: give another folder")
    return old


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`; None if there is none, or one that no export has written."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        classes, shards = manifest["classes"], manifest.get("shards", [])
        # Folders lie inside that of the export: what is in them may be replaced.
        good = all(re.fullmatch(r"\w[\w.+ -]*", entry["folder"]) for entry in [*classes, *shards])
        good &= all(type(entry["count"]) is int for entry in classes)
        good &= all(type(entry[key]) is int for entry in shards for key in ("first", "count", "implausible"))
        good &= all(isinstance(table, dict) for table in (manifest["settings"], manifest.get("model", {})))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return manifest if good else None


def holds_same(folder: Path, old: dict[str, Any], new: dict[str, Any], overwrite: bool) -> bool:
    """Whether the manifest of an earlier export describes the same images. FileExistsError if not, unless overwrite."""
    found = differences(old, new)
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: it holds an export of other images ({'; '.join(found[:4])}), "
            "which are not mixed: give another folder, or overwrite=True (glem generate --overwrite)"
        )
    return not found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How two manifests describe different images, for people: "temperature 0.8 (not 0.9)", ..."""
    a, b = ({key: table.get(key) for key in ("generator", "count")} | table["settings"] for table in (old, new))
    found = [f"{key} {a.get(key)} (not {b.get(key)})" for key in a | b if a.get(key) != b.get(key)]
    # A class without images, the label of a class and the record of the training make no image.
    a, b = (
        {
            "weights": table.get("weights_sha256"),
            "classes": {entry["folder"]: entry["count"] for entry in table["classes"] if entry["count"]},
            "model": {key: value for key, value in table.get("model", {}).items() if key != "training"},
        }
        for table in (old, new)
    )
    return found + [key for key in a if a[key] != b[key]]


def _intact(folder: Path, shards: list[Shard], entries: list[dict[str, Any]]) -> dict[Shard, dict[str, Any]]:
    """The manifest entries of the shards whose files are all there, with the hash that the manifest gives."""
    known = _by_place(entries)

    def is_intact(shard: Shard) -> bool:
        try:
            found = hashlib.sha256(b"".join(path.read_bytes() for path in shard.paths(folder)))
        except OSError:
            return False
        return known[shard[2:]].get("sha256") == found.hexdigest()

    listed = [shard for shard in shards if shard[2:] in known]
    with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        return {s: known[s[2:]] for s, intact in zip(listed, pool.map(is_intact, listed), strict=True) if intact}


def _by_place(entries: Iterable[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Entries of a manifest by folder, first image and number of images; the last of several for one shard."""
    return {(entry["folder"], entry["first"], entry["count"]): entry for entry in entries}


# ---- the manifest ----------------------------------------------------------------------------------------------------


def provenance(dataset: SyntheticDataset) -> dict[str, Any]:
    """The manifest without results: which flow draws the images, and with which settings."""
    order, model = dataset.label_order, dataset.model
    ids, names = ([values[i] for i in order] for values in (model.class_ids, model.classes))
    classes = zip(ids, names, class_folders(ids, names), (dataset.counts[i] for i in order), strict=True)
    return {
        "synthetic": True,
        "complete": False,
        "generator": f"glem-augment {__version__}",
        "count": len(dataset),
        "settings": dataset.settings(),
        "classes": [
            {"index": label, "id": class_id, "name": name, "folder": folder, "count": count}
            for label, (class_id, name, folder, count) in enumerate(classes)
        ],
        "weights_sha256": weights_sha256(model),
        "model": json.loads(json.dumps(model.config.to_dict(), default=str)),
    }


def stated_licence(licence: str | None, dataset: SyntheticDataset) -> str | None:
    """The licence, by default that of the flow's training images in its record. A mixture needs one to be stated: the
    real images that were mixed may have another."""
    recorded = licence_id(dataset.model.config.training.get("license"))
    return licence or (None if dataset.source == "mixup" else recorded)


def licence_note(licence: str | None, dataset: SyntheticDataset) -> str:
    """The licence for the provenance, or a note that it is not known."""
    return stated_licence(licence, dataset) or "not stated; samples inherit the licence of the real images"


def class_folders(class_ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """A folder name for every class: its id if that can be one as it is, else a slug of its name.

    A name comes before an id that is a number: class 3 of one data set is not class 3 of another. A slug has the
    letters and digits of the name, so that the classes are matched again when the folder is opened as data. Where two
    would be the same, all have the class's index in front, which the matching leaves out.
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
    text = re.sub(r"[^\w.+ -]+", "_", unicodedata.normalize("NFC", text))
    return text.lstrip("_.+ -")[:100].rstrip("_. ")
