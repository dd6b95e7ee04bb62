"""Writing synthetic images to an ImageFolder, with a manifest that says where they came from.

The manifest, glem-provenance.json, holds the settings and a SHA-256 for every shard, a block of images of one class:
what `cat 000064.png 000065.png ... | sha256sum` prints. While an export is under way, the manifest is saved every few
seconds with "complete": false. Running an export again checks every shard and writes what is missing or damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torchvision.io import encode_png
from tqdm import tqdm

from glem_augment import __version__
from glem_augment.data.pixels import usable_cpus
from glem_augment.io import write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256

PROVENANCE = "glem-provenance.json"
# Seconds between two saves of the manifest: after a kill, the shards since the last one are drawn again.
SAVE_SECONDS = 5.0
# Files that a kill left under their temporary names, and the journal that exports of version 0.1.0 kept meanwhile.
_LEFT_OVER = re.compile(
    r"\.((\d{6,}\.png|glem-provenance\.json|\.glem-export\.jsonl)\.\d+-[0-9a-f]{8}\.tmp|glem-export\.jsonl)"
)
# Names that Windows gives to devices.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


class ImageSet(Protocol):
    """What is written: a `SyntheticDataset`, or an object that gives its classes other numbers."""

    model: GLEM
    classes: list[str]
    class_ids: list[str]
    counts: list[int]
    targets: list[int]
    image_shape: tuple[int, int, int]
    block: int
    source: str
    non_finite: int
    real_name: str | None

    def __len__(self) -> int: ...
    def settings(self) -> dict[str, Any]: ...
    def images(self, indices: Sequence[int]) -> Tensor: ...
    def decoded_block(self, cls: int, number: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Shard:
    """Block `number` of a class: `count` images from number `first`, in the class's folder."""

    cls: int
    number: int
    folder: str
    first: int
    count: int

    def paths(self, root: Path) -> list[Path]:
        return [root / self.folder / f"{i:06d}.png" for i in range(self.first, self.first + self.count)]

    def entry(self, sha256: str, not_finite: int) -> dict[str, Any]:
        """The shard's line in the manifest."""
        where = {"folder": self.folder, "first": self.first, "count": self.count}
        return {**where, "sha256": sha256, "not_finite": not_finite}


def export_imagefolder(
    dataset: ImageSet,
    folder: Path,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    progress: bool = True,
) -> Path:
    """Write folder/<class>/NNNNNN.png and the manifest; see `SyntheticDataset.export`."""
    names = class_folders(dataset.class_ids, dataset.classes)
    manifest = provenance(dataset, names) | {"license": licence_note(license, dataset.source)}
    old = check_folder(folder, overwrite)
    if old is not None and (found := differences(old, manifest)):
        if not overwrite:
            raise FileExistsError(
                f"{folder} is not empty: it holds an export of other images ({'; '.join(found[:4])}), "
                "which are not mixed: give another folder, or overwrite=True (glem generate --overwrite)"
            )
        # As long as the earlier manifest is there, a kill leaves no image of which nobody knows whose it is.
        _remove_images(folder, old)
        old = None
    if license is None and old is not None:
        manifest["license"] = old.get("license", manifest["license"])  # an earlier run may have stated it
    shards = [
        Shard(cls, number, names[cls], first, min(dataset.block, count - first))
        for cls, count in enumerate(dataset.counts)
        for number, first in enumerate(range(0, count, dataset.block))
    ]
    done = _intact(folder, shards, old)
    missing = [shard for shard in shards if shard not in done]

    def save(complete: bool) -> None:
        entries = [done[shard] for shard in shards if shard in done]
        not_finite = sum(entry["not_finite"] for entry in entries)
        new = {**manifest, "complete": complete, "images_not_finite": not_finite, "shards": entries}
        if missing or new != old:
            write_json(folder / PROVENANCE, new)

    if missing:
        save(complete=False)
        check_space(folder, sum(shard.count for shard in missing), dataset.image_shape)
        saved = time.monotonic()
        try:
            for shard, entry in _write(dataset, folder, missing, progress):
                done[shard] = entry
                if time.monotonic() - saved >= SAVE_SECONDS:
                    save(complete=False)
                    saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                if folder.is_dir():
                    save(complete=False)
            raise
    save(complete=True)
    for place in (folder, *(folder / name for name in names)):
        for path in place.iterdir() if place.is_dir() else ():
            if _LEFT_OVER.fullmatch(path.name):
                path.unlink()
    return folder


