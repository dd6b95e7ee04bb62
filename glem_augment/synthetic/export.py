"""Writing a SyntheticDataset to an ImageFolder, with where it came from beside it.

Block by block: each is a shard of the manifest (see `_manifest`). Running an export again checks every shard, writes
those that are missing or damaged, and refuses a folder with images of other settings, or with files of others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchvision.io import encode_png
from tqdm import tqdm

from glem_augment.data.decoding import usable_cpus
from glem_augment.io import write_json
from glem_augment.synthetic.export_folder import clean, prepare, remove_left_over
from glem_augment.synthetic.manifest import Journal, Shard, digest, image_name, intact, shards_of
from glem_augment.synthetic.provenance import PROVENANCE, class_folders, licence_note, plain, provenance

if TYPE_CHECKING:
    from glem_augment.synthetic.dataset import SyntheticDataset


def export_imagefolder(
    dataset: SyntheticDataset,
    folder: Path,
    progress: bool = True,
    overwrite: bool = False,
    license: str | None = None,  # noqa: A002  (the Hub's word)
) -> Path:
    """Write folder/<class>/NNNNNN.png and the provenance; see `SyntheticDataset.export`."""
    names = class_folders(dataset.class_ids, dataset.classes)
    wanted = {**provenance(dataset, names), "license": licence_note(license, dataset.source)}
    journal = Journal(folder, wanted)
    old = prepare(folder, wanted, overwrite)
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
        if {key: old.get(key) for key in whole} != plain(whole):
            # Another record of the training, say: the images are the same.
            write_json(folder / PROVENANCE, _finished(whole, dataset, kept))
        clean(folder, names, dataset.counts, journal)
        return folder
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, dataset, [path for block in blocks for path in _paths(folder, names, dataset, *block)])
    if old is None:
        # While the earlier export's manifest is still there: after a kill, nothing else tells whose these are.
        remove_left_over(folder, names, dataset.counts)
    # In this order: an export that was cut off is known as one, and knows which of its shards were whole.
    with naming(journal.path):
        journal.start(kept.values())
    write_json(folder / PROVENANCE, {**wanted, "complete": False})
    for name, count in zip(names, dataset.counts, strict=True):
        if not count:
            continue  # torchvision refuses empty class folders
        with naming(folder / name):
            (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        for block, shard in _written(dataset, folder, names, blocks, threads, progress):
            with naming(journal.path):
                journal.add(shard)
            kept[block] = shard
    finally:
        journal.close()
    write_json(folder / PROVENANCE, _finished(whole, dataset, kept))
    clean(folder, names, dataset.counts, journal)
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
            paths = _paths(folder, names, dataset, cls, number)
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


def _paths(folder: Path, names: Sequence[str], dataset: SyntheticDataset, cls: int, number: int) -> list[Path]:
    first = number * dataset.block
    return [folder / names[cls] / image_name(first + i) for i in range(_size(dataset, cls, number))]


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


def check_space(folder: Path, dataset: SyntheticDataset, paths: Sequence[Path] | None = None) -> None:
    """Refuse early where the images can't fit: a noisy PNG is as large as its pixels, in whole blocks.

    Args:
        folder: is there; paths: of the images to write, None for all images in archives.
    """
    channels, height, width = dataset.image_shape
    pixels, count = channels * height * width + 100, len(dataset) if paths is None else len(paths)
    # An archive has blocks of 512 bytes: the pixels, the label, and what comes before each.
    per_image = -(-pixels // 4096) * 4096 if paths is not None else -(-pixels // 512) * 512 + 3 * 512
    needed, free = count * per_image, shutil.disk_usage(folder).free
    if needed > free and paths is not None:  # what is written over gives its space back
        free += sum(path.stat().st_blocks * 512 for path in paths if path.is_file())
    if needed > free:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, the export of {count} images may need "
            f"{needed / 2**20:.0f} MiB: free some space, or give another folder"
        )


def as_png(image: Tensor) -> bytes:
    """A PNG of uint8 [1 or 3, H, W]. PIL would need the interpreter for it, as does the thread that decodes."""
    return encode_png(image).numpy().tobytes()


def _write_pngs(images: Tensor, paths: Sequence[Path]) -> list[bytes]:
    return [_write_png(image, path) for image, path in zip(images, paths, strict=True)]


def _write_png(image: Tensor, path: Path) -> bytes:
    data = as_png(image)
    # Not `io.atomic_write`: its fsync for each of many small files would take longer than all the rest.
    # The manifest has the hashes, and what a power cut took is found by running the export again.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    return data


@contextlib.contextmanager
def naming(path: Path) -> Any:
    """OSErrors inside name `path` (a full disk's own message does not)."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
