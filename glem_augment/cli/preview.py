"""`glem preview`: one picture of what a flow does with real images."""

from __future__ import annotations

import argparse
from typing import Any

from glem_augment.augment.transform import POLICIES
from glem_augment.cli import new_parser
from glem_augment.cli.common import (
    add_class_map,
    add_data,
    add_machine,
    add_model,
    add_seed,
    load_model,
    note,
    open_for,
    out_file,
    read_class_map,
    whole,
)
from glem_augment.evaluation.preview import preview
from glem_augment.io import save_png

DESCRIPTION = """\
Draw one labelled picture: real images and their augmentations at rising strength, samples of each class at several
temperatures, and interpolations within and between classes. Look at it before you train with a flow: an augmented
image should still be one of its class.
"""
EXAMPLES = """\
  glem preview bundled:fashion-mnist bundled:fashion-mnist --out preview.png
  glem preview runs/photos photos/ --split val --rows 10 --policy mixup --modes 16 --out preview.png
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "preview", DESCRIPTION, EXAMPLES, run)
    add_model(parser)
    add_data(parser)
    add_class_map(parser)
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    parser.add_argument(
        "--rows", type=whole(1), default=6, metavar="N", help="real images to augment (default: %(default)s)"
    )
    parser.add_argument(
        "--policy",
        choices=("all", *POLICIES),
        default="all",
        help="mixup with an image of the same class, noise along the modes, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--modes", type=whole(1), metavar="N", help="principal modes to move along (default: all that are stored)"
    )
    add_seed(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    out = out_file(args.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {args.out}")
    class_map = read_class_map(args.class_map)
    model = load_model(args)
    if args.modes is not None and model.modes is None:
        raise ValueError(f"{args.model} has no modes stored; leave --modes out, or train with --modes-rank")
    data, _ = open_for(model, args.data, args.split, class_map, args.skip_bad)
    policies = POLICIES if args.policy == "all" else (args.policy,)
    picture = preview(model, data, rows=args.rows, policies=policies, modes=args.modes, seed=args.seed)
    save_png(picture, out)
    note(f"wrote {out} ({picture.width}x{picture.height})")
    return 0
