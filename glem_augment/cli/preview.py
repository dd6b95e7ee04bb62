"""`glem preview`: draw a picture of augmentations, samples and interpolations."""

from __future__ import annotations

import argparse
from pathlib import Path

from glem_augment.cli import common

DESCRIPTION = """\
Draw one labelled picture: real images and their moves at rising strength, samples of each class at several
temperatures, and interpolations within and between classes. Images are shown at the model's size. Look at the picture
before you train with a model: a moved image should still show its class. Policies that --import registers are shown
with their defaults. Without DATA it shows samples alone.
"""
EXAMPLES = """\
  glem preview bundled:fashion-mnist bundled:fashion-mnist --out preview.png
  glem preview runs/photos photos/ --split val --out preview.png
  glem preview runs/private --out samples.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser)
    common.add_data(parser, nargs="?")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    common.add_device(parser)


def run(args: argparse.Namespace) -> None:
    from glem_augment.evaluation.preview import preview
    from glem_augment.images.dataset import images_for
    from glem_augment.io import save_png
    from glem_augment.parts import kinds

    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {args.out}")
    model = common.load_model(args)
    data = None
    if args.data is not None:
        common.uncovered(args, model, args.out)
        data = images_for(model, args.data, split=args.split, cache_bytes=0)  # it shows few of the images
    modules, found = tuple(f"{name}." for name in args.modules), kinds("policy").items()
    own = [name for name, kind in found if not kind.wants_classifier and f"{kind.__module__}.".startswith(modules)]
    picture = preview(model, data, name=args.model, policies=own)
    save_png(picture, args.out)
    common.note(f"wrote {args.out} ({picture.width}x{picture.height})")