def _write(
    dataset: ImageSet, folder: Path, shards: Sequence[Shard], progress: bool
) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """Decode and write shards, and give each with its entry in the manifest once all its files are there."""
    threads = min(8, usable_cpus())
    waiting: deque[tuple[Shard, int, Future[str]]] = deque()
    bar = tqdm(total=sum(shard.count for shard in shards), unit="image", desc="export", disable=not progress)

    def finish() -> tuple[Shard, dict[str, Any]]:
        shard, not_finite, written = waiting.popleft()
        entry = shard.entry(written.result(), not_finite)
        bar.update(shard.count)
        return shard, entry

    pool = ThreadPoolExecutor(threads)
    try:
        # The PNGs of some shards are encoded and written while the next one is decoded.
        for shard in shards:
            images, not_finite = dataset.decoded_block(shard.cls, shard.number)
            if shard.first == 0:
                with naming(folder / shard.folder):
                    (folder / shard.folder).mkdir(exist_ok=True)
            waiting.append((shard, not_finite, pool.submit(_write_pngs, images, shard.paths(folder))))
            while waiting and (len(waiting) > threads or waiting[0][2].done()):
                yield finish()
        while waiting:
            yield finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()


def _write_pngs(images: Tensor, paths: Sequence[Path]) -> str:
    """Write images as PNG files; the SHA-256 of all their bytes, one file after another."""
    total = hashlib.sha256()
    for image, path in zip(images, paths, strict=True):
        data = as_png(image)
        total.update(data)
        # `io.atomic_write` would sync every one of these small files to the disk, which takes longer than all the rest.
        # What a power cut took is found by the hashes when the export is run again.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with naming(path):
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
    return total.hexdigest()


