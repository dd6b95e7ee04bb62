"""Makes a bundled model of the flow that `glem train` trained with cifar10.yaml, imagenette.yaml or tiny_imagenet.yaml.

    python benchmarks/recipes/bundle.py cifar10 runs/cifar10 CIFAR10   # CIFAR10/{train,test}/<class>/*
    python benchmarks/recipes/bundle.py imagenette runs/imagenette IMAGENETTE
    python benchmarks/recipes/bundle.py tiny-imagenet runs/tiny_imagenet TINY_IMAGENET

Classes of CIFAR-10 and Imagenette are fitted to the training images that are not held out: on the held-out images,
these were more accurate and more likely than the Gaussians that were learned with the flow. The 200 classes of Tiny
ImageNet share modes and variances, so that the file has at most 8 MiB. Their means lie halfway between the learned
ones, which know the training images by heart, and shrunk means of latents: the best of five mixtures on the held-out
images, at the second epoch. The images in TINY_IMAGENET/val/<class>/ are its validation images, sorted by
val_annotations.txt.

Weights of the flow's networks and modes, and the Gaussians of many classes, are stored in half precision, all other
tensors in full. The test images are measured with these weights, and the record gets the result.

The files of CIFAR-10 and Imagenette in the package were made by this script in the tree of commit 309e287, where `fit`
estimated covariances by other rules. With the estimate of today a file has other classes, and more than 8 MiB at 64
pixels.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from glem_augment import GLEM, open_data
from glem_augment.evaluation import calibrate, evaluate
from glem_augment.training.batches import stratified_split

HALVES = ("directions", "shared_directions")  # of the modes
MANY = 100  # classes, from which on the means and Gaussians are halves, too
RANKS = {"cifar10": 128, "imagenette": 64, "tiny-imagenet": 48}  # of the modes, so that a file has at most 8 MiB
RECIPES = "benchmarks/recipes"


@torch.no_grad()
def average(model: GLEM) -> None:
    """Give all classes one variance, and means between the learned ones and the shrunk means of the latents."""
    modes, gaussians = model.modes, model.gaussians
    assert modes is not None and modes.common
    variance = modes.rest[0] + (modes.scales[0][:, None] * modes.directions[0]).square().sum(0)
    noise, middle = variance / modes.counts.float().mean(), modes.mean.mean(0)
    between = (modes.mean.var(0) - noise).clamp_min(0)
    shrunk = middle + (modes.mean - middle) * between / (between + noise)
    gaussians.mu.copy_((gaussians.mu + shrunk) / 2)
    gaussians.set_variance(variance.expand_as(gaussians.s))


def save(model: GLEM, folder: str) -> None:
    """Save the model with its largest tensors in half precision."""
    assert model.modes is not None
    getattr(model.flow, "flow", model.flow).levels.half()  # behind a whitening, where covariances are full
    many = model.num_classes >= MANY
    for name in (*HALVES, *(("mean",) if many else ())):
        setattr(model.modes, name, getattr(model.modes, name).half())
    if many:
        model.gaussians.half()
        model.flow.whiten.directions = model.flow.whiten.directions.half()
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
    model = GLEM.from_pretrained(args.run)
    trained, size, rank = model.config.training, model.image_shape[1], RANKS[args.name]
    data = open_data(args.data, "train", image_size=size)
    # The flow knows the images that trained it, so the temperature is fitted to the held-out images.
    settings = trained["config"]
    split = stratified_split(data.targets, len(data.classes), settings["val_fraction"], settings["seed"])
    seen = data.subset(np.sort(np.concatenate([split.nf, split.g])))
    if model.num_classes < MANY:
        model = GLEM.fit(seen, flow=args.run, rank=rank)
    else:
        model.fit_modes(seen, rank)
        average(model)
    calibrate(model, data.subset(split.val))
    save(model, out)
    model = GLEM.from_pretrained(out)
    found = evaluate(model, open_data(args.data, "test", image_size=size))
    measured = {"images": found["n"], "accuracy": found["accuracy"], "nats_per_number": found["nats_per_number"]}
    recipe, images = args.name.replace("-", "_"), args.name.replace("-", "_").upper()
    command = f"glem train {images} --config {RECIPES}/{recipe}.yaml --image-size {size}, {RECIPES}/bundle.py"
    facts = {"data": args.name, "license": "unknown", "command": command, "test": measured}
    model.config.training = {**trained, **model.config.training, **facts}
    save(model, out)


if __name__ == "__main__":
    main()
