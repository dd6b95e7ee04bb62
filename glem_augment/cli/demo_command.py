"""``glem demo``: the library's main job on bundled images, in a few minutes."""

from __future__ import annotations

import argparse
from typing import Any

from glem_augment.cli.common import add_threads, set_threads, whole
from glem_augment.cli.parsers import new_parser
from glem_augment.io import expand

DESCRIPTION = """\
Load a flow and the bundled Fashion-MNIST images; measure the flow; write pictures and a small synthetic data set;
then train a small timm network on 1000 images with and without GLEMAugment, with several seeds, and print both
accuracies, whichever is higher. Needs no network and no GPU; a few minutes on 2 cores.
"""
EXAMPLES = """\
  glem demo
  glem demo --out demo-out --seeds 5
  glem demo --model runs/my-flow --quick
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "demo", DESCRIPTION, EXAMPLES, run)
    parser.add_argument(
        "--out", default="demo-out", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--model",
        default="bundled:fashion-mnist",
        metavar="MODEL",
        help="a flow for 1x28x28 images of Fashion-MNIST's classes (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=whole(1), metavar="N", help="training runs per arm (default: 3; 1 with --quick)"
    )
    parser.add_argument("--epochs", type=whole(1), metavar="N", help="of each run (default: 40; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds: few images, numbers mean little")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    from glem_augment.cli.demo import run_demo

    set_threads(args.threads)
    run_demo(expand(args.out), args.model, seeds=args.seeds, epochs=args.epochs, quick=args.quick)
    return 0
