"""Writing a synthetic set as an ImageFolder or as WebDataset shards, with a manifest of how it was made.

The manifest, glem-provenance.json, says "complete": false until all files are there, and until then `open_data` refuses
the folder. Files are written atomically and draws are deterministic. So the same export again, on any number of ranks,
draws only the blocks of which a file is missing or empty.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.io import encode_png
from tqdm import tqdm

from glem_augment import __version__
from glem_augment.augment.state import MOST_REJECTED
from glem_augment.checks import FORMATS, Format
from glem_augment.distributed import gather, rank, world_size
from glem_augment.images.sources import CLASS_FILE, PROVENANCE
from glem_augment.io import LEFT_OVER, atomic_write, expand, file_sha256, lock_folder, remove_left_overs, write_json
from glem_augment.model.config import data_name, data_names, licence_id
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.sampler import Drawn, Plan

CHECKSUMS = "checksums.sha256"
# Many shards, since a loader gives each worker whole shards.
MAX_SHARDS, MIN_SHARD = 64, 32
_IN_PNG = ((1, "uint8"), (3, "uint8"), (1, "uint16"))  # channels and dtypes that PNG files hold
_WORK = ".glem-export"  # the hidden folder with the images of shards
_SHARDS_INFO = "data/_info.json"  # a description of the shards for timm's reader
_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Draw = Callable[[int, int], Drawn]  # from a class and the number of a block


class _Ranks(NamedTuple):
    """The processes that write together: this one takes every `world`-th block or shard from number `rank` on."""

    rank: int
    world: int
    group: torch.distributed.ProcessGroup | None

    def gather(self, thing: _T) -> list[_T]:
        """The objects of all ranks that write together. All ranks wait here for each other."""
        return gather(thing, self.group) if self.world > 1 else [thing]


def export_set(
    plan: Plan,
    draw: Draw,
    folder: str | os.PathLike[str],
    form: Format,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    *,
    overwrite: bool = False,
    progress: bool = True,
    distributed: bool = False,
    command: str | None = None,
) -> int:
    """Write the images of a plan; see `SyntheticDataset.export`.

    Args:
        license: of the images, see `SyntheticDataset.export`.
        command: the command that finishes the export after a kill, for an error message.

    Returns:
        How many images whose values are not finite or leave [0, 1] by more than 1 all ranks wrote in this call.
    """
    if form == "webdataset":
        plan.need_8_bits()
    folder = expand(folder)
    ranks = _Ranks(0, 1, None)
    if distributed and world_size() > 1:
        # The first rank to finish may wait for hours, longer than the default timeout.
        group = torch.distributed.new_group(timeout=timedelta(days=30), backend="gloo")
        ranks = _Ranks(rank(), world_size(), group)
    first, shards = ranks.rank == 0, form == "webdataset"
    with lock_folder(folder) if first else nullcontext():
        manifest = ranks.gather(_begin(plan, folder, form, license, overwrite, command) if first else {})[0]
        folders = {cls: entry["folder"] for cls, entry in zip(plan.order, manifest["classes"], strict=True)}
        write = _write_shards if shards else _write_images
        files, bad = write(plan, draw, folders, folder, ranks, progress and first)
        out_of_range = sum(ranks.gather(bad))
        if first:
            with ThreadPoolExecutor() as pool, atomic_write(folder / CHECKSUMS, "w") as file:
                sums = pool.map(file_sha256, (folder / path for path in files))
                file.writelines(f"{sha256}  {path}\n" for path, sha256 in zip(files, sums, strict=True))
            if shards:
                _describe_shards(folder, manifest)
            shutil.rmtree(folder / _WORK, ignore_errors=True)
            remove_left_overs(folder.rglob(".*.tmp"))
            del manifest["finish"]
            write_json(folder / PROVENANCE, manifest | {"complete": True})  # last: from now on the set is complete
            _warn(plan, folder, manifest, out_of_range)
        ranks.gather(None)
    return out_of_range


# ---- the manifest --------------------------------------------------------------------------------------------------


def _begin(
    plan: Plan,
    folder: Path,
    form: Format,
    license: str | None,
    overwrite: bool,
    command: str | None,  # noqa: A002
) -> dict[str, Any]:
    """Make the folder ready: no images of another export, a manifest, classes.json. Returns the manifest."""
    manifest, old = _manifest(plan, form, license), check_folder(folder)
    manifest["finish"] = command or f"export the same SyntheticDataset to {folder} again"
    if old is not None and (found := _differences(old, manifest)):
        if not overwrite:
            raise FileExistsError(
                f"{folder} is not empty: it holds an export of other images ({'; '.join(found[:4])}), "
                "which are not mixed: give another folder, or overwrite=True (glem generate --overwrite)"
            )
        if plan.model.config.privacy is not None and old["weights_sha256"] != manifest["weights_sha256"]:
            raise FileExistsError(
                f"{folder} holds files of another model, which no promise covers: give a new folder for a private set"
            )
        # The earlier manifest stays until then: after a kill it names the images that remain.
        write_json(folder / PROVENANCE, {**old, "complete": False, "finish": manifest["finish"]})
        _remove(folder, old)
        old = None
    if old is not None and license is None:
        manifest["license"] = old.get("license", manifest["license"])  # an earlier run may have stated it
    if old is None or not old["complete"]:
        write_json(folder / PROVENANCE, manifest)
    if form == "imagefolder":
        write_json(folder / CLASS_FILE, {entry["folder"]: entry["index"] for entry in manifest["classes"]})
    return manifest


def _manifest(plan: Plan, form: Format, license: str | None) -> dict[str, Any]:  # noqa: A002
    """The manifest of a set that is not complete: the model that draws the images, and the settings."""
    order, model, config = plan.order, plan.model, plan.model.config
    if config.privacy is not None:
        model.check_promise()
    ids, names = ([values[i] for i in order] for values in (config.class_ids, config.class_names))
    classes = zip(ids, names, class_folders(ids, names), (plan.counts[i] for i in order), strict=True)
    described = {key: value for key, value in config.to_dict().items() if key != "training"}  # may name folders
    stated = _stated_licence(plan, license)
    sha256 = weights_sha256(model)
    unchanged = model.origin and model.origin_file and file_sha256(model.origin_file) == sha256
    return {
        "synthetic": True,
        "complete": False,
        "format": form,
        "generator": f"glem-augment {__version__}",
        "count": sum(plan.counts),
        "settings": plan.settings,
        "classes": [
            {"index": label, "id": class_id, "name": name, "folder": folder, "count": count}
            for label, (class_id, name, folder, count) in enumerate(classes)
        ],
        "image_shape": list(config.image_shape),
        "weights_sha256": sha256,
        "model": json.loads(json.dumps(described, default=str)),
        "loaded_from": model.origin if unchanged else None,
        "trained_on": data_names(config.training),
        "real": plan.real_name and data_name(plan.real_name),
        "license": stated or "not stated; samples inherit the licence of the real images",
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How two manifests describe different images, for people: "temperature 0.8 (not 0.9)", ..."""
    a, b = ({k: table.get(k) for k in ("generator", "format", "count")} | table["settings"] for table in (old, new))
    found = [f"{key} {a.get(key)} (not {b.get(key)})" for key in a | b if a.get(key) != b.get(key)]
    return found + [key for key in ("weights_sha256", "classes", "model") if old.get(key) != new[key]]


