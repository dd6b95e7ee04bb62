"""``glem preview``: one picture of what a flow does with real images."""

from __future__ import annotations

import argparse
from typing import Any

from glem_augment.augment.transform import POLICIES
from glem_augment.cli.common import (
    CLASS_MAP_HELP,
    DATA_HELP,
    MODEL_HELP,
    add_device,
    add_skip_bad,
    add_threads,
    load_model,
    note,
    open_for,
    out_file,
    read_class_map,
    whole,
)
from glem_augment.cli.parsers import new_parser
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
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--split", default="test", help="of the data (default: %(default)s)")
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
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of all draws (default: %(default)s)")
    add_skip_bad(parser)
    parser.add_argument("--class-map", metavar="FILE|order", help=CLASS_MAP_HELP)
    add_threads(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from glem_augment.evaluation.preview import preview

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
