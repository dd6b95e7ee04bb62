"""The same protocol on images of one's own: ``augmentation.py --task NAME=SPEC``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from benchmarks.proof.augmentation_data import PLACES, check_enough
from benchmarks.proof.augmentation_settings import FLOWS, LONG, SETTINGS, Setting
from glem_augment import GLEM, open_data
from glem_augment.data.sources import has_splits


def own_task(text: str, per_class: int, size: int | None, flows: list[str], flip: bool = True) -> Setting:
    """Make a setting of ``NAME=SPEC`` and enter it where the others are.

    Args:
        text: NAME stands for these images in results and for flows trained on them; SPEC is anything that
            ``open_data`` takes, with a training split and one called test or val.
        per_class: labelled images of a class. size: of the classifier's images, by default the first flow's.
        flows: that have not seen these images: anything that ``GLEM.from_pretrained`` takes, a name of ``FLOWS``, or
            "own" (trained on the labelled images alone). The first one gives the number of channels.
        flip: whether images may be mirrored.

    Raises:
        SystemExit: no NAME or SPEC, a folder without splits, or too few images. GLEMError, OSError: images or a flow
            that can't be opened.
    """
    name, equals, spec = text.partition("=")
    if not equals or not name or not spec:
        raise SystemExit(f"augmentation: --task takes NAME=SPEC, got {text!r}")
    if per_class < 1:
        raise SystemExit(f"augmentation: --per-class must be at least 1, got {per_class}")
    name = f"{name}-{per_class}"
    if name in SETTINGS:
        raise SystemExit(f"augmentation: there is a setting {name!r} already: choose another NAME")
    shapes = [_shape(flow) for flow in flows]
    sides = [shape[1] for shape in shapes if shape is not None]
    side = size or (sides[0] if sides else 32)
    channels = next((shape[0] for shape in shapes if shape is not None), 3)
    if Path(spec).is_dir() and not has_splits(Path(spec)):
        # It would be training and test images at once.
        raise SystemExit(
            f"augmentation: {spec} needs folders train/ and test/ or val/, with a folder per class in each"
        )
    # Decoded images, and flows of these alone, are kept under this name.
    key = f"{name}-{channels}x{side}-{_version(spec)}"
    PLACES[key] = (None, spec, "test")
    more = {"steps": LONG} if per_class >= 100 else {}
    flow_size = sides[0] if sides and sides[0] != side else None
    if "own" in flows and (flow_size or side) % 4:
        raise SystemExit(
            f"augmentation: a flow of one's own takes sides divisible by 4, not {flow_size or side}: --size"
        )
    setting = Setting(name, key, per_class, side, channels, tuple(flows), flow_size=flow_size, flip=flip, **more)
    data = open_data(spec, "train", image_size=side, channels=channels, progress=False)
    check_enough(setting, torch.from_numpy(data.targets), data.classes)
    SETTINGS[name] = setting
    return setting


def _version(spec: str) -> str:
    """Eight letters for these very images: other files under the same name must not be taken for them."""
    total = hashlib.sha256(spec.encode())
    for path in sorted(Path(spec).rglob("*")) if Path(spec).is_dir() else [Path(spec)]:
        if path.is_file():
            facts = path.stat()
            total.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return total.hexdigest()[:8]


def _shape(flow: str) -> tuple[int, int, int] | None:
    """Of the flow's images; None for one that is yet to be trained on the task's own."""
    if flow == "own":
        return None
    if flow in FLOWS:
        recipe = FLOWS[flow]
        return recipe.channels, recipe.size, recipe.size
    channels, height, width = GLEM.from_pretrained(flow).image_shape
    return channels, height, width