def _stated_licence(plan: Plan, license: str | None) -> str | None:  # noqa: A002
    """The stated licence, or the recorded one. Mixtures have none by default: it also depends on their real images."""
    recorded = licence_id(plan.model.config.training.get("license"))
    return license or (None if plan.settings["source"] == "mixup" else recorded)


def check_folder(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier export in the folder, finished or not; None if the folder is empty or missing.

    Raises:
        FileExistsError: the folder holds something without such a manifest, or an ImageFolder with other files.
    """
    old = _read_manifest(folder / PROVENANCE)
    if old is not None and old["format"] == "webdataset":
        return old
    counts = {} if old is None else {entry["folder"]: entry["count"] for entry in old["classes"]}
    known = {PROVENANCE} if old is None else {PROVENANCE, CLASS_FILE, CHECKSUMS, *counts}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        parent, _, file = name.rpartition("/")
        number = re.fullmatch(r"(\d{6}|[1-9]\d{6,})\.(png|npy)", file)
        image = number is not None and int(number[1]) < counts.get(parent, 0)
        of_killed_run = LEFT_OVER.fullmatch(file) or file == ".lock"
        if not (image or of_killed_run or (name in known and not path.is_symlink())):
            found = "no earlier export, which --overwrite needs" if old is None else f"{name!r}, which no export wrote"
            raise FileExistsError(f"{folder} is not empty, it holds {found}: give another folder")
    return old


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`; None if there is none, or one that no export has written."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        # An overwrite removes these folders, so they must lie inside the export.
        names = [entry["folder"] for entry in manifest["classes"]]
        good = all(re.match(r"\w", name) and all(map(_kept, name)) for name in names)
        good &= all(type(entry[key]) is int for entry in manifest["classes"] for key in ("index", "count"))
        good &= isinstance(manifest["settings"], dict) and type(manifest["complete"]) is bool
        return manifest if good and manifest["format"] in FORMATS else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def class_folders(class_ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """A folder name for every class: its id if that is a valid name, else a slug of its name.

    Ids that are numbers are not used, since class 3 of one data set is not class 3 of another. A slug keeps letters and
    digits, by which classes are matched. If two folders had one name, all names begin with the index of the class,
    which the matching ignores.
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
    text = "".join(c if _kept(c) else "\0" for c in unicodedata.normalize("NFC", text))
    return re.sub("\0+", "_", text).lstrip("_.+# -")[:100].rstrip("_. ")


def _kept(character: str) -> bool:
    """Whether a folder's name may have it: letters, digits, marks (vowels in many scripts), and a few more."""
    return character.isalnum() or character in "_.+# -" or unicodedata.category(character)[0] == "M"


def _remove(folder: Path, old: dict[str, Any]) -> None:
    """Remove an export, but for its manifest."""
    files = [CHECKSUMS, CLASS_FILE]
    if old["format"] == "imagefolder":
        for entry in old["classes"]:
            if (folder / entry["folder"]).is_dir():
                shutil.rmtree(folder / entry["folder"])  # `check_folder` found only its images there
    else:
        files += [_SHARDS_INFO, *map(str, folder.glob("data/train-*-of-*.tar"))]
    for name in files:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # missing, or with files of the user
        (folder / "data").rmdir()  # an ImageFolder would count it as a class
    shutil.rmtree(folder / _WORK, ignore_errors=True)


# ---- images --------------------------------------------------------------------------------------------------------


def _write_images(
    plan: Plan, draw: Draw, folders: dict[int, str], root: Path, ranks: _Ranks, progress: bool
) -> tuple[list[str], int]:
    """Write root/<class>/NNNNNN.png, or .npy. Returns the paths of all images, and the number of draws out of range."""
    channels, dtype = plan.model.image_shape[0], plan.model.pixel_range.dtype
    ending = "png" if (channels, dtype) in _IN_PNG else "npy"
    blocks = []  # (class, number, paths), class after class in the order of the labels
    for cls in plan.order:
        images = [f"{folders[cls]}/{i:06d}.{ending}" for i in range(plan.counts[cls])]
        starts = range(0, len(images), plan.block)
        blocks += [(cls, number, images[first : first + plan.block]) for number, first in enumerate(starts)]
    # Sorted by size, so that no rank gets all the small blocks at the ends of the classes.
    own = sorted(blocks, key=lambda block: -len(block[2]))[ranks.rank :: ranks.world]
    missing = [block for block in own if not all(_is_there(root / path) for path in block[2])]
    of = f" of rank 0 of {ranks.world}" if ranks.world > 1 else ""
    total, out_of_range = sum(len(paths) for *_, paths in missing), 0
    with (
        ThreadPoolExecutor(8) as pool,
        tqdm(total=total, unit="image", desc=f"export{of}", disable=not (progress and missing)) as bar,
    ):
        for cls, number, paths in missing:
            drawn = draw(cls, number)
            list(pool.map(_write_image, (root / path for path in paths), drawn.images))
            out_of_range += int(drawn.out_of_range.sum())
            bar.update(len(paths))
    ranks.gather(None)
    return [path for *_, paths in blocks for path in paths], out_of_range


def _is_there(path: Path) -> bool:
    """Whether a file is there and not empty: a power cut may leave empty files."""
    return path.is_file() and path.stat().st_size > 0


def _write_image(path: Path, image: torch.Tensor) -> None:
    # A sync of every small file takes longer than everything else.
    with atomic_write(path, sync=False) as file:
        if path.suffix == ".npy":
            np.lib.format.write_array(file, image.numpy(), allow_pickle=False)
        elif image.dtype == torch.uint8:
            file.write(encode_png(image).numpy().tobytes())
        else:
            Image.fromarray(image[0].numpy()).save(file, "PNG")


# ---- shards --------------------------------------------------------------------------------------------------------


def _write_shards(
    plan: Plan, draw: Draw, folders: dict[int, str], folder: Path, ranks: _Ranks, progress: bool
) -> tuple[list[str], int]:
    """Write image i to shard i mod S, so that every shard holds every class. Returns the shards' paths, and the count.

    Each shard has images of nearly all blocks. So the images are made first, as an ImageFolder in a hidden folder.
    """
    names, root = _shard_names(sum(plan.counts)), folder / _WORK
    if all(ranks.gather(all(_is_there(folder / name) for name in names))):
        return names, 0
    paths, out_of_range = _write_images(plan, draw, folders, root, ranks, progress)
    label_of = {folders[cls]: label for label, cls in enumerate(plan.order)}
    for number in tqdm(range(ranks.rank, len(names), ranks.world), unit="shard", desc="pack", disable=not progress):
        shard = folder / names[number]
        if _is_there(shard):
            continue
        with atomic_write(shard) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for index in range(number, len(paths), len(names)):
                label = label_of[paths[index].partition("/")[0]]
                _add_file(archive, f"{index:08d}.png", (root / paths[index]).read_bytes())
                _add_file(archive, f"{index:08d}.cls", str(label).encode())
    ranks.gather(None)
    return names, out_of_range


def _shard_names(images: int) -> list[str]:
    count = min(MAX_SHARDS, -(-images // MIN_SHARD))
    return [f"data/train-{i:05d}-of-{count:05d}.tar" for i in range(count)]


def _add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without a time, so that the same images give the same shards
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _describe_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """Write timm's description of the shards."""
    names = [path.removeprefix("data/") for path in _shard_names(manifest["count"])]
    lengths = [len(range(i, manifest["count"], len(names))) for i in range(len(names))]
    split = {"name": "train", "num_samples": manifest["count"], "filenames": names, "shard_lengths": lengths}
    write_json(folder / _SHARDS_INFO, {"splits": {"train": split}})


def _warn(plan: Plan, folder: Path, manifest: dict[str, Any], out_of_range: int) -> None:
    """Warn where many images are out of range, or torchvision's ImageFolder would number the classes differently."""
    count, classes = manifest["count"], manifest["classes"]
    if out_of_range > MOST_REJECTED * count:
        fix = "adapt the model to the real images" if plan.settings["source"] == "mixup" else "lower the temperature"
        wild = "%d of %d images are out of range: their values are not finite or leave [0, 1] by more than 1: %s"
        _log.warning(wild, out_of_range, count, fix)
    folders = [entry["folder"] for entry in classes]
    there = sorted(entry["folder"] for entry in classes if entry["count"])
    if manifest["format"] == "imagefolder" and len(there) < len(folders) and there != folders[: len(there)]:
        _log.warning(
            "%s has no folder for %d of %d classes, which get no images. So torchvision's ImageFolder numbers classes "
            "differently: use open_data or RealAndSynthetic, or the labels in %s",
            *(folder, len(folders) - len(there), len(folders), CLASS_FILE),
        )
