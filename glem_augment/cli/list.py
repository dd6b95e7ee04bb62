"""`glem list`: the models inside the package."""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
List the models inside the package. Accuracy and bits/dim were recorded in training, on held-out training images. bytes
is the size of the weights. license is the licence of the training images, which samples inherit.
"""
EXAMPLES = """\
  glem list
  glem list --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="one JSON object, with the names of all classes")


def run(args: argparse.Namespace) -> None:
    from glem_augment.hub.cards import held_out
    from glem_augment.model.config import licence_id
    from glem_augment.model.weights import WEIGHTS, bundled_models, local_folder, read_config

    models = {}
    for name in (f"bundled:{each}" for each in bundled_models()):
        folder = local_folder(name)
        assert folder is not None
        config = read_config(folder)
        models[name] = {
            "image_shape": list(config.image_shape),
            "bits": config.bits,
            "classes": config.class_names,
            "bytes": (folder / WEIGHTS).stat().st_size,
            **held_out(config.training),
            "license": licence_id(config.training.get("license")),
        }
    common.show(models, args.json)
