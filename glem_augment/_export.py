"""Writing a SyntheticDataset to an ImageFolder, with where it came from beside it.

Block by block: each is a shard of the manifest (see `_manifest`). Running an export again checks every shard, writes
those that are missing or damaged, and refuses a folder with images of other settings, or with files of others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from glem_augment._manifest import (
    JOURNAL,
    Journal,
    Shard,
    differences,
    digest,
    image_name,
    intact,
    read_manifest,
    shards_of,
)
from glem_augment.decoding import usable_cpus
from glem_augment.io import write_json

if TYPE_CHECKING:
    from glem_augment.synthetic import SyntheticDataset

PROVENANCE = "glem-provenance.json"
# Of settings: what tells the real images apart that are mixed. Known once these are encoded.
REAL_LATENTS = "real_latents_sha256"
# Names that Windows gives to devices.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


def class_folders(class_ids: Sequence[str], names: Sequence[str]) -> list[str]:
    """A folder name for every class: its id if that is safe on every system, else a slug of its name.

    Ids that are plain numbers say little to a reader (class 3 of one data set is not class 3 of another), so
    where the names are more than numbers they are taken instead: "T-shirt/top" becomes "T-shirt_top". A slug
    has the letters and digits of the name, so that the classes are matched again when the folder is opened as
    data. Classes whose folders would be the same get their index appended.
    """
    numbers = all(re.fullmatch(r"\d+", text) for text in class_ids)
    named = not all(re.fullmatch(r"\d+", text) for text in names)
    folders: list[str] = []
    for index, (class_id, name) in enumerate(zip(class_ids, names, strict=True)):
        ids_serve = _safe(class_id) and not (numbers and named)
        folder = class_id if ids_serve else _slug(name)
        folders.append(folder or f"class_{index}")
    # Some file systems do not tell capitals apart.
    lower = [folder.casefold() for folder in folders]
    return [f"{f}_{i}" if lower.count(lower[i]) > 1 else f for i, f in enumerate(folders)]


def _safe(text: str) -> bool:
    plain = re.fullmatch(r"[\w][\w.+ -]*", text) is not None and text[-1] not in ". " and len(text) <= 100
    return plain and text.split(".")[0].casefold() not in RESERVED


def _slug(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    slug = re.sub(r"[^\w.+ -]+", "_", text).strip("_. ")[:100].rstrip("_. ")
    return slug if not slug or _safe(slug) else f"{slug}_"


def licence_note(licence: str | None) -> str:
    """What an export's provenance says of the licence: the one that was stated, or that it is not known."""
    return licence or "not stated; samples inherit the licence of the images that the flow was trained on"


