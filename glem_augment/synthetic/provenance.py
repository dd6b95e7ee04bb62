"""What an export says of itself: which images of which flow it holds, under which folder names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from glem_augment.synthetic.dataset import SyntheticDataset

PROVENANCE = "glem-provenance.json"
# Of settings: what tells the real images apart that are mixed. Known once these are read.
REAL_IMAGES = "real_images_sha256"
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
    lower = Counter(folder.casefold() for folder in folders)
    taken = {folder.casefold() for folder in folders if lower[folder.casefold()] == 1}
    unique = []
    for index, folder in enumerate(folders):
        if lower[folder.casefold()] > 1:
            folder = f"{folder}_{index}"
            while folder.casefold() in taken:  # it is another class's name
                folder += "_"
            taken.add(folder.casefold())
        unique.append(folder)
    return unique


def _safe(text: str) -> bool:
    plain = re.fullmatch(r"[\w][\w.+ -]*", text) is not None and text[-1] not in ". " and len(text) <= 100
    return plain and text.split(".")[0].casefold() not in RESERVED


def _slug(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    slug = re.sub(r"[^\w.+ -]+", "_", text).strip("_. ")[:100].rstrip("_. ")
    return slug if not slug or _safe(slug) else f"{slug}_"


def licence_note(licence: str | None, source: str) -> str:
    """What an export's provenance says of the licence: the one that was stated, or that it is not known."""
    mixed = ", and of the real images that were mixed" if source == "mixup" else ""
    return licence or f"not stated; samples inherit the licence of the images that the flow was trained on{mixed}"


def provenance(dataset: SyntheticDataset, names: Sequence[str]) -> dict[str, Any]:
    """The manifest without results: what was asked for."""
    from glem_augment import __version__
    from glem_augment.model.weights import weights_sha256

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
        "weights_sha256": weights_sha256(dataset.model),
        "model": plain(dataset.model.config),
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
        settings |= {"modes": latents.modes, "alpha": latents.alpha, REAL_IMAGES: None}
    if latents.real is not None:
        settings[REAL_IMAGES] = latents.real.sha256
    if rejection is not None:
        oracle = "posterior" if rejection.oracle is None else _oracle(rejection.oracle, rejection.token)
        settings |= {
            "min_confidence": rejection.min_confidence,
            "max_attempts": rejection.max_attempts,
            "oracle": oracle,
        }
    return settings


def _oracle(oracle: Any, token: str) -> str:
    """The name of a judge, and the SHA-256 of its weights where it has any. What else it goes by can't be told from
    outside (a lambda's network, an object's state), so `token` stands for that, which only this very judge has."""
    named = oracle if hasattr(oracle, "__qualname__") else type(oracle)
    name = f"{named.__module__}.{named.__qualname__}"
    if not isinstance(oracle, nn.Module):
        return f"{name}, {token}"
    total = hashlib.sha256()
    for key, value in oracle.state_dict().items():
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{name}, weights {total.hexdigest()}"


def plain(config: Any) -> Any:
    """A model's configuration as JSON can carry it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return json.loads(json.dumps(config, default=str))
