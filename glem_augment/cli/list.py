"""`glem list`: the flows that ship, and those on the Hugging Face Hub."""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
List the flows inside the package and, with --hub, those on the Hugging Face Hub that carry the tag glem-augment (the
first 100). Accuracy and bits/dim are those on the held-out part of the training images, as the training recorded them;
size is that of the weights; the licence is that of the training images, which samples inherit.
"""
EXAMPLES = """\
  glem list
  glem list --json
  glem list --hub
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("--hub", action="store_true", help="those on the Hub too")
    parser.add_argument("--json", action="store_true", help="one JSON object, with the names of all classes")


def run(args: argparse.Namespace) -> None:
    from glem_augment.hub.download import flows_on_hub, summary
    from glem_augment.model.weights import WEIGHTS, bundled_models, local_folder, read_config

    flows = {}
    for name in (f"bundled:{each}" for each in bundled_models()):
        if folder := local_folder(name):
            flows[name] = summary(read_config(folder), (folder / WEIGHTS).stat().st_size)
    common.show(flows | (flows_on_hub(progress=not args.quiet) if args.hub else {}), args.json)
