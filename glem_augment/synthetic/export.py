"""Writing a synthetic set, as an ImageFolder or as WebDataset shards, with a manifest that says where it came from.

The manifest, glem-provenance.json, says "complete": false until everything is there; then `open_data` refuses the
folder. Images are written in blocks of one class. Before its images, a block writes its checksums to the hidden folder
.glem-export. All files are written atomically and draws are deterministic, so running an export again, on any number of
ranks, draws only the blocks of which a file is missing or empty. checksums.sha256 then holds the checksums of all.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import CommitInfo
from torchvision.io import encode_png
from tqdm import tqdm

from glem_augment.augment.moves import MOST_PUT_BACK
from glem_augment.checks import FORMATS, Format, check_choice
from glem_augment.data.pixels import usable_cpus
from glem_augment.data.sources import CLASS_FILE, PROVENANCE
from glem_augment.distributed import gather, rank, world_size
from glem_augment.hub.cards import CardFacts, dataset_card
from glem_augment.hub.upload import upload, write_card
from glem_augment.io import atomic_write, expand, file_sha256, lock_folder, write_json
from glem_augment.synthetic.manifest import (
    CHECKSUMS,
    LEFT_OVER,
    WORK,
    check_folder,
    differences,
    provenance,
    stated_licence,
)
from glem_augment.synthetic.sampler import Block, Drawn, Plan

# A loader gives each worker whole shards, and surplus workers nothing. So there are many shards, of at least 32 images.
MAX_SHARDS, MIN_SHARD = 64, 32
# Files of shards beside the shards. timm's reader takes their description; the Hub's loaders read *.tar alone.
_SHARDS_INFO, _CARD, _PICTURE = "data/_info.json", "README.md", "report.png"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)|# implausible: (.+)")  # of checksums; sha256sum ignores comments
_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Draw = Callable[[int, int], Drawn]  # from a class and the number of a block
Sums = dict[str, str]  # from the path of a file below the export's folder to its SHA-256


@dataclass(frozen=True)
class Ranks:
    """The processes that write together: this one takes every `count`-th block or shard from number `rank` on."""

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


def export_set(
    plan: Plan,
    draw: Draw,
    folder: str | os.PathLike[str],
    form: Format,
    facts: CardFacts | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    distributed: bool = False,
    command: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Write the images of a plan; see `SyntheticDataset.export`.

    Args:
        facts: the licence, and a quality report for the card of shards.
        command: what finishes the export after a kill, for an error message.
        name: the heading of the card, by default the folder's name.

    Returns:
        The manifest, in which `implausible`, on rank 0, lists the images of which no draw was plausible.
    """
    check_choice("format", form, FORMATS)
    folder, facts = expand(folder), facts or CardFacts()
    ranks = Ranks.all() if distributed else Ranks()
    progress, shards = progress and ranks.rank == 0, form == "webdataset"
    if plan.model.image_shape[0] not in (1, 3):
        raise ValueError(f"a PNG file has 1 or 3 channels, this flow {plan.model.image_shape[0]}")
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, not a folder: give another folder")
    with lock_folder(folder) if ranks.rank == 0 else nullcontext():
        begun = _begin(plan, folder, form, facts, overwrite, command) if ranks.rank == 0 else {}
        manifest = ranks.gather(begun)[0]
        folders = {cls: entry["folder"] for cls, entry in zip(plan.order, manifest["classes"], strict=True)}
        writing = (plan, draw, folders, folder, ranks, progress)
        sums, bad = _write_shards(*writing) if shards else _write_images(*writing, folder)
        manifest |= {"complete": True, "implausible": bad}
        del manifest["finish"]
        if ranks.rank == 0:
            with atomic_write(folder / CHECKSUMS, "w") as file:
                file.write(_as_text(sums, bad))
            if shards:
                _describe_shards(plan, folder, facts, manifest, name or folder.resolve().name)
            shutil.rmtree(folder / WORK, ignore_errors=True)
            for path in folder.rglob(".*.tmp"):
                if LEFT_OVER.fullmatch(path.name):
                    path.unlink()
            write_json(folder / PROVENANCE, manifest)  # last: from now on the set is complete
            _warn(plan, folder, manifest)
        ranks.gather(None)
    return manifest


