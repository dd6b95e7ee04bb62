"""`glem generate`: draw a synthetic data set from a model."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from glem_augment.cli import common
from glem_augment.names import FORMATS, SOURCES

DESCRIPTION = """\
Draw new images of every class from a model. glem-provenance.json records the model and the settings. The same seed
draws the same images for any classes and any number of images. Prints a JSON summary. Its out_of_range counts images
whose values are not finite or leave the range by more than its width. The check finds numerical failures alone.

The same command again writes missing files.

  --format imagefolder             PNG files, a folder per class. A class without images has no folder; classes.json has
                                   the label of every class.
  --format webdataset              data/train-*.tar with the classes mixed

  --per-class 100                  of each class
  --per-class cat=100,dog=50       of two classes; or a YAML or JSON file with such a table
  --per-class balance --real DATA  fill up every class of DATA to its largest; further classes get no images

  --source rfcm                    from the mean and covariance of the class's real latents
  --source gaussian                from the class's Gaussian

A private model (glem fit --epsilon) refuses balance, which looks at real images.
"""
EXAMPLES = """\
  glem generate bundled:fashion-mnist --per-class 100 --out synthetic/
  glem generate runs/photos --per-class 1000 --temperature 0.8 --format webdataset --out synthetic/
  glem generate runs/photos --per-class balance --real photos/ --out fill/
  glem generate runs/photos --per-class cat=50,dog=50 --seed 1 --out pets/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser)
    counts = "how many images; see above"
    parser.add_argument("--per-class", type=per_class, required=True, metavar="N|TABLE|balance", help=counts)
    common.add_out(parser, "folder to write to")
    common.add_count(parser, "--seed", "seed of all draws", 0)
    parser.add_argument("--format", choices=FORMATS, default="imagefolder", help="see above (default: %(default)s)")
    common.add_license(parser)
    common.add_device(parser)
    source = parser.add_argument_group("the source of the images")
    source.add_argument("--source", choices=SOURCES, help="see above (default: rfcm, or gaussian without modes)")
    temperature = "factor on the standard deviation (default: 0.9; 1 for a private model)"
    source.add_argument("--temperature", type=float, metavar="T", help=temperature)
    real = parser.add_argument_group("real images, for --per-class balance; the set takes their class numbers")
    real.add_argument("--real", metavar="DATA", help=common.DATA_HELP)
    real.add_argument("--split", default="train", help="split of DATA (default: train)")
    common.add_class_map(real)


def per_class(text: str) -> Any:
    """An argparse type: a number, `balance`, or a table, as `A=N,B=M` or in a file."""
    if text == "balance":
        return text
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        counts = common.table(text, as_text=True)
    elif "=" in text:
        entries = [entry.rpartition("=") for entry in text.split(",")]  # names with commas go into a file
        counts = {name.strip(): count for name, _, count in entries}
        if len(counts) < len(entries):
            raise argparse.ArgumentTypeError(f"{text!r} names a class twice")
    else:
        return int(text)
    return {name: int(n) if str(n).strip().isdecimal() else n for name, n in counts.items()}


def run(args: argparse.Namespace) -> None:
    from glem_augment.images.sources import open_source
    from glem_augment.synthetic.dataset import SyntheticDataset
    from glem_augment.synthetic.export import export_set, read_provenance

    read_provenance(args.out)  # refuses a folder before any work
    model = common.load_model(args, ranks=True)
    common.note_licence(args.license)
    real = None if args.real is None else open_source(args.real, args.split)
    about = dict(seed=args.seed, source=args.source, real=real, class_map=args.class_map)
    dataset = SyntheticDataset(model, args.per_class, args.temperature, **about)
    began = time.monotonic()
    command = shlex.join(["glem", *args.argv])
    try:
        out_of_range = export_set(dataset.draws, args.out, args.format, args.license, True, f"run: {command}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{args.out} is not complete; to finish it, run: {command}") from None
    result = {
        "out": str(args.out),
        "format": args.format,
        "images": len(dataset),
        "per_class": {dataset.model.classes[i]: dataset.counts[i] for i in dataset.draws.order if dataset.counts[i]},
        "model": args.model,
        "source": dataset.source,
        "temperature": dataset.temperature,
        "seed": args.seed,
        "real": args.real,
        "out_of_range": out_of_range,
    }
    common.print_json({**result, "seconds": round(time.monotonic() - began, 3)})
