"""The folder of an export: what may stand there, whose files they are, and what is cleared away."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glem_augment.synthetic.manifest import JOURNAL, Journal, differences, image_name, read_manifest
from glem_augment.synthetic.provenance import PROVENANCE, REAL_IMAGES, class_folders, provenance

if TYPE_CHECKING:
    from glem_augment.synthetic.dataset import SyntheticDataset


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse what no images may be exported to, as far as that is known without them; see `check_imagefolder`.

    Raises:
        FileExistsError: a file, or a folder that is not empty and holds no export, unless ``overwrite``.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder to export to")
    if not overwrite and _present(folder) and read_manifest(folder / PROVENANCE) is None:
        raise FileExistsError(
            f"{folder} is not empty and holds no export: give another folder; overwrite=True (--overwrite) replaces "
            "what is left of an export, and no files of others"
        )


def check_imagefolder(dataset: SyntheticDataset, folder: Path, overwrite: bool) -> None:
    """Refuse a folder that `export_imagefolder` would refuse.

    Args:
        dataset: may lack its real latents, which take long: they are taken for those of the export that is there.

    Raises:
        FileExistsError: the folder holds an export of other images, unless ``overwrite``, or anything else.
    """
    prepare(folder, provenance(dataset, class_folders(dataset.class_ids, dataset.classes)), overwrite)


def prepare(folder: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
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
    if settings.get(REAL_IMAGES, "") is None and isinstance(before, dict):
        wanted = {**wanted, "settings": {**settings, REAL_IMAGES: before.get(REAL_IMAGES)}}
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


def remove_left_over(folder: Path, names: Sequence[str], counts: Sequence[int]) -> None:
    """Images of an earlier, larger export; `prepare` has seen that there are no others."""
    for name, count in zip(names, counts, strict=True):
        for path in (folder / name).iterdir() if (folder / name).is_dir() else ():
            if _number(path.name) >= count:
                path.unlink()


def clean(folder: Path, names: Sequence[str], counts: Sequence[int], journal: Journal) -> None:
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
