"""`glem demo`: the library at work, in four parts, on one HTML page."""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
Show the library at work with models and images inside the package. Train small networks on private samples and on real
images, and on few images with and without moves. Draw a synthetic data set, and measure the bundled model. DIR gets
index.html (one page with all pictures and numbers), the pictures, report.json and the synthetic images. The demo needs
no network and no GPU, and takes about a minute.
"""
EXAMPLES = """\
  glem demo
  glem demo --out my-demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("--out", type=common.out_folder, default="demo-out", metavar="DIR", help="(default: demo-out)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds: few images, numbers mean little")


def run(args: argparse.Namespace) -> None:
    from glem_augment.apps.demo import make_page

    make_page(args.out, args.quick, progress=not args.quiet)
