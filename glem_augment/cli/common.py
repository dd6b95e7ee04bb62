"""What the commands share: help, checked arguments, and opening of models and data."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from glem_augment.data.dataset import ImageData, match_classes, open_data
from glem_augment.data.sources import has_splits
from glem_augment.data.timm_sources import tar_file
from glem_augment.io import expand, json_text
from glem_augment.model.glem import GLEM

DATA_HELP = "images: a folder with a folder per class, NAME@ROOT (timm), or bundled:fashion-mnist"
MODEL_HELP = "a folder written by glem train, bundled:NAME, or ORG/NAME[@REVISION] on the Hugging Face Hub"
CLASS_MAP_HELP = (
    "YAML or JSON table from the data's class names to the flow's, or 'order': class i is class i "
    "(default: by id or name)"
)


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)"
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    # So many more than there are cores that the system refuses them end the process with a segmentation fault.
    most = max(1024, os.cpu_count() or 1)
    parser.add_argument("--threads", type=whole(1, most), metavar="N", help="CPU threads (default: PyTorch's choice)")


def add_skip_bad(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out images that can't be read, and say which (default: stop)"
    )


def report_skipped(data: ImageData, most: int = 5) -> None:
    """Which images were left out, and why, on stderr: the first ``most``, and how many there are."""
    for where, reason in data.skipped[:most]:
        note(f"left out: {where} {' '.join(reason.split())[:200]}")
    if len(data.skipped) > most:
        note(f"left out: {len(data.skipped)} images in all")


def out_file(path: str) -> Path:
    """Where a result is to be written: refused before the work is done where that can't be. A link stands for what it
    names. Raises OSError."""
    file = expand(path)
    if file.is_symlink() and file.is_file():  # not /dev/stdout, which is a pipe or a terminal as a rule
        file = Path(os.path.realpath(file))
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {path}: it is a folder; give a file name")
    if not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"cannot write {path}: {folder} is a file, not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"cannot write {path}: you may not write to {folder}")
    return file


def whole(low: int, most: float = math.inf) -> Callable[[str], int]:
    """argparse type: a whole number, at least ``low`` and at most ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    return parse


def number(low: float = -math.inf) -> Callable[[str], float]:
    """argparse type: a finite number, at least ``low``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or value < low:
            raise argparse.ArgumentTypeError(
                f"must be a finite number{f' >= {low:g}' * math.isfinite(low)}, got {text}"
            )
        return value

    return parse


def pick_device(name: str | None) -> torch.device:
    """The device of that name; CUDA where there is one by default. Raises ValueError if there is no such device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"device {name!r} can't be used here: {reason}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers; use cpu or cuda")
    return device


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def load_model(args: argparse.Namespace) -> GLEM:
    """The model of ``args.model`` on ``args.device``, after ``args.threads`` is set."""
    set_threads(getattr(args, "threads", None))
    return GLEM.from_pretrained(args.model, device=pick_device(args.device))


def open_for(
    model: GLEM, spec: str, split: str, class_map: str | dict[str, str] | None = None, skip_bad: bool = False
) -> tuple[ImageData, torch.Tensor]:
    """Data in the shape that the flow takes, labelled by the flow's classes, and the flow's class of each of the
    data's own classes, int64 [K_data].

    Raises:
        FileNotFoundError, DataError, ClassMismatchError: see ``open_data`` and ``match_classes``.
    """
    refuse_codes(model)
    channels, height, width = model.image_shape
    channels = channels if channels in (1, 3) else None
    data = open_data(spec, split, image_size=(height, width), channels=channels, skip_bad=skip_bad)
    report_skipped(data)
    match = match_classes(model.class_ids, model.classes, data.class_ids, data.classes, class_map)
    return data.with_targets(match[data.targets], model.classes, model.class_ids), torch.from_numpy(match)


def refuse_codes(model: GLEM) -> None:
    """ValueError for a flow whose images carry class codes, which no data set has: in its samples the codes would stand
    for pixels, and data of the user's would be stretched over them."""
    settings = model.config.training.get("config")
    rows = settings.get("code_rows") if isinstance(settings, dict) else None
    if rows:
        raise ValueError(
            f"this flow was trained with --method ce or ceglem, on images with {rows} more rows for a class code: "
            "such flows are for comparisons (glem_augment.evaluation.codes, benchmarks/paper.py)"
        )


def without_splits(spec: str) -> bool:
    """Whether DATA is one ImageFolder or archive, whose images stand for every split."""
    folder = expand(spec)
    return tar_file(spec) is not None or (folder.is_dir() and not has_splits(folder))


def read_class_map(text: str | None) -> str | dict[str, str] | None:
    """``order``, or a YAML or JSON file with a table from data names to flow names."""
    if text is None or text == "order":
        return text
    return {key: str(value) for key, value in read_table(text, "--class-map", _Names).items()}


def read_counts(path: str, option: str) -> dict[str, Any]:
    """A YAML or JSON file with a table from class names to whole numbers."""
    table = read_table(path, option, _Names)
    return {key: int(v) if isinstance(v, str) and v.strip().isdecimal() else v for key, v in table.items()}


class _Names(yaml.BaseLoader):
    """Reads all as text: a class may be called 010, no or null. A name that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = [tuple(self.construct_object(part, deep=True) for part in pair) for pair in node.value]
        return _each_once(pairs)


def _each_once(pairs: list[Any]) -> dict[Any, Any]:
    names = [str(name) for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice")
    return dict(pairs)


def read_table(path: str, option: str, loader: type = yaml.SafeLoader) -> dict[str, Any]:
    """The table in a YAML or JSON file (JSON is YAML); ``loader``: of the YAML.

    Raises:
        FileNotFoundError: no such file. ValueError: not a table, or a name that comes twice.
    """
    file = expand(path)
    if not file.is_file():
        raise FileNotFoundError(f"{option}: no such file: {path}")
    try:
        text = file.read_text(encoding="utf-8")
        is_json = file.suffix == ".json"
        table = json.loads(text, object_pairs_hook=_each_once) if is_json else yaml.load(text, loader)  # noqa: S506
    except (yaml.YAMLError, ValueError) as error:  # also of bytes that are no text
        raise ValueError(f"{option}: {path} can't be read as YAML or JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{option}: {path} must hold a table (key: value), got {type(table).__name__}")
    return table


def print_json(obj: dict[str, Any]) -> None:
    """One JSON object on stdout. Non-finite numbers become null: other readers could not parse them."""
    print(json_text(finite(obj)), flush=True)


def finite(obj: Any) -> Any:
    """``obj`` with every NaN and infinity replaced by None."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return obj


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)
