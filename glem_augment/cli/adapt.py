"""``glem adapt``: a trained flow for other images and classes, in one pass over them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from glem_augment.cli.common import (
    DATA_HELP,
    MODEL_HELP,
    add_device,
    add_skip_bad,
    add_threads,
    finite,
    load_model,
    number,
    print_json,
    refuse_codes,
    report_skipped,
    whole,
)
from glem_augment.cli.parsers import new_parser
from glem_augment.data.dataset import open_data
from glem_augment.latent.adapt import check_out

DESCRIPTION = """\
Make a flow that was trained on other images serve your classes. Every class gets the mean of its images' latents, their
variances (shrunk towards those of all classes together, so that a class of one or two images is no problem) and its
principal modes. The flow itself is not trained, so this takes one pass over the images: seconds to minutes. DIR then
holds a model like any other, with your class names. glem train --init MODEL is the slower way, which trains the flow
too. Images are resized to the flow's size, and converted to its channels. Prints a JSON summary; images_per_class and
modes_per_class are the fewest and the most (of n images there are n - 1 modes at most; one image gets those of all).
"""
EXAMPLES = """\
  glem adapt bundled:fashion-mnist photos/ --out runs/photos
  glem adapt org/name torch/cifar10@data --max-per-class 500 --out runs/cifar
  glem eval runs/photos photos-test/
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "adapt", DESCRIPTION, EXAMPLES, run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the adapted model; made if missing")
    parser.add_argument("--split", default="train", help="of the data (default: %(default)s)")
    parser.add_argument("--rank", type=whole(1), default=64, metavar="K", help="modes per class (default: %(default)s)")
    parser.add_argument(
        "--shrinkage",
        type=number(0),
        default=10.0,
        metavar="N",
        help="of the variances, in images: a class of N images is half its own, half all's (default: %(default)s)",
    )
    parser.add_argument(
        "--max-per-class", type=whole(1), metavar="N", help="use at most N images of a class (default: all)"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="of the dequantisation noise (default: %(default)s)"
    )
    add_skip_bad(parser)
    parser.add_argument("--overwrite", action="store_true", help="write over a model in DIR")
    add_threads(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    folder = check_out(args.out, args.overwrite)
    model = load_model(args)
    refuse_codes(model)
    channels, height, width = model.image_shape
    data = open_data(
        args.data,
        args.split,
        image_size=(height, width),
        channels=channels if channels in (1, 3) else None,
        skip_bad=args.skip_bad,
    )
    report_skipped(data)
    folder.mkdir(parents=True, exist_ok=True)  # now, so that a folder that can't be made costs no work
    began = time.monotonic()
    adapted = model.adapt(
        data, rank=args.rank, shrinkage=args.shrinkage, max_per_class=args.max_per_class, seed=args.seed
    )
    adapted.save(folder)
    record = adapted.config.training
    print_json(
        finite(
            {
                "out": str(folder),
                "model": args.model,
                "model_sha256": record["adapted_from"]["weights_sha256"],
                "data": args.data,
                "split": args.split,
                **({"skipped": len(data.skipped)} if args.skip_bad else {}),
                "images": record["images"],
                "images_per_class": record["images_per_class"],
                "classes": adapted.classes,
                "modes_per_class": adapted.modes.fewest_and_most,
                "psi": adapted.config.psi,
                "psi_is_the_flows": adapted.config.psi == model.config.psi,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
    )
    return 0
