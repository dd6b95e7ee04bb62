"""`glem info`: what a model is and how it was trained."""

from __future__ import annotations

import argparse
from typing import Any

from glem_augment.cli.common import add_model, finite, print_json
from glem_augment.cli.main import new_parser
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
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    facts = model_facts(args.model)
    if args.json:
        print_json(facts)
    else:
        print(_text(facts))
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


def _modes(fewest: int, most: int) -> str:
    if most == 0:
        return "none stored"
    return f"{most} per class" if fewest == most else f"{fewest} to {most} per class, fewer where images were few"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _text(facts: dict[str, Any]) -> str:
    channels, height, width = facts["image_shape"]
    numbers = {key: value for key, value in facts["flow"].items() if key not in ("preset", "image_shape")}
    parameters, files = facts["parameters"], facts["files"]
    names, ids = facts["classes"], facts["class_ids"]
    shown = [n if n == i else f"{n} ({i})" for n, i in zip(names[:20], ids[:20], strict=True)]
    psi = facts["psi"]
    rows = [
        ("model", facts["model"]),
        ("folder", facts["folder"]),
        *([("hub", "{repo}, commit {commit}".format(**facts["hub"]))] if facts["hub"] else []),
        ("images", f"{channels}x{height}x{width} (channels x height x width), {facts['bits']} bits"),
        ("flow", f"{facts['flow'].get('preset', 'flow')}: {_pairs(numbers)}"),
        (
            "parameters",
            f"{parameters['flow']:,} in the flow, {parameters['gaussians']:,} in the class Gaussians",
        ),
        ("files", ", ".join(f"{name} {_size(size)}" for name, size in files.items())),
        ("variances", "plain" if psi is None else f"psi(s) = {psi[0]:g} sigmoid({psi[1]:g} s) + {psi[2]:g}"),
        ("classes", f"{len(names)}: {', '.join(shown)}{', ...' if len(names) > 20 else ''}"),
        ("modes", _modes(*facts["modes_per_class"])),
    ]
    training = dict(facts["training"])
    if training:
        rows.append(("trained on", f"{training.get('data', '?')}, {training.get('images', '?')} images"))
        held_out = training.get("held_out")
        if isinstance(held_out, dict) and held_out:
            rows.append(("held out", _pairs(held_out)))
        config = training.get("config")
        if isinstance(config, dict):
            rows.append(("settings", _pairs(config)))
    else:
        rows.append(("trained on", "no record"))
    return "\n".join(f"{key:<12}{value}" for key, value in rows)


def _pairs(table: dict[str, Any]) -> str:
    return ", ".join(f"{key} {round(v, 4) if isinstance(v, float) else v}" for key, v in table.items())
