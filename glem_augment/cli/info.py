"""`glem info`: describe a model and its training."""

from __future__ import annotations

import argparse
import math
from typing import Any

from glem_augment.cli import common

DESCRIPTION = """\
Describe a model: image shape and bits, the numbers of its flow, parameters, files, classes, modes, and the record of
its training. The files are validated; a model on the Hugging Face Hub is downloaded first. Of several private models of
the same images, it also says which promise holds for all of them together. Of the folder of a synthetic set it shows
the record of how the images were drawn.
"""
EXAMPLES = """\
  glem info bundled:fashion-mnist
  glem info runs/photos --json
  glem info org/name@v1.0
  glem info synthetic/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser, nargs="+")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of YAML")


def run(args: argparse.Namespace) -> None:
    from glem_augment.images.sources import PROVENANCE
    from glem_augment.io import expand, finite
    from glem_augment.privacy.record import promise
    from glem_augment.synthetic.export import read_provenance

    if len(args.model) == 1 and ((folder := expand(args.model[0])) / PROVENANCE).is_file():
        common.show(finite(read_provenance(folder)), args.json)
        return
    models = [model_facts(name) for name in args.model]
    for facts in models:
        if facts["privacy"] is not None:
            common.note(f"{facts['model']}: {promise(facts['privacy'])}")
    if len(models) == 1:
        common.show(models[0], args.json)
        return
    common.show({"models": models, "together": together([m["privacy"] for m in models])}, args.json)


def together(promises: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The promise of models of the same images together; None if one of them has none."""
    from glem_augment.privacy import total
    from glem_augment.privacy.record import promised

    if None in promises:
        common.note("glem: there is no promise for all of them together, since a model without privacy is among them")
        return None
    different = {p["sha256"]: p for p in promises if p is not None}
    if len(different) < len(promises):
        common.note("glem: one model is there twice, and its release counts once")
    found = [promised(p) for p in different.values()]
    delta = max(privacy.delta for privacy in found)
    mu, epsilon = total(found, delta)
    unit = max(found, key=lambda privacy: privacy.images_per_person).unit
    epsilon = math.ceil(epsilon * 1e4) / 1e4  # not below the promise
    return {"if they have the same images": True, "epsilon": epsilon, "delta": delta, "mu": mu, "unit": unit}


def model_facts(name: str) -> dict[str, Any]:
    """Everything that `glem info` shows, as JSON can hold it. Raises ModelFileError for a damaged model."""
    from glem_augment.io import finite
    from glem_augment.model.files import CONFIG
    from glem_augment.model.glem import GLEM

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
            "pixel_range": str(model.pixel_range),
            "flow": config.flow,
            "parameters": {
                "flow": sum(p.numel() for p in model.flow.parameters()),
                "gaussians": sum(p.numel() for p in model.gaussians.parameters()),
                "modes": 0 if model.modes is None else sum(b.numel() for b in model.modes.buffers()),
            },
            "files": {
                file.name: file.stat().st_size for file in (model.origin_file, folder / CONFIG) if file.is_file()
            },
            "psi": None if config.psi is None else list(config.psi),
            "class_model": config.classes,
            "posterior_temperature": config.posterior_temperature,
            "num_classes": model.num_classes,
            "classes": model.classes,
            "class_ids": model.class_ids,
            "privacy": config.privacy,
            "modes_per_class": (0, 0) if model.modes is None else model.modes.fewest_and_most,
            "training": config.training,
        }
    )
