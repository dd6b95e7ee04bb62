"""`glem info`: what a model is and how it was trained."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from glem_augment.cli import new_parser
from glem_augment.cli.common import add_model, finite, print_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import CONFIG, WEIGHTS

DESCRIPTION = """\
Say what a model is: image shape and bits, the numbers of its flow, parameters, files, classes, modes, and the
record of its training. The files are read and checked whole; a model on the Hugging Face Hub is downloaded first.
"""
EXAMPLES = """\
  glem info bundled:fashion-mnist
  glem info runs/photos --json
  glem info org/name@v1.0
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "info", DESCRIPTION, EXAMPLES, run)
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of YAML")


def run(args: argparse.Namespace) -> int:
    facts = model_facts(args.model)
    if args.json:
        print_json(facts)
    else:
        print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None), end="")
    return 0


def model_facts(name: str) -> dict[str, Any]:
    """Everything that `glem info` shows, as JSON can hold it. Raises ModelFileError for a damaged model."""
    model = GLEM.from_pretrained(name)
    assert model.origin_file is not None
    folder, config = model.origin_file.parent, model.config
    repo, _, commit = (model.origin or "").partition("@")
    return finite(
        {
            "model": name,
            "folder": str(folder),
            "hub": {"repo": repo, "commit": commit} if model.origin else None,
            "image_shape": list(model.image_shape),
            "bits": model.bits,
            "flow": config.flow,
            "parameters": {
                "flow": sum(p.numel() for p in model.flow.parameters()),
                "gaussians": sum(p.numel() for p in model.gaussians.parameters()),
                "modes": 0 if model.modes is None else sum(b.numel() for b in model.modes.buffers()),
            },
            "files": {file: (folder / file).stat().st_size for file in (WEIGHTS, CONFIG)},
            "psi": None if config.psi is None else list(config.psi),
            "num_classes": model.num_classes,
            "classes": model.classes,
            "class_ids": model.class_ids,
            "modes_per_class": (0, 0) if model.modes is None else model.modes.fewest_and_most,
            "training": config.training,
        }
    )
