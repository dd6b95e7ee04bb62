"""`glem adapt`: a trained flow for other images and classes, in one pass over them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from glem_augment.cli import new_parser
from glem_augment.cli.common import (
    add_data,
    add_machine,
    add_model,
    add_seed,
    load_model,
    number,
    open_resized,
    print_json,
    whole,
)
from glem_augment.io import expand
from glem_augment.model.weights import CONFIG, WEIGHTS

DESCRIPTION = """\
Make a flow that was trained on other images serve your classes. Every class gets the mean of its images' latents, their
variances (shrunk towards those of all classes together, so that a class may have one or two images) and its principal
modes. The flow itself is not trained, so this takes one pass over the images: seconds to minutes. DIR then holds a
model like any other, with your class names. glem train --init MODEL is the slower way, which trains the flow too.
Images are resized to the flow's size, and converted to its channels. Prints a JSON summary; images_per_class and
modes_per_class are the fewest and the most: n images have at most n - 1 modes, and one image gets those of all classes.
"""
EXAMPLES = """\
  glem adapt bundled:fashion-mnist photos/ --out runs/photos
  glem adapt org/name torch/cifar10@data --max-per-class 500 --out runs/cifar
  glem eval runs/photos photos-test/
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "adapt", DESCRIPTION, EXAMPLES, run)
    add_model(parser)
    add_data(parser, split="train")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the adapted model; made if missing")
    parser.add_argument("--rank", type=whole(1), default=64, metavar="K", help="modes per class (default: %(default)s)")
    parser.add_argument(
        "--shrinkage",
        type=number(0),
        default=10.0,
        metavar="N",
        help="of the variances: a class of N images takes half from its own, half from all classes' "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-per-class", type=whole(1), metavar="N", help="use at most N images of a class (default: all)"
    )
    add_seed(parser, "the dequantisation noise")
    parser.add_argument("--overwrite", action="store_true", help="write over a model in DIR")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    folder = expand(args.out)
    if not args.overwrite and any((folder / name).exists() for name in (WEIGHTS, CONFIG)):
        raise FileExistsError(f"{folder} holds a model already: give another folder, or --overwrite")
    model = load_model(args)
    data = open_resized(model, args.data, args.split, args.skip_bad)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, so that a folder that can't be made costs none
    began = time.monotonic()
    adapted = model.adapt(
        data, rank=args.rank, shrinkage=args.shrinkage, max_per_class=args.max_per_class, seed=args.seed
    )
    adapted.save(folder)
    record = adapted.config.training
    result = {
        "out": str(folder),
        "model": args.model,
        "model_sha256": record["adapted_from"]["weights_sha256"],
        "data": args.data,
        "split": args.split,
    }
    if args.skip_bad:
        result["skipped"] = len(data.skipped)
    result |= {
        "images": record["images"],
        "images_per_class": record["images_per_class"],
        "classes": adapted.classes,
        "modes_per_class": adapted.modes.fewest_and_most if adapted.modes else (0, 0),
        "psi": adapted.config.psi,
        "psi_is_the_flows": adapted.config.psi == model.config.psi,
        "seconds": round(time.monotonic() - began, 3),
    }
    print_json(result)
    return 0
