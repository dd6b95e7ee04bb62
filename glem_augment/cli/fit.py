"""`glem fit`: give a model your classes, from the pixels, an autoencoder's latents, or a trained flow."""

from __future__ import annotations

import argparse
import time
from typing import Any

from glem_augment.cli import common

DESCRIPTION = """\
Make a model of your labelled images in one pass; nothing is trained. Each class gets a mean, variances and principal
modes (the main directions in which its images differ: PCA per class) of
  the pixels, by default;
  the latents of an autoencoder, for photographs: --autoencoder taef2;
  the latents of a trained flow: --flow MODEL. Images are converted to the model's size and channels.
Each class borrows from all classes, and in TAEF2's latents from public photographs, so it may have one or two
images. This takes seconds to minutes.
glem train --init MODEL is slower and trains the flow too.

Prints a JSON summary. images_per_class and modes_per_class hold the smallest and the largest count over the classes. A
class of n images has at most n - 1 modes, and a class of one image gets the modes of all classes. Then look at the
model with glem preview, and measure it with glem eval.

--epsilon makes a model that you can share where you cannot share the images: the model, and every image drawn from it,
is (epsilon, delta)-differentially private. What glem eval and preview show of the images is not covered, and
neither are other models of the same images: their promises add up (glem info A B). docs/privacy.md has the proof.
"""
EXAMPLES = """\
  glem fit photos/ --image-size 64 --out runs/pixels
  glem fit photos/ --autoencoder taef2 --image-size 128 --out runs/photos
  glem fit torch/cifar100@data --flow bundled:cifar10 --max-per-class 500 --out runs/cifar
  glem eval runs/photos photos-test/
  glem fit private/ --autoencoder taef2 --image-size 64 --channels 3 --epsilon 1 --out runs/shareable
  glem generate runs/shareable --per-class 2000 --out shareable/
"""
EXCLUDED = "not with --epsilon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_data(parser, split="train")
    common.add_import(parser)
    latents = parser.add_mutually_exclusive_group()
    autoencoder = "taef2, hub:ORG/NAME or a codec of --import: model its latents"
    latents.add_argument("--autoencoder", metavar="NAME", help=autoencoder)
    flow = f"model the latents of its flow; {EXCLUDED}: {common.MODEL_HELP}"
    latents.add_argument("--flow", metavar="MODEL", help=flow)
    channels = "1: grey, 3: colour (default: 1 if all images are grey, otherwise 3)"
    parser.add_argument("--channels", type=int, choices=(1, 3), help=channels)
    common.add_image_size(parser, "without a flow (default: the common size of the images)")
    limits = "values of black and white (default: 0 255 of 8 bits, 0 65535 of 16, 0 1 of floats)"
    parser.add_argument("--value-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help=limits)
    common.add_out(parser, "folder for the model")
    common.add_count(parser, "--rank", f"modes per class; {EXCLUDED}", 64)
    common.add_count(parser, "--max-per-class", f"images of a class at most; {EXCLUDED} (default: all)")
    kind = f"a registered class model of --import in place of Gaussians; {EXCLUDED}"
    parser.add_argument("--class-model", metavar="KIND", help=kind)
    common.add_device(parser)
    group = parser.add_argument_group("differential privacy")
    epsilon = "make the model private: from 0.01 to 50; 1 is strong, 10 is weak; state --image-size and --channels, too"
    group.add_argument("--epsilon", type=float, metavar="E", help=epsilon)
    delta = "the promise's delta, at most 0.001 and below one over --images (default: 1e-6)"
    group.add_argument("--delta", type=float, metavar="D", help=delta)
    persons = "the most images of one person: the noise grows with it (default: 1)"
    common.add_count(group, "--images-per-person", persons)
    most = "the most images that there may be, which everybody will know (default: a million)"
    common.add_count(group, "--images", most)


def run(args: argparse.Namespace) -> None:
    from glem_augment.io import LEFT_OVER, remove_left_overs
    from glem_augment.model.glem import GLEM

    if args.epsilon is None and (args.delta or args.images_per_person or args.images):
        raise ValueError("--delta, --images-per-person and --images are for private models: give --epsilon, too")
    device = common.pick_device(args)
    found = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    found = {name for name in found if not LEFT_OVER.fullmatch(name)}  # of a run that was killed
    if found:
        raise FileExistsError(f"{args.out} holds {min(found)}: give a new folder")
    names = (
        "data", "split", "image_size", "channels", "value_range", "autoencoder", "flow", "rank", "max_per_class",
        "class_model",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names}
    if args.epsilon is not None:
        given = private_arguments(args, given)
    began = time.monotonic()
    model = GLEM.fit(device=device, **given)
    model.save(args.out)
    if args.epsilon is not None:
        remove_left_overs(args.out.glob(".*.tmp"))
    result = {
        "out": str(args.out),
        "flow": args.flow,
        "autoencoder": args.autoencoder,
        "data": args.data,
        "split": args.split,
        "classes": model.classes,
        "modes_per_class": model.modes.fewest_and_most if model.modes else (0, 0),
        "class_model": model.config.classes,
        "posterior_temperature": model.latent_classes.temperature,
        "seconds": round(time.monotonic() - began, 3),
    }
    if model.config.privacy is None:
        result |= {name: model.config.training[name] for name in ("images", "images_per_class")}
    else:
        result["privacy"] = model.config.privacy
        common.note(f"glem: {model.config.promise}")
    common.print_json(result)


def private_arguments(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `GLEM.fit` for a private model; says what to expect before anything is spent."""
    from glem_augment.images.dataset import open_data
    from glem_augment.privacy import Privacy
    from glem_augment.privacy.expectation import expectation
    from glem_augment.privacy.latents import check_arguments

    names = ("delta", "images_per_person", "images")
    stated = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    privacy = Privacy(args.epsilon, **stated)
    options = {name: given.pop(name) for name in ("flow", "rank", "max_per_class")}
    check_arguments(privacy, args.autoencoder, **options)
    opening = {name: given.pop(name) for name in ("data", "split", "image_size", "channels", "value_range")}
    images = open_data(**opening)
    common.note(f"glem: {expectation(privacy, len(images.classes), images.image_shape)}")
    return {**given, "data": images, "privacy": privacy}
