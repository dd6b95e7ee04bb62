"""`glem generate`: synthetic images as an ImageFolder or as WebDataset shards."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import yaml

from glem_augment.cli.common import load_model, note, open_resized, print_json, read_class_map, read_table
from glem_augment.data.classes import match_classes
from glem_augment.synthetic.balance import PerClass
from glem_augment.synthetic.dataset import SyntheticDataset
from glem_augment.synthetic.export import check_folder
from glem_augment.synthetic.publish import check_shards_folder


def run(args: argparse.Namespace) -> None:
    _check_together(args)
    folder = args.out
    # A folder that cannot be used is refused before any work.
    if args.format == "webdataset":
        check_shards_folder(folder, args.overwrite)
    else:
        check_folder(folder)
    wanted: PerClass = args.per_class
    if isinstance(wanted, Path):
        wanted = read_counts(wanted)
    class_map = read_class_map(args.class_map)
    model = load_model(args)
    real = None
    if args.real is not None:
        data = open_resized(model, args.real, args.split or "train", progress=not args.quiet)
        match = match_classes(model, data, class_map)
        names, ids = ([values[i] for i in match] for values in (model.classes, model.class_ids))
        real = data.with_targets(data.targets, names, ids)
    given = ("temperature", "modes", "alpha", "min_confidence")
    options = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    dataset = SyntheticDataset(model, wanted, seed=args.seed, source=args.source, real=real, **options)
    began = time.monotonic()
    dataset.export(folder, args.format, progress=not args.quiet, overwrite=args.overwrite, license=args.license)
    # Shards have no names for their classes, only numbers, so that those without images are listed too.
    order = [i for i in dataset.label_order if dataset.counts[i] or args.format == "webdataset"]
    listed = {dataset.classes[i]: dataset.counts[i] for i in order}
    summary = {
        "out": str(folder),
        "format": args.format,
        "images": len(dataset),
        "per_class": listed,
        "classes": list(listed),
        "model": args.model,
        "source": args.source,
        "temperature": None if args.source == "mixup" else dataset.temperature,
        "seed": args.seed,
        "real": args.real,
        "not_finite": dataset.non_finite,
    }
    if args.min_confidence is not None:
        summary["acceptance"] = _acceptance(dataset, list(listed))
    print_json({**summary, "seconds": round(time.monotonic() - began, 3)})


def read_counts(path: Path) -> dict[str, Any]:
    """The table from class names to whole numbers in a file. Names are text, since a class may be called 010 or no."""
    table = read_table(path, "--per-class", yaml.BaseLoader)
    return {key: int(value) if str(value).strip().isdecimal() else value for key, value in table.items()}


def _check_together(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would have no effect, or that lacks another one."""
    balance, mixup = args.per_class == "balance", args.source == "mixup"
    if (balance or mixup) and args.real is None:
        raise ValueError(
            f"{'--per-class balance' if balance else '--source mixup'} needs real images: give --real DATA"
        )
    if args.real is not None and not (balance or mixup):
        raise ValueError("--real has no effect without --per-class balance or --source mixup")
    for name, needed, there in (
        ("temperature", "--source gaussian or rfcm", not mixup),
        ("modes", "--source mixup", mixup),
        ("alpha", "--source mixup", mixup),
        ("split", "--real", args.real is not None),
        ("class_map", "--real", args.real is not None),
    ):
        if getattr(args, name) is not None and not there:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without {needed}")


def _acceptance(dataset: SyntheticDataset, classes: list[str]) -> dict[str, Any]:
    report = dataset.acceptance()
    report["classes"] = {name: report["classes"][name] for name in classes}
    total = report["total"]
    if total["failed"]:
        note(
            f"{total['failed']} of {total['items']} images never reached --min-confidence "
            f"{report['min_confidence']:g}; the best candidate of each was kept"
        )
    return report
