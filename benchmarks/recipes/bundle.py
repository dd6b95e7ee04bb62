"""Makes a bundled model of the flow that `glem train` trained with cifar10.yaml or imagenette.yaml.

    python benchmarks/recipes/bundle.py cifar10 runs/cifar10 CIFAR10   # CIFAR10/{train,test}/<class>/*
    python benchmarks/recipes/bundle.py imagenette runs/imagenette IMAGENETTE

The classes are fitted to the training images that are not held out: on the held-out images, these were more accurate
and more likely than the Gaussians that were learned with the flow. They have full covariances where the library can
store them. Weights of the flow's networks and modes are stored in half precision, all other tensors in full. The test
images are measured with these weights, and the record gets the result.

The files in the package were made by this script in the tree of commit 309e287, where `fit` estimated covariances by
other rules. With the estimate of today a file has other classes, and more than 8 MiB at 64 pixels.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from glem_augment import GLEM, open_data
from glem_augment.evaluation import calibrate, evaluate
from glem_augment.training.batches import stratified_split

HALVES = ("directions", "shared_directions")  # of the modes
RANKS = {"cifar10": 128, "imagenette": 64}  # of the modes, so that a file has at most 8 MiB
RECIPES = "benchmarks/recipes"


def save(model: GLEM, folder: str) -> None:
    """Save the model with its largest tensors in half precision."""
    assert model.modes is not None
    getattr(model.flow, "flow", model.flow).levels.half()  # behind a whitening, where covariances are full
    for name in HALVES:
        setattr(model.modes, name, getattr(model.modes, name).half())
    model.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RANKS)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--out", help="runs/bundled-NAME by default")
    args = parser.parse_args()
    out = args.out or f"runs/bundled-{args.name}"
    torch.set_num_threads(1)
    flow = GLEM.from_pretrained(args.run)
    trained, size = flow.config.training, flow.image_shape[1]
    data = open_data(args.data, "train", image_size=size)
    # The flow knows the images that trained it, so the temperature is fitted to the held-out images.
    settings = trained["config"]
    split = stratified_split(data.targets, len(data.classes), settings["val_fraction"], settings["seed"])
    model = GLEM.fit(data.subset(np.sort(np.concatenate([split.nf, split.g]))), flow=args.run, rank=RANKS[args.name])
    calibrate(model, data.subset(split.val))
    save(model, out)
    model = GLEM.from_pretrained(out)
    found = evaluate(model, open_data(args.data, "test", image_size=size))
    measured = {"images": found["n"], "accuracy": found["accuracy"], "nats_per_number": found["nats_per_number"]}
    images = args.name.upper()
    command = f"glem train {images} --config {RECIPES}/{args.name}.yaml --image-size {size}, {RECIPES}/bundle.py"
    facts = {"data": args.name, "license": "unknown", "command": command, "test": measured}
    model.config.training = {**trained, "adapt": model.config.training["adapt"], **facts}
    save(model, out)


if __name__ == "__main__":
    main()
