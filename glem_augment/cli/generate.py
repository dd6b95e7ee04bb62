"""`glem generate`: synthetic images as an ImageFolder or as WebDataset shards."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from glem_augment.cli.common import load_model, note, open_for, print_json, read_class_map, read_table
from glem_augment.io import expand
from glem_augment.synthetic.balance import PerClass, class_counts
from glem_augment.synthetic.dataset import SyntheticDataset
from glem_augment.synthetic.export import check_folder
from glem_augment.synthetic.publish import check_shards_folder, export_shards


def run(args: argparse.Namespace) -> None:
    _check_together(args)
    folder = expand(args.out)
    # A folder that cannot be used is refused before any work.
    if args.format == "webdataset":
        check_shards_folder(folder, args.overwrite)
    else:
        check_folder(folder)
    wanted: PerClass = args.per_class
    if isinstance(wanted, Path):
        wanted = read_counts(str(wanted))
    class_map = read_class_map(args.class_map)
    model = load_model(args)
    real, match = None, None
    if args.real is not None:
        real, match = open_for(model, args.real, args.split or "train", class_map, progress=not args.quiet)
    if args.per_class == "balance" and match is not None:
        counts = class_counts(model, wanted, real)
        wanted = {model.classes[i]: counts[i] for i in sorted(match.tolist())}
        if not any(wanted.values()):
            raise ValueError("--per-class balance: these classes have equally many images already")
    names = ("temperature", "modes", "alpha", "min_confidence")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    dataset = SyntheticDataset(model, wanted, seed=args.seed, source=args.source, real=real, **options)
    dataset._check_pil()
    began = time.monotonic()
    if args.format == "imagefolder":
        dataset.export(folder, progress=not args.quiet, overwrite=args.overwrite, license=args.license)
        listed = {name: count for name, count in zip(dataset.classes, dataset.counts, strict=True) if count}
    else:
        # Shards have no names for their classes, only numbers: those of the real images, if there are any, followed by
        # the classes that these lack; or else the flow's, as `SyntheticDataset.export` has them.
        shards: Any = dataset
        if match is not None:
            others = [i for i, count in enumerate(dataset.counts) if count and i not in match]
            shards = _Renumbered(dataset, [*match.tolist(), *others])
        export_shards(shards, folder, args.overwrite, args.license, progress=not args.quiet)
        listed = dict(zip(shards.classes, shards.counts, strict=True))
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


def read_counts(path: str) -> dict[str, Any]:
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


class _Renumbered:
    """A SyntheticDataset for the writer of shards, with its classes in another order.

    Args:
        full: the data set. order: its classes in the new order, all that get an image among them.
    """

    def __init__(self, full: SyntheticDataset, order: list[int]) -> None:
        self._full = full
        self.classes = [full.classes[i] for i in order]
        self.class_ids = [full.class_ids[i] for i in order]
        self.counts = [full.counts[i] for i in order]
        number = np.full(len(full.counts), -1)
        number[order] = np.arange(len(order))
        # Classes without images take no place among the images: image i is image i of `full`.
        self.targets = number[np.asarray(full.targets, dtype=np.int64)].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._full, name)


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
