"""Publishing synthetic images: a data set on the Hub that ``datasets.load_dataset`` reads, with a card that says how
it was made.

Small sets are an image folder (``data/train/<class>/NNNNNN.png`` and ``metadata.jsonl``). The Hub takes no more than
10,000 files in a folder and 25,000 in a commit, so that larger ones are WebDataset shards (``data/train-*.tar``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from glem_augment.checks import check_choice
from glem_augment.errors import DataError
from glem_augment.hub import files as hub
from glem_augment.hub.cards import CardFacts
from glem_augment.io import atomic_write, write_json
from glem_augment.locks import abandoned, marked
from glem_augment.model.weights import WEIGHTS, weights_sha256
from glem_augment.synthetic.dataset_card import dataset_card
from glem_augment.synthetic.export import as_png, check_space, naming
from glem_augment.synthetic.manifest import read_manifest
from glem_augment.synthetic.provenance import PROVENANCE, class_folders, licence_note, settings_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from glem_augment.model.glem import GLEM
    from glem_augment.synthetic.dataset import SyntheticDataset

__all__ = ["FORMATS", "check_shards_folder", "export_shards", "push_dataset", "write_dataset"]

FORMATS = ("imagefolder", "webdataset")
# Of the Hub, and of one folder in one of its repositories.
MAX_FILES, MAX_FILES_IN_FOLDER = 25_000, 10_000
# Images of a shard, at most. A loader gives each worker whole shards, and workers beyond their number nothing, so there
# are this many, where each then has some images.
SHARD, SHARDS, SMALL_SHARD = 2_000, 16, 32
_BLOCK = 1_000
# What timm's reader wants to know of shards beside it. Loaders of the Hub read *.tar alone.
_SHARDS_INFO = "data/_info.json"
_log = logging.getLogger(__name__)


def push_dataset(
    dataset: SyntheticDataset,
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
    """Upload all images of ``dataset`` with a data card, in one commit.

    What an earlier push left under ``data/`` is removed in the same commit. Transforms are not applied.

    Args:
        dataset: its classes become the names of the column ``label`` (``cls`` in shards), in index order.
        repo_id: ``org/name`` of a data set; made where there is none.
        format: "imagefolder" or "webdataset"; by default by the number of images.
        license, license_name, license_link: of the images that the flow was trained on, which passes on to its samples;
            an identifier of the Hub. Left out of the card, with a warning, where it is not given.
        commit_message, private, token, revision, create_pr: as in ``GLEM.push_to_hub``.

    Returns:
        huggingface_hub's ``CommitInfo``; ``load_dataset(repo_id, revision=info.oid)`` reads these very images.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        DataError: too many images for the format. ValueError: a format or licence that can't be used, or a flow of
            neither 1 nor 3 channels. OSError: no space for the files on the way.
    """
    from glem_augment.hub.upload import commit, prepare

    facts = CardFacts(license, license_name, license_link)
    if facts.license is None:
        _log.warning(
            "no licence is given, so the card of %s says that it is unknown. Samples inherit the licence of the images "
            "that the flow was trained on: state it with license=",
            repo_id,
        )
    with tempfile.TemporaryDirectory(prefix="glem-push-") as folder:
        format = _format(dataset, format)
        # Before the images, which may take hours: a missing permission should not.
        target: dict[str, Any] = dict(repo_type="dataset", token=token, revision=revision, create_pr=create_pr)
        repo_id = prepare(repo_id, private=private, **target)
        files = write_dataset(dataset, Path(folder), repo_id, facts, format)
        message = commit_message or f"Upload {len(dataset)} synthetic images with glem-augment"
        return commit(repo_id, files, message, **target, delete_others_in="data")


def write_dataset(
    dataset: SyntheticDataset,
    folder: Path,
    repo_id: str,
    facts: CardFacts | None = None,
    format: str | None = None,  # noqa: A002
    progress: bool = True,
) -> dict[str, Path]:
    """Write what a push would upload: images with their labels, provenance, card.

    Args:
        folder: an empty one, made if missing; the others as in `push_dataset`.

    Returns:
        Names in the repository -> files.
    """
    from glem_augment.hub.upload import CARD, GENERATED

    format = _format(dataset, format)
    write = _write_imagefolder if format == "imagefolder" else _write_shards
    files = write(dataset, folder, progress)
    facts = facts or CardFacts()
    origin = {
        **_provenance(dataset, format),
        "license": licence_note(facts.license_name or facts.license, dataset.source),
    }
    write_json(folder / PROVENANCE, origin)
    card = dataset_card(dataset, repo_id, facts, origin)
    with atomic_write(folder / CARD, "w") as file:
        file.write(f"{card}\n{GENERATED}\n")
    return {**files, PROVENANCE: folder / PROVENANCE, CARD: folder / CARD}


def export_shards(
    dataset: SyntheticDataset,
    folder: Path,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002
    progress: bool = True,
) -> Path:
    """Write WebDataset shards, card and provenance to ``folder``, in one step at the end.

    What an export to the same folder left beside it when it was killed is removed.

    Raises:
        FileExistsError: see `check_shards_folder`.
    """
    _remove_left_over(Path(os.path.realpath(folder)))
    folder = check_shards_folder(folder, overwrite)
    with naming(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, dataset)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place, marked(Path(place)):
        write_dataset(dataset, Path(place) / "new", folder.name, CardFacts(license), "webdataset", progress)
        if folder.exists():
            # The whole folder goes: files may have been put there in the meantime.
            check_shards_folder(folder, overwrite)
            os.replace(folder, Path(place) / "old")
        os.replace(Path(place) / "new", folder)
    return folder


def _remove_left_over(folder: Path) -> None:
    """Clear away the hidden folders in which exports to ``folder`` were made whose processes were killed."""
    with contextlib.suppress(OSError):  # no parent, or one that can't be read
        for place in list(folder.parent.iterdir()):
            if re.fullmatch(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}", place.name) and abandoned(place):
                # Killed between the two moves: after the second there is no new one, and perhaps half of the old.
                if not folder.exists() and (place / "new").exists() and (place / "old").exists():
                    os.replace(place / "old", folder)
                shutil.rmtree(place, ignore_errors=True)


def check_shards_folder(folder: Path, overwrite: bool) -> Path:
    """``folder``, absolute, for `export_shards`.

    Raises:
        FileExistsError: it is not empty, unless it holds such an export and nothing else, and ``overwrite`` is given.
        OSError: it is there and can't be replaced by the finished export.
    """
    folder = Path(os.path.realpath(folder))  # "." has no name to make another one from; a link stays one
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    if folder.exists() and (os.path.ismount(folder) or not os.access(folder, os.W_OK)):
        why = "a mount point" if os.path.ismount(folder) else "read-only"
        raise OSError(f"{folder} is {why}, and shards take a folder's place in one step: give a new folder, say in it")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty: give another folder, or --overwrite")
    if (read_manifest(folder / PROVENANCE) or {}).get("format") != "webdataset":
        raise FileExistsError(f"{folder} holds no earlier export of shards and is left alone: give another folder")
    ours = _written_by_export(folder)
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    foreign = next((name for name in there if name not in ours), None)
    if foreign is not None:
        raise FileExistsError(
            f"{folder} holds {foreign!r}, which is not of an earlier export: move it away, or give another folder"
        )
    return folder


def _written_by_export(folder: Path) -> set[str]:
    """Names of all that the export of shards in ``folder`` has written there, as its own records tell."""
    from glem_augment.hub.upload import CARD, GENERATED

    names = {PROVENANCE, "data", _SHARDS_INFO}
    # Where this file is damaged, the shards are not known to be ours.
    with contextlib.suppress(KeyError, TypeError):
        info = read_manifest(folder / _SHARDS_INFO) or {}
        names |= {f"data/{name}" for name in info["splits"]["train"]["filenames"]}
    # A card without this line is somebody's own.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if GENERATED in (folder / CARD).read_text(encoding="utf-8"):
            names.add(CARD)
    return names


def _format(dataset: SyntheticDataset, format: str | None) -> str:  # noqa: A002
    if dataset.image_shape[0] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, this flow {dataset.image_shape[0]}")
    most = max(dataset.counts)
    # Beside the images there are a few other files.
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


# ---- files -------------------------------------------------------------------------------------------------------


def _write_imagefolder(dataset: SyntheticDataset, folder: Path, progress: bool) -> dict[str, Path]:
    names = class_folders(dataset.class_ids, dataset.classes)
    files, rows = {}, []
    for index, label, within, png in _pngs(dataset, progress):
        name = f"{names[label]}/{within:06d}.png"
        path = folder / "data" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        files[f"data/train/{name}"] = path
        rows.append({"file_name": name, "label": label, "index": index})
    table = folder / "data" / "train" / "metadata.jsonl"
    with atomic_write(table, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files["data/train/metadata.jsonl"] = table
    return files


def _write_shards(dataset: SyntheticDataset, folder: Path, progress: bool) -> dict[str, Path]:
    """Image i goes to shard i mod S, so that every shard holds every class; ``_info.json`` is for timm's reader."""
    count = max(-(-len(dataset) // SHARD), min(SHARDS, -(-len(dataset) // SMALL_SHARD)))
    names = [f"data/train-{i:05d}-of-{count:05d}.tar" for i in range(count)]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    # Appended to a block of images at a time: so many shards can't all be kept open.
    waiting: dict[int, list[bytes]] = {shard: [] for shard in range(count)}
    for index, label, _, png in _pngs(dataset, progress):
        waiting[index % count] += [_tar_entry(f"{index:08d}.png", png), _tar_entry(f"{index:08d}.cls", b"%d" % label)]
        if (index + 1) % _BLOCK == 0:
            _append(folder, names, waiting)
    for parts in waiting.values():
        parts.append(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive
    _append(folder, names, waiting)
    lengths = [len(range(i, len(dataset), count)) for i in range(count)]
    split = {
        "name": "train",
        "num_samples": len(dataset),
        "filenames": [Path(name).name for name in names],
        "shard_lengths": lengths,
    }
    write_json(folder / _SHARDS_INFO, {"splits": {"train": split}})
    return {name: folder / name for name in (*names, _SHARDS_INFO)}


def _tar_entry(name: str, data: bytes) -> bytes:
    """A file as an archive holds it. Only name and size, no time: the same images give the same shards."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    return entry.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _append(folder: Path, names: list[str], waiting: dict[int, list[bytes]]) -> None:
    for shard, parts in waiting.items():
        with naming(folder / names[shard]), open(folder / names[shard], "ab") as file:
            file.write(b"".join(parts))
        parts.clear()


def _pngs(dataset: SyntheticDataset, progress: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """Index, label, place within the class, and PNG of every image, in order."""
    within = [0] * len(dataset.classes)
    with tqdm(total=len(dataset), unit="image", desc="export", disable=not progress) as bar:
        for start in range(0, len(dataset), _BLOCK):
            indices = range(start, min(len(dataset), start + _BLOCK))
            for index, image in zip(indices, dataset.images(indices), strict=True):
                label = dataset.targets[index]
                yield index, label, within[label], as_png(image)
                within[label] += 1
                bar.update()


# ---- where it came from ------------------------------------------------------------------------------------------


def _provenance(dataset: SyntheticDataset, format: str) -> dict[str, Any]:  # noqa: A002
    from glem_augment import __version__

    names = class_folders(dataset.class_ids, dataset.classes)
    model = dataset.model
    return {
        "synthetic": True,
        "complete": True,
        "generator": f"glem-augment {__version__}",
        "flow": {"weights_sha256": weights_sha256(model), "loaded_from": _origin(model)},
        "format": format,
        "count": len(dataset),
        "images_not_finite": dataset.non_finite,
        "settings": settings_of(dataset),
        "classes": [
            {"index": i, "id": class_id, "name": name, "folder": names[i], "count": dataset.counts[i]}
            for i, (class_id, name) in enumerate(zip(dataset.class_ids, dataset.classes, strict=True))
        ],
    }


def _origin(model: GLEM) -> str | None:
    """``org/name@commit``, if the model is still what was loaded from there."""
    if model.origin is None:
        return None
    try:
        weights = model.origin_file
        if weights is None or not weights.is_file():
            weights = hub.locate(f"hf-hub:{model.origin}") / WEIGHTS
        same = hashlib.sha256(weights.read_bytes()).hexdigest() == weights_sha256(model)
    except (hub.HubError, OSError):
        same = False
    return model.origin if same else None
