"""The manifest of an export, which says where the images came from, and what a folder holds already."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glem_augment import __version__
from glem_augment.checks import FORMATS, Format
from glem_augment.data.sources import CLASS_FILE, PROVENANCE
from glem_augment.hub.cards import CardFacts, data_name, data_names
from glem_augment.io import file_sha256
from glem_augment.model.config import licence_id
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256
from glem_augment.synthetic.sampler import Plan

CHECKSUMS, WORK = "checksums.sha256", ".glem-export"
LEFT_OVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp|\.lock")  # of a run that was killed


def provenance(plan: Plan, form: Format, facts: CardFacts) -> dict[str, Any]:
    """The manifest of a set that is not complete: which flow draws the images, and with which settings."""
    order, model = plan.order, plan.model
    ids, names = ([values[i] for i in order] for values in (model.class_ids, model.classes))
    classes = zip(ids, names, class_folders(ids, names), (plan.counts[i] for i in order), strict=True)
    config = {key: value for key, value in model.config.to_dict().items() if key != "training"}  # may name folders
    stated = facts.license_name or stated_licence(plan, facts)
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
        "image_shape": list(model.image_shape),
        "weights_sha256": weights_sha256(model),
        "model": json.loads(json.dumps(config, default=str)),
        "loaded_from": _origin(model),
        "trained_on": data_names(model.config.training),
        "real": plan.real_name and data_name(plan.real_name),
        "license": stated or "not stated; samples inherit the licence of the real images",
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How two manifests describe different images, for people: "temperature 0.8 (not 0.9)", ..."""
    a, b = ({k: table.get(k) for k in ("generator", "format", "count")} | table["settings"] for table in (old, new))
    found = [f"{key} {a.get(key)} (not {b.get(key)})" for key in a | b if a.get(key) != b.get(key)]
    a, b = (
        {
            "weights": table.get("weights_sha256"),
            "classes": {entry["folder"]: (entry["index"], entry["count"]) for entry in table["classes"]},
            "model": table.get("model"),
        }
        for table in (old, new)
    )
    return found + [key for key in a if a[key] != b[key]]


def _origin(model: GLEM) -> str | None:
    """`org/name@commit`, if the model is still as it was loaded from there."""
    if model.origin is None or model.origin_file is None:
        return None
    return model.origin if file_sha256(model.origin_file) == weights_sha256(model) else None


def stated_licence(plan: Plan, facts: CardFacts) -> str | None:
    """The licence, by default the recorded one of the flow's training images. A mixture needs one to be stated: the
    real images that were mixed may have another."""
    recorded = licence_id(plan.model.config.training.get("license"))
    return facts.license or (None if plan.settings["source"] == "mixup" else recorded)


def check_folder(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier export in the folder, finished or not; None if the folder is empty or missing.

    Raises:
        FileExistsError: the folder holds something without such a manifest, or an ImageFolder with other files.
    """
    old = read_manifest(folder / PROVENANCE)
    if old is not None and old["format"] == "webdataset":
        return old
    counts = {} if old is None else {entry["folder"]: entry["count"] for entry in old["classes"]}
    for path in sorted(folder.rglob("*")):
        name, parent = path.relative_to(folder).as_posix(), path.parent.name
        image = re.fullmatch(r"([0-9]{6}|[1-9][0-9]{6,})\.png", path.name)
        known = name in (PROVENANCE, CLASS_FILE, CHECKSUMS) or name.split("/")[0] == WORK
        if (known and old is not None) or name == PROVENANCE or LEFT_OVER.fullmatch(path.name):
            continue
        if name in counts and path.is_dir() and not path.is_symlink():
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
        # Folders lie inside that of the export: what is in them may be replaced.
        good = all(re.fullmatch(r"\w[\w.+ -]*", entry["folder"]) for entry in manifest["classes"])
        good &= all(type(entry[key]) is int for entry in manifest["classes"] for key in ("index", "count"))
        good &= isinstance(manifest["settings"], dict) and type(manifest["complete"]) is bool
        return manifest if good and manifest["format"] in FORMATS else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


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
