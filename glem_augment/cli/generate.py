"""`glem generate`: synthetic images as an ImageFolder or as WebDataset shards."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from glem_augment.cli import new_parser
from glem_augment.cli.common import (
    DATA_HELP,
    add_class_map,
    add_machine,
    add_model,
    add_seed,
    load_model,
    note,
    number,
    open_for,
    print_json,
    read_class_map,
    read_table,
    whole,
)
from glem_augment.io import expand
from glem_augment.model.glem import DEFAULT_MODES
from glem_augment.synthetic.balance import PerClass, class_counts
from glem_augment.synthetic.dataset import SyntheticDataset
from glem_augment.synthetic.export import check_folder
from glem_augment.synthetic.latents import SOURCES
from glem_augment.synthetic.publish import FORMATS, check_shards_folder, export_shards

DESCRIPTION = """\
Draw new images of every class from a flow, and write them with glem-provenance.json, which says what drew them and
how. The same seed draws the same images, whichever classes and however many are asked for (pixels may differ by one
step with another number, by rounding). Prints a JSON summary.

  --format imagefolder   PNG files, a folder per class; classes without images get none. The same command again
                         checks the files and writes what is missing, so that an export that was cut off goes on.
  --format webdataset    data/train-*.tar with the classes mixed, and a card; they appear once all are finished.

  --per-class 100                    of each class
  --per-class cat=100,dog=50         of these classes; or a YAML or JSON file with such a table
  --per-class balance --real DATA    fill up every class of DATA to its largest; other classes of the flow get none
"""
EXAMPLES = """\
  glem generate bundled:fashion-mnist --per-class 100 --out synthetic/
  glem generate runs/photos --per-class 1000 --temperature 0.9 --source rfcm --format webdataset --out synthetic/
  glem generate runs/photos --per-class balance --real photos/ --source mixup --out fill/
  glem generate runs/photos --per-class cat=50,dog=50 --min-confidence 0.9 --seed 1 --out pets/
"""
TEMPERATURE, ALPHA = 0.8, 1.0


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "generate", DESCRIPTION, EXAMPLES, run)
    add_model(parser)
    parser.add_argument(
        "--per-class", type=per_class, required=True, metavar="N|TABLE|balance", help="how many images; see above"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if missing")
    add_seed(parser)
    parser.add_argument("--format", choices=FORMATS, default="imagefolder", help="see above (default: %(default)s)")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="of the images that the flow was trained on, which its samples inherit, such as mit or cc-by-4.0; it goes "
        "into the provenance",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an earlier export in DIR")
    add_machine(parser)
    source = parser.add_argument_group("what is drawn")
    source.add_argument(
        "--source",
        choices=SOURCES,
        default="gaussian",
        help="gaussian: the class's own Gaussian; rfcm: mean and covariance of the class's real latents; "
        "mixup: two images of --real mixed along the class's modes (default: %(default)s)",
    )
    # None as the default tells whether an option was given, so that one without effect is refused.
    source.add_argument(
        "--temperature",
        type=number(0),
        metavar="T",
        help="of gaussian and rfcm: factor on the standard deviation; lower is cleaner and less varied "
        f"(default: {TEMPERATURE})",
    )
    source.add_argument(
        "--modes", type=whole(1), metavar="N", help=f"of mixup: modes (default: {DEFAULT_MODES}, or all there are)"
    )
    source.add_argument(
        "--alpha", type=number(0), metavar="A", help=f"of mixup: of its Beta(A, A) (default: {ALPHA:g})"
    )
    judge = parser.add_argument_group("what is kept")
    judge.add_argument(
        "--min-confidence",
        type=number(0),
        metavar="P",
        help="draw a latent again until the flow's posterior gives its class at least P; the best is kept where none "
        'does. Nearly all of the class Gaussians\' own pass: it is for the other sources. "acceptance" in the summary '
        "counts, over the images that this run drew (default: keep all)",
    )
    real = parser.add_argument_group("real images, for --per-class balance and --source mixup")
    real.add_argument("--real", metavar="DATA", help=DATA_HELP)
    real.add_argument("--split", metavar="SPLIT", help="of DATA (default: train)")
    add_class_map(real)


def run(args: argparse.Namespace) -> int:
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
        real, match = open_for(model, args.real, args.split or "train", class_map)
    if args.per_class == "balance" and match is not None:
        counts = class_counts(model, wanted, real)
        wanted = {model.classes[i]: counts[i] for i in sorted(match.tolist())}
        if not any(wanted.values()):
            raise ValueError("--per-class balance: these classes have equally many images already")
    options: dict[str, Any] = dict(
        per_class=wanted,
        temperature=TEMPERATURE if args.temperature is None else args.temperature,
        seed=args.seed,
        real=real,
        modes=args.modes,
        alpha=ALPHA if args.alpha is None else args.alpha,
        min_confidence=args.min_confidence,
    )
    dataset = SyntheticDataset(model, source=args.source, **options)
    dataset._check_pil()
    began = time.monotonic()
    if args.format == "imagefolder":
        dataset.export(folder, overwrite=args.overwrite, license=args.license)
        listed = {name: count for name, count in zip(dataset.classes, dataset.counts, strict=True) if count}
    else:
        # Shards have no names for their classes, only numbers: those of the real images, if there are any, followed by
        # the classes that these lack; or else the flow's, as `SyntheticDataset.export` has them.
        shards: Any = dataset
        if match is not None:
            others = [i for i, count in enumerate(dataset.counts) if count and i not in match]
            shards = _Renumbered(dataset, [*match.tolist(), *others])
        export_shards(shards, folder, args.overwrite, args.license)
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
    return 0


def per_class(text: str) -> PerClass | Path:
    """An argparse type: a number, `balance`, `A=N,B=M`, or the path of a table."""
    if text == "balance":
        return text
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        return Path(text)
    if "=" not in text:
        return whole(1)(text)
    counts: dict[str, int] = {}
    for entry in text.split(","):
        name, _, count = entry.rpartition("=")
        if not name.strip():
            raise argparse.ArgumentTypeError(
                f"{entry!r} is not CLASS=N (names with commas or = go into a YAML or JSON file)"
            )
        if name.strip() in counts:
            raise argparse.ArgumentTypeError(f"class {name.strip()!r} is named twice")
        counts[name.strip()] = whole(0)(count)
    return counts


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
