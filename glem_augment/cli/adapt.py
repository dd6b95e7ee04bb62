"""`glem adapt`: give new classes to a trained flow or to the identity."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Literal

from glem_augment.cli import common

DESCRIPTION = """\
Give your classes to a flow that was trained on other images. MODEL identity is no flow: it models the pixels or, with
--autoencoder taef2, the latents of an autoencoder, for photographs. Each class gets a mean, variances and principal
modes from the latents of its images. Variances are shrunk towards the pooled variances, so a class may have one or two
images. Nothing is trained: this takes one pass over the images, seconds to minutes. DIR then holds a model with your
class names. glem train --init MODEL is slower and trains the flow too. Images are converted to the flow's size and
channels.

Prints a JSON summary. images_per_class and modes_per_class hold the smallest and the largest count over the classes. A
class of n images has at most n - 1 modes, and a class of one image gets the modes of all classes. glem eval --help
explains moves_rejected.
"""
EXAMPLES = """\
  glem adapt identity photos/ --image-size 64 --out runs/pixels
  glem adapt identity photos/ --autoencoder taef2 --image-size 128 --out runs/photos
  glem adapt bundled:cifar10 torch/cifar100@data --max-per-class 500 --out runs/cifar
  glem eval runs/photos photos-test/
"""

IDENTITY: Literal["identity"] = "identity"
INSTEAD = (
    "use the modes of the pixels: glem adapt identity DATA; or of an autoencoder's latents: glem adapt identity DATA "
    "--autoencoder taef2 --image-size 128"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser, "identity, " + common.MODEL_HELP)
    common.add_data(parser, split="train")
    common.add_image_size(parser, "for MODEL identity (default: the common size of the images)")
    autoencoder = "for MODEL identity: model the latents of taef2 or hub:ORG/NAME (default: model pixels)"
    parser.add_argument("--autoencoder", metavar="NAME", help=autoencoder)
    common.add_out(parser, "folder for the adapted model")
    common.add_count(parser, "--rank", "modes per class, or per part", 64)
    common.add_count(parser, "--parts", "groups of similar images per class, each with modes: for better samples", 1)
    pooled = "one class for all images, with modes from all classes: for moves of any image"
    parser.add_argument("--pooled", action="store_true", help=pooled)
    half = "images of a class at which its variance and the pooled variance count equally (default: %(default)g)"
    parser.add_argument("--shrinkage", type=common.number(0), default=10.0, metavar="N", help=half)
    common.add_count(parser, "--max-per-class", "images of a class at most (default: all)")
    common.add_seed(parser, "the dequantisation noise")
    where = "reference: leave out a Jet's flow, and load it from MODEL each time (default: copy)"
    parser.add_argument("--weights", choices=("copy", "reference"), default="copy", help=where)
    parser.add_argument("--overwrite", action="store_true", help="write over a model in DIR")
    common.add_machine(parser)


def run(args: argparse.Namespace) -> None:
    from glem_augment.distributed import is_primary
    from glem_augment.images.dataset import open_data
    from glem_augment.images.matching import ONE_CLASS
    from glem_augment.model.glem import GLEM
    from glem_augment.model.weights import CONFIG, WEIGHTS

    folder = args.out
    if not args.overwrite and any((folder / name).exists() for name in (WEIGHTS, CONFIG)):
        raise FileExistsError(f"{folder} holds a model already: give another folder, or --overwrite")
    reading = {"skip_bad": args.skip_bad, "progress": not args.quiet}
    if args.model == IDENTITY and not Path(IDENTITY).is_dir():
        device = common.pick_device(args)
        channels = 3 if args.autoencoder else None
        data = open_data(args.data, args.split, common.height_and_width(args.image_size), channels, **reading)
        model = GLEM.create(IDENTITY, data.image_shape, [ONE_CLASS], autoencoder=args.autoencoder).eval().to(device)
        common.name_skipped(data)
    elif args.image_size or args.autoencoder:
        raise ValueError(f"--image-size and --autoencoder are for MODEL {IDENTITY}: leave them out with {args.model}")
    else:
        model = common.load_model(args)
        data = common.open_resized(model, args.data, args.split, **reading)
    began = time.monotonic()
    names = ("rank", "parts", "pooled", "shrinkage", "max_per_class", "seed")
    adapted = model.adapt(data, progress=not args.quiet, **{name: getattr(args, name) for name in names})
    if not is_primary():
        return
    adapted.save(folder, args.weights)
    record = adapted.config.training
    if args.pooled:
        data = data.with_targets(data.targets * 0, adapted.classes)
    instead = INSTEAD if adapted.config.flow["coupling"] != IDENTITY else ""
    result = {
        "out": str(folder),
        "model": args.model,
        "model_sha256": record["adapted_from"]["weights_sha256"],
        "data": args.data,
        "split": args.split,
        "skipped": len(data.skipped),
        "images": record["images"],
        "images_per_class": record["images_per_class"],
        "classes": adapted.classes,
        "modes_per_class": adapted.modes.fewest_and_most if adapted.modes else (0, 0),
        "psi": adapted.config.psi,
        "posterior_temperature": adapted.config.posterior_temperature,
        "moves_rejected": common.moves(adapted, data, instead, progress=not args.quiet),
        "seconds": round(time.monotonic() - began, 3),
    }
    common.print_json(result)