def as_png(image: Tensor) -> bytes:
    """A PNG of uint8 [1 or 3, H, W]."""
    return encode_png(image).numpy().tobytes()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make OSErrors inside name `path`, which the message of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def check_space(folder: Path, count: int, image_shape: tuple[int, int, int], archive: bool = False) -> None:
    """Refuse early if the images cannot fit on the disk; a noisy PNG is as large as its pixels.

    Args:
        folder: an existing one. count: images to write. archive: whether they go to tar files, in blocks of 512 bytes.

    Raises:
        OSError: too little space, naming the folder.
    """
    channels, height, width = image_shape
    size, block = channels * height * width + 100, 512 if archive else 4096
    # In an archive, three more blocks hold the label, its header and that of the image.
    needed = count * (-(-size // block) + 3 * archive) * block
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, the export of {count} images may need "
            f"{needed / 2**20:.0f} MiB: free some space, or give another folder"
        )


# ---- what is in the folder already -----------------------------------------------------------------------------------


def check_folder(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of an earlier export in the folder, finished or not; None if the folder is empty or missing.

    Raises:
        FileExistsError: the folder is a file, or holds anything that no export has written.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    old = read_manifest(folder / PROVENANCE)
    counts = {} if old is None else _counts(old)
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        name = path.relative_to(folder).as_posix()
        parent, _, stem = name.removesuffix(".png").rpartition("/")
        known = name == PROVENANCE or _LEFT_OVER.fullmatch(path.name) or (name in counts and path.is_dir())
        number = int(stem) if name.endswith(".png") and re.fullmatch(r"\d{6,}", stem) else -1
        if known or (0 <= number < counts.get(parent, 0) and f"{number:06d}" == stem):
            continue
        if old is None:
            raise FileExistsError(
                f"{folder} is not empty and holds no earlier export: give another folder; overwrite=True (--overwrite) "
                "replaces an export, and no files of others"
            )
        raise FileExistsError(
            f"{folder} holds {name!r}, which this export would not overwrite: move it away, or give another folder"
        )
    return old


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`; None if there is none that can be read."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _counts(manifest: dict[str, Any]) -> dict[str, int]:
    """The number of images in each class folder of an export; none if the manifest is damaged."""
    try:
        return {str(entry["folder"]): int(entry["count"]) for entry in manifest["classes"]}
    except (KeyError, TypeError, ValueError):
        return {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How two manifests describe different images, for people: "temperature 0.8 (not 0.9)", ..."""
    found = [f"{key} {old.get(key)} (not {new[key]})" for key in ("generator", "count") if old.get(key) != new[key]]
    a, b = old.get("settings"), new["settings"]
    a = a if isinstance(a, dict) else {}
    found += [f"{key} {a.get(key)} (not {b.get(key)})" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if old.get("weights_sha256") != new["weights_sha256"]:
        found.append("weights")
    if _drawn_classes(old) != _drawn_classes(new):
        found.append("classes")
    a, b = (table.get("model") for table in (old, new))
    a = a if isinstance(a, dict) else {}
    # The record of the training makes no image; a field that one version lacks has its default.
    if not a or any(a[key] != b[key] for key in a.keys() & b.keys() - {"training"}):
        found.append("model")
    return found


def _drawn_classes(manifest: Mapping[str, Any]) -> list[tuple[Any, ...]] | None:
    """The classes that have images; their numbers make no image."""
    try:
        keys = ("id", "name", "folder", "count")
        return [tuple(entry[key] for key in keys) for entry in manifest["classes"] if entry["count"]]
    except (KeyError, TypeError):
        return None


def _intact(folder: Path, shards: Sequence[Shard], old: dict[str, Any] | None) -> dict[Shard, dict[str, Any]]:
    """The manifest entries of the shards whose files are all there, with the hash that the manifest gives."""
    given = old.get("shards") if old is not None else None
    known: dict[Any, Any] = {}
    for entry in given if isinstance(given, list) else ():
        if isinstance(entry, dict):
            known[str((entry.get("folder"), entry.get("first"), entry.get("count")))] = entry

    def check(shard: Shard) -> dict[str, Any] | None:
        entry = known.get(str((shard.folder, shard.first, shard.count)), {})
        total = hashlib.sha256()
        try:
            for path in shard.paths(folder):
                total.update(path.read_bytes())
        except OSError:
            return None
        wanted = shard.entry(total.hexdigest(), entry.get("not_finite", 0))
        return entry if entry == wanted and type(entry["not_finite"]) is int else None

    with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        found = zip(shards, pool.map(check, shards), strict=True)
        return {shard: entry for shard, entry in found if entry is not None}


def _remove_images(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove the images of an earlier export; `check_folder` has seen that there are no others."""
    for name in _counts(manifest):
        if (folder / name).is_dir():
            for path in (folder / name).iterdir():
                path.unlink()
            (folder / name).rmdir()


# ---- the manifest ----------------------------------------------------------------------------------------------------


def provenance(dataset: ImageSet, names: Sequence[str]) -> dict[str, Any]:
    """The manifest without results: which flow draws the images, and with which settings.

    Args:
        names: the folders of the classes, see `class_folders`.
    """
    return {
        "synthetic": True,
        "complete": False,
        "generator": f"glem-augment {__version__}",
        "count": len(dataset),
        "settings": dataset.settings(),
        "classes": [
            {"index": i, "id": class_id, "name": name, "folder": names[i], "count": dataset.counts[i]}
            for i, (class_id, name) in enumerate(zip(dataset.class_ids, dataset.classes, strict=True))
        ],
        "weights_sha256": weights_sha256(dataset.model),
        "model": json.loads(json.dumps(dataclasses.asdict(dataset.model.config), default=str)),
    }


def licence_note(licence: str | None, source: str) -> str:
    """The licence that was stated, or a note that it is not known."""
    mixed = ", and of the real images that were mixed" if source == "mixup" else ""
    return licence or f"not stated; samples inherit the licence of the images that the flow was trained on{mixed}"


def class_folders(class_ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """A folder name for every class: its id if that is safe on every system, else a slug of its name.

    Ids that are plain numbers say little to a reader (class 3 of one data set is not class 3 of another), so names that
    are more than numbers take their place: "T-shirt/top" becomes "T-shirt_top". A slug has the letters and digits of
    the name, so that the classes are matched again when the folder is opened as data. Classes whose folders would be
    the same get their index appended.
    """
    numbers = all(re.fullmatch(r"\d+", text) for text in class_ids)
    named = not all(re.fullmatch(r"\d+", text) for text in names)
    folders: list[str] = []
    for index, (class_id, name) in enumerate(zip(class_ids, names, strict=True)):
        use_id = _safe(class_id) and not (numbers and named)
        folders.append((class_id if use_id else _slug(name)) or f"class_{index}")
    # Some file systems do not tell capitals apart.
    uses = Counter(folder.casefold() for folder in folders)
    taken = {key for key, count in uses.items() if count == 1}
    for index, folder in enumerate(folders):
        if uses[folder.casefold()] > 1:
            folder = f"{folder}_{index}"
            while folder.casefold() in taken:  # it is another class's name
                folder += "_"
            taken.add(folder.casefold())
            folders[index] = folder
    return folders


def _safe(text: str) -> bool:
    plain = re.fullmatch(r"[\w][\w.+ -]*", text) is not None and text[-1] not in ". " and len(text) <= 100
    return plain and text.split(".")[0].casefold() not in _RESERVED


def _slug(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    slug = re.sub(r"[^\w.+ -]+", "_", text).strip("_. ")[:100].rstrip("_. ")
    return slug if not slug or _safe(slug) else f"{slug}_"
