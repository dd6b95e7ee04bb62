"""`glem eval`: the flow as a classifier and as a density, on labelled images."""

from __future__ import annotations

import argparse
from typing import Any

from glem_augment.cli import new_parser
from glem_augment.cli.common import (
    add_class_map,
    add_data,
    add_machine,
    add_model,
    finite,
    load_model,
    note,
    open_for,
    out_file,
    print_json,
    read_class_map,
    whole,
    without_splits,
)
from glem_augment.evaluation.metrics import evaluate, spread
from glem_augment.io import write_json

DESCRIPTION = """\
Classify labelled images with a flow, and measure how well it models them. Prints one JSON object:

  accuracy, top5      share of images whose class is the most likely (among the 5 most likely) under the flow
  bits_per_dim        -log2 p(image | its class) per pixel and channel, at the flow's bit depth ("bits")
  bits_per_dim_marginal  the same for p(image), all classes equally likely
  ece                 expected calibration error of the posterior, 15 bins
  round_trip          image -> latent -> image without clamping: errors in uint8 steps, share within half a step
  images_per_second   classification alone
  skipped             images left out, with --skip-bad

Images are resized to the flow's size, and converted to its channels.
"""
EXAMPLES = """\
  glem eval bundled:fashion-mnist bundled:fashion-mnist
  glem eval runs/photos photos/ --split val --out photos.json
  glem eval runs/cifar torch/cifar10@data --limit 1000 --class-map order
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "eval", DESCRIPTION, EXAMPLES, run)
    add_model(parser)
    add_data(parser, split=None)
    add_class_map(parser)
    parser.add_argument(
        "--batch-size", type=whole(1), default=256, metavar="N", help="images at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=whole(1), metavar="N", help="use N images, evenly spread over the data (default: all)"
    )
    parser.add_argument(
        "--round-trip",
        type=whole(0),
        default=1000,
        metavar="N",
        help="images for the round trip, evenly spread; 0 for none (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the JSON to FILE too")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    out = None if args.out is None else out_file(args.out)
    class_map = read_class_map(args.class_map)
    model = load_model(args)
    whole_folder = without_splits(args.data)
    if whole_folder and args.split is not None:
        raise ValueError(f"{args.data} has no splits, such as train/ and test/ folders: leave --split out")
    data, _ = open_for(model, args.data, args.split or "test", class_map, args.skip_bad)
    if whole_folder and data.name == model.config.training.get("data"):
        note(f"these may be the images that the flow was trained on ({data.name}): their accuracy says little")
    if args.limit is not None and args.limit < len(data):
        data = data.subset(spread(len(data), args.limit))
    result = {"model": args.model, "data": args.data, "split": None if whole_folder else args.split or "test"}
    if args.skip_bad:
        result["skipped"] = len(data.skipped)
    result |= evaluate(model, data, args.batch_size, round_trip=args.round_trip)
    if out is not None:  # before the result is printed to a pipe whose reader may have left
        write_json(out, finite(result))
    print_json(result)
    return 0
