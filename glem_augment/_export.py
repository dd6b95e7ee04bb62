"""Writing a SyntheticDataset to an ImageFolder, with where it came from beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from glem_augment.io import write_json

if TYPE_CHECKING:
    from glem_augment.synthetic import SyntheticDataset

PROVENANCE = "glem-provenance.json"
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


def export_imagefolder(dataset: SyntheticDataset, folder: Path, progress: bool = True, overwrite: bool = False) -> Path:
    """Write folder/<class>/NNNNNN.png and the provenance; see `SyntheticDataset.export`."""
    names = class_folders(dataset.class_ids, dataset.classes)
    _prepare(folder, names, overwrite)
    _check_space(folder, dataset)
    blocks = [(cls, number) for cls, count in enumerate(dataset.counts) for number in range(-(-count // dataset.block))]
    before = dataset.non_finite
    # First, so that an export which was cut off is known as one and may be overwritten.
    write_json(folder / PROVENANCE, _provenance(dataset, names, complete=False))
    threads = min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=threads)
    running: deque[list[Future[int]]] = deque()
    bar = tqdm(total=len(dataset), unit="image", desc="export", disable=not progress)
    try:
        # PNGs of one block are encoded while the next is decoded; no more than two blocks wait in memory.
        for index, (cls, number) in enumerate(blocks):
            images = dataset.decoded_block(cls, number)
            if index + 1 < len(blocks):
                dataset.decode_ahead(*blocks[index + 1])
            first = number * dataset.block
            paths = [folder / names[cls] / f"{first + i:06d}.png" for i in range(len(images))]
            # One task per thread: the thread that decodes needs the interpreter too, and a task for each image
            # would take it away more often.
            share = -(-len(images) // threads)
            running.append(
                [
                    pool.submit(_write_pngs, images[i : i + share], paths[i : i + share])
                    for i in range(0, len(images), share)
                ]
            )
            while len(running) > 2:
                bar.update(_wait(running.popleft()))
        while running:
            bar.update(_wait(running.popleft()))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    _remove_left_over(folder, names, dataset.counts)
    done = _provenance(dataset, names, complete=True)
    write_json(folder / PROVENANCE, {**done, "images_not_finite": dataset.non_finite - before})
    return folder


def _prepare(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make the class folders, or refuse before anything is written."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if present and not overwrite:
        raise FileExistsError(f"{folder} is not empty: give another folder, or overwrite=True")
    # An export with other classes mixed in would be read as one data set.
    foreign = [name for name in present if name not in names and name != PROVENANCE]
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0]!r}, which this export would not overwrite: give another folder"
        )
    if present and PROVENANCE not in present:
        raise FileExistsError(
            f"{folder} has no {PROVENANCE}, so it is no earlier export and is left alone: give another folder"
        )
    for name in names:
        with _naming(folder / name):
            (folder / name).mkdir(parents=True, exist_ok=True)


def _check_space(folder: Path, dataset: SyntheticDataset) -> None:
    """Refuse early where the images can't fit: a noisy PNG is as large as its pixels, in whole blocks."""
    channels, height, width = dataset.image_shape
    per_image = -(-(channels * height * width + 100) // 4096) * 4096
    needed, free = len(dataset) * per_image, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, the export of {len(dataset)} images may need "
            f"{needed / 2**20:.0f} MiB: free some space, or give another folder"
        )


def _write_pngs(images: Tensor, paths: Sequence[Path]) -> int:
    for image, path in zip(images, paths, strict=True):
        _write_png(image, path)
    return len(paths)


def _write_png(image: Tensor, path: Path) -> None:
    from glem_augment.synthetic import to_pil

    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    # Not `io.atomic_write`: its fsync for each of many small files would take longer than all the rest.
    # Only the provenance, written last, says that an export is complete.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _naming(path):
        try:
            temporary.write_bytes(buffer.getvalue())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _naming(path: Path) -> Any:
    """OSErrors inside name `path` (a full disk's own message does not)."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def _wait(futures: list[Future[int]]) -> int:
    return sum(future.result() for future in futures)


def _remove_left_over(folder: Path, names: Sequence[str], counts: Sequence[int]) -> None:
    """Of an earlier, larger export: images that this one has not written."""
    for name, count in zip(names, counts, strict=True):
        for path in (folder / name).glob("*.png"):
            if re.fullmatch(r"\d{6,}", path.stem) and int(path.stem) >= count:
                path.unlink()


def _provenance(dataset: SyntheticDataset, names: Sequence[str], complete: bool) -> dict[str, Any]:
    from glem_augment import __version__

    return {
        "synthetic": True,
        "complete": complete,
        "generator": f"glem-augment {__version__}",
        "count": len(dataset),
        "settings": {
            "per_class": dataset.per_class,
            "temperature": dataset.temperature,
            "seed": dataset.seed,
            "source": dataset.source,
            "block": dataset.block,
        },
        "classes": [
            {"index": i, "id": class_id, "name": name, "folder": names[i], "count": dataset.counts[i]}
            for i, (class_id, name) in enumerate(zip(dataset.class_ids, dataset.classes, strict=True))
        ],
        "model": _plain(dataset.model.config),
    }


def _plain(config: Any) -> Any:
    """A model's configuration as JSON can carry it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return json.loads(json.dumps(config, default=str))