def export_imagefolder(
    dataset: SyntheticDataset,
    folder: Path,
    progress: bool = True,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002  (the Hub's word)
) -> Path:
    """Write folder/<class>/NNNNNN.png and the provenance; see `SyntheticDataset.export`."""
    names = class_folders(dataset.class_ids, dataset.classes)
    wanted = {**_provenance(dataset, names), "license": licence_note(license)}
    journal = Journal(folder, wanted)
    old = _prepare(folder, wanted, overwrite)
    if license is None and old is not None and isinstance(old.get("license"), str):
        wanted["license"] = old["license"]  # stated when it was begun
    threads = min(8, usable_cpus())
    kept = _kept(folder, names, dataset, [*shards_of(old), *journal.read()] if old is not None else [], threads)
    blocks = [
        (cls, number)
        for cls, count in enumerate(dataset.counts)
        for number in range(-(-count // dataset.block))
        if (cls, number) not in kept
    ]
    whole = {**wanted, "complete": True}
    if not blocks and old is not None and old.get("complete") is True:
        if {key: old.get(key) for key in whole} != _plain(whole):
            # Another record of the training, say: the images are the same.
            write_json(folder / PROVENANCE, _finished(whole, dataset, kept))
        _clean(folder, names, dataset.counts, journal)
        return folder
    _check_space(folder, dataset, sum(_size(dataset, *block) for block in blocks))
    if old is None:
        # While the earlier export's manifest is still there: after a kill, nothing else tells whose these are.
        _remove_left_over(folder, names, dataset.counts)
    # In this order: an export that was cut off is known as one, and knows which of its shards were whole.
    with _naming(journal.path):
        journal.start(kept.values())
    write_json(folder / PROVENANCE, {**wanted, "complete": False})
    for name, count in zip(names, dataset.counts, strict=True):
        if not count:
            continue  # torchvision refuses empty class folders
        with _naming(folder / name):
            (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        for block, shard in _written(dataset, folder, names, blocks, threads, progress):
            with _naming(journal.path):
                journal.add(shard)
            kept[block] = shard
    finally:
        journal.close()
    write_json(folder / PROVENANCE, _finished(whole, dataset, kept))
    _clean(folder, names, dataset.counts, journal)
    return folder


Block = tuple[int, int]


def _written(
    dataset: SyntheticDataset, folder: Path, names: Sequence[str], blocks: Sequence[Block], threads: int, progress: bool
) -> Iterator[tuple[Block, Shard]]:
    """Decode and write ``blocks`` (class, number); each with its shard once all its files are there."""
    pool = ThreadPoolExecutor(max_workers=threads)
    running: deque[tuple[Block, int, list[Future[list[bytes]]]]] = deque()
    bar = tqdm(total=sum(_size(dataset, *block) for block in blocks), unit="image", desc="export", disable=not progress)

    def finish() -> tuple[Block, Shard]:
        (cls, number), not_finite, futures = running.popleft()
        files = [data for future in futures for data in future.result()]
        bar.update(len(files))
        shard = Shard(names[cls], number * dataset.block, len(files), digest(files), not_finite)
        return (cls, number), shard

    try:
        # PNGs of one block are encoded while the next is decoded; no more than two blocks wait in memory.
        for index, (cls, number) in enumerate(blocks):
            images = dataset.decoded_block(cls, number)
            not_finite = dataset.not_finite_in(cls, number)
            if index + 1 < len(blocks):
                dataset.decode_ahead(*blocks[index + 1])
            first = number * dataset.block
            paths = [folder / names[cls] / image_name(first + i) for i in range(len(images))]
            # One task per thread: the thread that decodes needs the interpreter too, and a task for each image
            # would take it away more often.
            share = -(-len(images) // threads)
            tasks = [
                pool.submit(_write_pngs, images[i : i + share], paths[i : i + share])
                for i in range(0, len(images), share)
            ]
            running.append(((cls, number), not_finite, tasks))
            # What is done is told at once: a shard that nobody has heard of is written again after a kill.
            while running and (len(running) > 2 or all(task.done() for task in running[0][2])):
                yield finish()
        while running:
            yield finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()


def _size(dataset: SyntheticDataset, cls: int, number: int) -> int:
    return min(dataset.block, dataset.counts[cls] - number * dataset.block)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse what no images may be exported to, as far as that is known without them; see `check_imagefolder`.

    Raises:
        FileExistsError: a file, or a folder that is not empty and holds no export, unless ``overwrite``.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    if not overwrite and _present(folder) and read_manifest(folder / PROVENANCE) is None:
        raise FileExistsError(f"{folder} is not empty: give another folder, or overwrite=True (--overwrite)")


def check_imagefolder(dataset: SyntheticDataset, folder: Path, overwrite: bool) -> None:
    """Refuse a folder that `export_imagefolder` would refuse.

    Args:
        dataset: may lack its real latents, which take long: they are taken for those of the export that is there.

    Raises:
        FileExistsError: the folder holds an export of other images, unless ``overwrite``, or anything else.
    """
    _prepare(folder, _provenance(dataset, class_folders(dataset.class_ids, dataset.classes)), overwrite)


def _prepare(folder: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest of an export of the same images that is there already, finished or not; None: write everything.

    Raises:
        FileExistsError: the folder holds anything else, and nothing has been written.
    """
    check_folder(folder, overwrite)
    present = _present(folder)
    if not present:
        return None
    old = read_manifest(folder / PROVENANCE)
    other = _differences(old, wanted) if old is not None else []
    if other and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: it holds an export of other images ({'; '.join(other[:4])}), "
            "which are not mixed: give another folder, or overwrite=True (glem generate --overwrite)"
        )
    # An export with other images mixed in would be read as one data set. Where the manifest is too damaged to say what
    # the earlier export wrote, files with the names of this one's are taken for it.
    counts = _images_of(wanted) or {}
    earlier = counts if old is None else _images_of(old) or counts
    foreign = next(_foreign(folder, {name: earlier.get(name, 0) for name in counts}), None)
    if foreign is not None:
        raise FileExistsError(
            f"{folder} holds {foreign!r}, which this export would not overwrite: move it away, or give another folder"
        )
    if old is not None and not other:
        return old
    if PROVENANCE not in present:
        raise FileExistsError(
            f"{folder} has no {PROVENANCE}, so it is no earlier export and is left alone: give another folder"
        )
    return None


def _present(folder: Path) -> list[str]:
    """What is in the folder, without what a run leaves that was killed before it could say what it would write."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in names if name != JOURNAL and not _temporary(name)]


def _differences(old: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`differences`, but for real latents that are not known yet."""
    settings, before = wanted["settings"], old.get("settings")
    if settings.get(REAL_LATENTS, "") is None and isinstance(before, dict):
        wanted = {**wanted, "settings": {**settings, REAL_LATENTS: before.get(REAL_LATENTS)}}
    return differences(old, wanted)


def _images_of(manifest: dict[str, Any]) -> dict[str, int] | None:
    """How many images the export has in each class folder, from 000000.png; None where the manifest is damaged."""
    try:
        counts = {entry["folder"]: entry["count"] for entry in manifest["classes"]}
    except (KeyError, TypeError):
        return None
    whole = all(type(name) is str and type(count) is int for name, count in counts.items())
    return counts if whole else None


def _foreign(folder: Path, counts: dict[str, int]) -> Iterator[str]:
    """What is in the folder beside an export with so many images in each class folder."""
    for name in _present(folder):
        if name == PROVENANCE:
            continue
        if name not in counts or not (folder / name).is_dir():
            yield name
            continue
        for path in (folder / name).iterdir():
            if not _temporary(path.name) and not 0 <= _number(path.name) < counts[name]:
                yield f"{name}/{path.name}"


def _number(name: str) -> int:
    """Of an image with the name that an export gives it; -1 for any other file."""
    stem = name.removesuffix(".png")
    return int(stem) if re.fullmatch(r"[0-9]{6,}", stem) and image_name(int(stem)) == name else -1


def _remove_left_over(folder: Path, names: Sequence[str], counts: Sequence[int]) -> None:
    """Images of an earlier, larger export; `_prepare` has seen that there are no others."""
    for name, count in zip(names, counts, strict=True):
        for path in (folder / name).iterdir() if (folder / name).is_dir() else ():
            if _number(path.name) >= count:
                path.unlink()


def _kept(
    folder: Path, names: Sequence[str], dataset: SyntheticDataset, known: Sequence[Shard], threads: int
) -> dict[Block, Shard]:
    """The blocks that need not be written again: those of which all files have the hash that is known."""
    places = {name: cls for cls, name in enumerate(names)}
    fitting: dict[Block, Shard] = {}
    for shard in known:
        cls, number = places.get(shard.folder, -1), shard.first // dataset.block
        if cls >= 0 and shard.first == number * dataset.block and shard.count == _size(dataset, cls, number):
            fitting[cls, number] = shard
    good = intact(folder, list(fitting.values()), threads)
    return {block: shard for (block, shard), whole in zip(fitting.items(), good, strict=True) if whole}


def _finished(whole: dict[str, Any], dataset: SyntheticDataset, kept: dict[Block, Shard]) -> dict[str, Any]:
    shards = [kept[block] for block in sorted(kept)]
    return {
        **whole,
        "images_not_finite": sum(shard.not_finite for shard in shards),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }


def _clean(folder: Path, names: Sequence[str], counts: Sequence[int], journal: Journal) -> None:
    """What is not part of the export: the journal, files that a kill left unfinished, folders that are empty now."""
    journal.remove()
    for path in folder.iterdir():
        if _temporary(path.name):
            path.unlink()
    for name, count in zip(names, counts, strict=True):
        if not (folder / name).is_dir():
            continue  # a class of no images
        for path in (folder / name).iterdir():
            if _temporary(path.name):
                path.unlink()
        if not count and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def _temporary(name: str) -> bool:
    """Whether a kill left this file of ours under its temporary name."""
    return (
        re.fullmatch(r"\.(\d{6,}\.png|glem-provenance\.json|\.glem-export\.jsonl)\.\d+-[0-9a-f]{8}\.tmp", name)
        is not None
    )


def _check_space(folder: Path, dataset: SyntheticDataset, count: int) -> None:
    """Refuse early where the images can't fit: a noisy PNG is as large as its pixels, in whole blocks."""
    channels, height, width = dataset.image_shape
    per_image = -(-(channels * height * width + 100) // 4096) * 4096
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    needed, free = count * per_image, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, the export of {count} images may need "
            f"{needed / 2**20:.0f} MiB: free some space, or give another folder"
        )


def _write_pngs(images: Tensor, paths: Sequence[Path]) -> list[bytes]:
    return [_write_png(image, path) for image, path in zip(images, paths, strict=True)]


def _write_png(image: Tensor, path: Path) -> bytes:
    from glem_augment.synthetic import to_pil

    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    data = buffer.getvalue()
    # Not `io.atomic_write`: its fsync for each of many small files would take longer than all the rest.
    # The manifest has the hashes, and what a power cut took is found by running the export again.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _naming(path):
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    return data


@contextlib.contextmanager
def _naming(path: Path) -> Any:
    """OSErrors inside name `path` (a full disk's own message does not)."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def _provenance(dataset: SyntheticDataset, names: Sequence[str]) -> dict[str, Any]:
    """The manifest without results: what was asked for."""
    from glem_augment import __version__, hub

    return {
        "synthetic": True,
        "complete": False,
        "generator": f"glem-augment {__version__}",
        "count": len(dataset),
        "settings": settings_of(dataset),
        "classes": [
            {"index": i, "id": class_id, "name": name, "folder": names[i], "count": dataset.counts[i]}
            for i, (class_id, name) in enumerate(zip(dataset.class_ids, dataset.classes, strict=True))
        ],
        "weights_sha256": hub.weights_sha256(dataset.model),
        "model": _plain(dataset.model.config),
    }


def settings_of(dataset: SyntheticDataset) -> dict[str, Any]:
    """All that decides what the images are, beside weights and classes; RuntimeError after a change of these."""
    dataset.check_model()
    settings: dict[str, Any] = {
        "per_class": dataset.per_class,
        "temperature": dataset.temperature,
        "seed": dataset.seed,
        "source": dataset.source,
        "block": dataset.block,
    }
    latents, rejection = dataset.latent_source, dataset.rejection
    if dataset.source == "mixup":
        settings |= {"modes": latents.modes, "alpha": latents.alpha, REAL_LATENTS: None}
    if latents.real is not None:
        real = latents.real.z.numpy().tobytes() + latents.real.counts.tobytes()
        settings[REAL_LATENTS] = hashlib.sha256(real).hexdigest()
    if rejection is not None:
        oracle = "posterior" if rejection.oracle is None else _oracle(rejection.oracle)
        settings |= {
            "min_confidence": rejection.min_confidence,
            "max_attempts": rejection.max_attempts,
            "oracle": oracle,
        }
    return settings


def _oracle(oracle: Any) -> str:
    """The name of a judge, and the SHA-256 of its weights where it has any."""
    named = oracle if hasattr(oracle, "__qualname__") else type(oracle)
    name = f"{named.__module__}.{named.__qualname__}"
    if not isinstance(oracle, nn.Module):
        return name
    total = hashlib.sha256()
    for key, value in oracle.state_dict().items():
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{name}, weights {total.hexdigest()}"


def _plain(config: Any) -> Any:
    """A model's configuration as JSON can carry it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return json.loads(json.dumps(config, default=str))