def push_dataset(
    plan: Plan,
    draw: Draw,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    license_name: str | None = None,
    license_link: str | None = None,
    report: str | os.PathLike[str] | None = None,
    **target: Any,
) -> CommitInfo:
    """Upload all images as shards with a card, in one commit that removes what an earlier push left in `data/`.

    Args:
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

    def write(name: str, folder: Path) -> None:
        export_set(plan, draw, folder, "webdataset", facts, name=name)

    return upload(repo_id, "dataset", write, replace="data/*", **target)


def _begin(
    plan: Plan, folder: Path, form: Format, facts: CardFacts, overwrite: bool, command: str | None
) -> dict[str, Any]:
    """Make the folder ready: no images of another export, a manifest, classes.json. Returns the manifest."""
    manifest, old = provenance(plan, form, facts), check_folder(folder)
    if old is not None and (found := differences(old, manifest)):
        if not overwrite:
            raise FileExistsError(
                f"{folder} is not empty: it holds an export of other images ({'; '.join(found[:4])}), "
                "which are not mixed: give another folder, or overwrite=True (glem generate --overwrite)"
            )
        # The earlier manifest stays meanwhile, so that after a kill the remaining images are known to be its own.
        _remove(folder, old)
        old = None
    if old is not None and facts.license is None:
        manifest["license"] = old.get("license", manifest["license"])  # an earlier run may have stated it
    manifest["finish"] = command or f"export the same SyntheticDataset to {folder} again"
    if old is None or not old["complete"]:
        write_json(folder / PROVENANCE, manifest)
    if form == "imagefolder":
        write_json(folder / CLASS_FILE, {entry["folder"]: entry["index"] for entry in manifest["classes"]})
    return manifest


def _remove(folder: Path, old: dict[str, Any]) -> None:
    """Remove an export, but for its manifest."""
    files = [CHECKSUMS, CLASS_FILE]
    if old["format"] == "imagefolder":
        for entry in old["classes"]:
            if (folder / entry["folder"]).is_dir():
                shutil.rmtree(folder / entry["folder"])  # `check_folder` has seen that there are only its images
    else:
        files += [_SHARDS_INFO, _CARD, _PICTURE, *map(str, folder.glob("data/train-*-of-*.tar"))]
    for name in files:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / WORK, ignore_errors=True)


# ---- images --------------------------------------------------------------------------------------------------------


def _write_images(
    plan: Plan, draw: Draw, folders: dict[int, str], folder: Path, ranks: Ranks, progress: bool, root: Path
) -> tuple[Sums, list[str]]:
    """Write root/<class>/NNNNNN.png. Returns, on rank 0, the checksums and the paths of implausible images."""
    sums, bad = _read_sums([folder / CHECKSUMS, *sorted((folder / WORK).glob("*.sha256"))])
    # Large blocks first, so that no rank gets all the small ones at the ends of the classes.
    own = sorted(plan.blocks(), key=lambda block: -block.size)[ranks.rank :: ranks.count]
    missing = [block for block in own if not all(p in sums and _is_there(root / p) for p in _paths(block, folders))]
    of = f" of rank 0 of {ranks.count}" if ranks.count > 1 else ""
    total = sum(block.size for block in missing)
    with (
        ThreadPoolExecutor(min(8, usable_cpus())) as pool,
        tqdm(total=total, unit="image", desc=f"export{of}", disable=not (progress and missing)) as bar,
    ):
        for block in missing:
            drawn, paths = draw(block.cls, block.number), _paths(block, folders)
            pngs = list(pool.map(lambda image: encode_png(image).numpy().tobytes(), drawn.images))
            new = {path: hashlib.sha256(png).hexdigest() for path, png in zip(paths, pngs, strict=True)}
            fresh = [path for path, implausible in zip(paths, drawn.implausible, strict=True) if implausible]
            _write(_record(folder, block), _as_text(new, fresh).encode())
            list(pool.map(_write, (root / path for path in paths), pngs))
            sums |= new
            bad |= set(fresh)
            bar.update(block.size)
    ranks.gather(None)
    if ranks.rank > 0:
        return {}, []
    if ranks.count > 1:  # looked up by name: the list of a network folder may be old
        more, worse = _read_sums(_record(folder, block) for block in plan.blocks())
        sums, bad = sums | more, bad | worse
    order = [path for block in plan.blocks() for path in _paths(block, folders)]
    return {path: sums[path] for path in order}, [path for path in order if path in bad]


def _record(folder: Path, block: Block) -> Path:
    """The file with the checksums of a block while an export is under way."""
    return folder / WORK / f"{block.cls}-{block.number}.sha256"


def _paths(block: Block, folders: dict[int, str]) -> list[str]:
    return [f"{folders[block.cls]}/{i:06d}.png" for i in range(block.first, block.first + block.size)]


def _is_there(path: Path) -> bool:
    """Whether a file is there and not empty, as a power cut may leave it."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _write(path: Path, data: bytes) -> None:
    # To sync every one of these small files takes longer than all the rest.
    with atomic_write(path, sync=False) as file:
        file.write(data)


def _as_text(sums: Sums, implausible: Iterable[str]) -> str:
    lines = [f"{sha256}  {path}\n" for path, sha256 in sums.items()]
    return "".join([*lines, *(f"# implausible: {path}\n" for path in implausible)])


