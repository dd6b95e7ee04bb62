"""`glem adapt`: another name of `glem fit`."""

from __future__ import annotations

import argparse

from glem_augment.cli import common, fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, "Another name of glem fit DATA --flow MODEL; see glem fit --help.", "  glem fit --help")
    parser.add_argument("model", metavar="MODEL", help="identity, for no flow, or " + common.MODEL_HELP)
    common.add_data(parser, split="train")
    parser.add_argument("--autoencoder", metavar="NAME", help="taef2 or hub:ORG/NAME, with MODEL identity")
    fit.add_options(parser)


def run(args: argparse.Namespace) -> None:
    args.flow = None if args.model == "identity" else args.model
    instead = f"glem fit DATA --flow {args.model}" if args.flow else "glem fit DATA"
    common.note(f"glem: adapt is now called fit: {instead}")
    args.epsilon = args.delta = args.images_per_person = args.public = args.channels = None
    fit.run(args)
