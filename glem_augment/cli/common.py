"""What the commands share: the opening of models and data, and their output."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from typing import Any

import torch

from glem_augment import distributed
from glem_augment.data.classes import ClassMap, match_classes
from glem_augment.data.dataset import ImageData, as_image_data
from glem_augment.io import json_text
from glem_augment.model.glem import GLEM


def pick_device(args: argparse.Namespace) -> torch.device:
    """The device of `args.device`, by default CUDA where it is present.

    Under torchrun the processes join here, each gets a device of its own, and all but the first fall silent.

    Raises:
        ValueError: it cannot be used.
    """
    name = args.device
    try:
        device = distributed.start(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device {name!r} can't be used here: {reason}") from None
    if not distributed.is_primary():
        args.quiet = True
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    return device


def load_model(args: argparse.Namespace) -> GLEM:
    """The model of `args.model` on `args.device`, after the number of threads is set."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return GLEM.from_pretrained(args.model, device=pick_device(args))


def open_resized(model: GLEM, spec: str, split: str, **options: Any) -> ImageData:
    """Data resized to the flow's size and converted to its channels. Images that were left out are named on stderr."""
    data = as_image_data(spec, model.image_shape, split=split, **options)
    for where, reason in data.skipped:
        note(f"left out: {where} {' '.join(reason.split())[:200]}")
    return data


def open_for(model: GLEM, spec: str, split: str, class_map: ClassMap = None, **options: Any) -> ImageData:
    """Data in the flow's shape with the flow's class indices as labels; see `open_resized` and `match_classes`."""
    data = open_resized(model, spec, split, **options)
    match = match_classes(model, data, class_map)
    return data.with_targets(match[data.targets], model.classes, model.class_ids)


def print_json(obj: dict[str, Any]) -> None:
    """Print one JSON object on stdout, with null for non-finite numbers, which JSON does not have."""
    print(json_text(finite(obj)), flush=True)


def finite(obj: Any) -> Any:
    """`obj` with None in the place of every NaN and infinity."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return obj


def note(text: str) -> None:
    """Print a line for people on stderr, once."""
    if distributed.is_primary():
        print(text, file=sys.stderr, flush=True)
