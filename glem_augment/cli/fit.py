"""`glem fit`: give a model your classes, from the pixels, an autoencoder's latents, or a trained flow."""

from __future__ import annotations

import argparse
import time

from glem_augment.cli import common

DESCRIPTION = """\
Make a model of your labelled images in one pass; nothing is trained. Each class gets a mean, variances and principal
modes (the main directions in which its images differ: PCA per class) of
  the pixels, by default;
  the latents of an autoencoder, for photographs: --autoencoder taef2;
  the latents of a trained flow: --flow MODEL. Images are converted to the flow's size and channels.
Variances are shrunk towards the pooled variances, so a class may have one or two images. This takes seconds to minutes.
glem train --init MODEL is slower and trains the flow too.

Prints a JSON summary. images_per_class and modes_per_class hold the smallest and the largest count over the classes. A
class of n images has at most n - 1 modes, and a class of one image gets the modes of all classes. Then look at the
model with glem preview, and measure it with glem eval.
"""
EXAMPLES = """\
  glem fit photos/ --image-size 64 --out runs/pixels
  glem fit photos/ --autoencoder taef2 --image-size 128 --out runs/photos
  glem fit torch/cifar100@data --flow bundled:cifar10 --max-per-class 500 --out runs/cifar
  glem eval runs/photos photos-test/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_data(parser, split="train")
    parser.add_argument("--autoencoder", metavar="NAME", help="taef2 or hub:ORG/NAME: model its latents")
    parser.add_argument("--flow", metavar="MODEL", help=f"model the latents of its flow: {common.MODEL_HELP}")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `glem adapt` has, too."""
    common.add_image_size(parser, "without a flow (default: the common size of the images)")
    common.add_out(parser, "folder for the model")
    common.add_count(parser, "--rank", "modes per class, or per part", 64)
    common.add_count(parser, "--parts", "groups of similar images per class, each with modes: for better samples", 1)
    half = "images of a class at which its variance and the pooled variance count equally (default: %(default)g)"
    parser.add_argument("--shrinkage", type=common.number(0), default=10.0, metavar="N", help=half)
    common.add_count(parser, "--max-per-class", "images of a class at most (default: all)")
    common.add_seed(parser, "the dequantisation noise")
    parser.add_argument("--overwrite", action="store_true", help="write over a model in DIR")
    common.add_machine(parser)


def run(args: argparse.Namespace) -> None:
    from glem_augment.distributed import is_primary
    from glem_augment.model.glem import GLEM
    from glem_augment.model.weights import CONFIG, WEIGHTS

    folder = args.out
    if not args.overwrite and any((folder / name).exists() for name in (WEIGHTS, CONFIG)):
        raise FileExistsError(f"{folder} holds a model already: give another folder, or --overwrite")
    began, device = time.monotonic(), common.pick_device(args)
    data = GLEM.images_to_fit(
        args.data,
        args.flow,
        split=args.split,
        image_size=common.height_and_width(args.image_size),
        skip_bad=args.skip_bad,
        progress=not args.quiet,
    )
    common.name_skipped(data)
    names = ("autoencoder", "flow", "rank", "parts", "shrinkage", "max_per_class", "seed")
    model = GLEM.fit(data, device=device, progress=not args.quiet, **{name: getattr(args, name) for name in names})
    if not is_primary():
        return
    model.save(folder)
    record = model.config.training
    result = {
        "out": str(folder),
        "flow": args.flow,
        "autoencoder": args.autoencoder,
        "data": args.data,
        "split": args.split,
        "skipped": len(data.skipped),
        "images": record["images"],
        "images_per_class": record["images_per_class"],
        "classes": model.classes,
        "modes_per_class": model.modes.fewest_and_most if model.modes else (0, 0),
        "posterior_temperature": model.latent_classes.temperature,
        "seconds": round(time.monotonic() - began, 3),
    }
    common.print_json(result)