def _read_sums(files: Iterable[Path]) -> tuple[Sums, set[str]]:
    """The checksums and the implausible images in files; a later file counts more than an earlier one."""
    sums: Sums = {}
    implausible: set[str] = set()
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for found in filter(None, map(_LINE.fullmatch, text.splitlines())):
            sha256, path, bad = found.groups()
            implausible |= {bad} - {None}
            sums |= {path: sha256} if path else {}
    return sums, implausible


# ---- shards --------------------------------------------------------------------------------------------------------


def _write_shards(
    plan: Plan, draw: Draw, folders: dict[int, str], folder: Path, ranks: Ranks, progress: bool
) -> tuple[Sums, list[str]]:
    """Write image i to shard i mod S, so that every shard holds every class. Returns what `_write_images` does.

    Each shard has images of nearly all blocks. So the images are made first, as an ImageFolder in a hidden folder.
    """
    names, (sums, bad) = _shard_names(sum(plan.counts)), _read_sums([folder / CHECKSUMS])
    done = all(name in sums and _is_there(folder / name) for name in names)
    if all(ranks.gather(done)):
        return {name: sums[name] for name in names}, sorted(bad)
    root = folder / WORK / "images"
    _, doubtful = _write_images(plan, draw, folders, folder, ranks, progress, root)
    label_of = {folders[cls]: label for label, cls in enumerate(plan.order)}
    paths = [path for block in plan.blocks() for path in _paths(block, folders)]
    images = [(root / path, label_of[path.partition("/")[0]]) for path in paths]
    count, own = len(names), {}
    for number in tqdm(range(ranks.rank, count, ranks.count), unit="shard", desc="pack", disable=not progress):
        shard = folder / names[number]
        if not _is_there(shard):
            with atomic_write(shard) as file, tarfile.open(fileobj=file, mode="w") as archive:
                for index in range(number, len(images), count):
                    path, label = images[index]
                    _add_file(archive, f"{index:08d}.png", path.read_bytes())
                    _add_file(archive, f"{index:08d}.cls", str(label).encode())
        own[names[number]] = file_sha256(shard)
    packed: Sums = {}
    for others in ranks.gather(own):
        packed |= others
    unlikely = set(doubtful)
    keys = [f"{index:08d}.png" for index, path in enumerate(paths) if path in unlikely]
    return {name: packed[name] for name in names}, keys


def _shard_names(images: int) -> list[str]:
    count = min(MAX_SHARDS, -(-images // MIN_SHARD))
    return [f"data/train-{i:05d}-of-{count:05d}.tar" for i in range(count)]


def _add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without a time, so that the same images give the same shards
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _describe_shards(plan: Plan, folder: Path, facts: CardFacts, manifest: dict[str, Any], name: str) -> None:
    """Write the card and timm's description of the shards; put the quality report into folder and manifest."""
    names = [path.removeprefix("data/") for path in _shard_names(manifest["count"])]
    lengths = [len(range(i, manifest["count"], len(names))) for i in range(len(names))]
    split = {"name": "train", "num_samples": manifest["count"], "filenames": names, "shard_lengths": lengths}
    write_json(folder / _SHARDS_INFO, {"splits": {"train": split}})
    if facts.report is not None:
        report = expand(facts.report)
        manifest["quality"] = json.loads((report / "report.json").read_text(encoding="utf-8"))
        shutil.copy(report / _PICTURE, folder)
    write_card(dataset_card(manifest, name, replace(facts, license=stated_licence(plan, facts))), folder)


def _warn(plan: Plan, folder: Path, manifest: dict[str, Any]) -> None:
    """Warn where many images are not plausible, or torchvision's ImageFolder would number the classes differently."""
    bad, count, classes = len(manifest["implausible"]), manifest["count"], manifest["classes"]
    if bad > MOST_PUT_BACK * count:
        fix = "adapt the flow to the real images" if plan.settings["source"] == "mixup" else "lower the temperature"
        _log.warning(
            '%d of %d images are not plausible, since their values leave [0, 1] by more than 1: %s. "implausible" in '
            "%s lists them",
            *(bad, count, fix, folder / PROVENANCE),
        )
    folders = [entry["folder"] for entry in classes]
    there = sorted(entry["folder"] for entry in classes if entry["count"])
    if manifest["format"] == "imagefolder" and len(there) < len(folders) and there != folders[: len(there)]:
        _log.warning(
            "%s has no folder for %d of %d classes, which get no images, so torchvision's ImageFolder would number the "
            "others differently: open it with open_data or RealAndSynthetic, or take the labels from its %s",
            *(folder, len(folders) - len(there), len(folders), CLASS_FILE),
        )
