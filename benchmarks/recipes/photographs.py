"""Makes `bundled:photographs`: the modes in which photographs of one class vary, in TAEF2's latents at 128 pixels.

    python benchmarks/recipes/photographs.py IMAGENETTE128 --out runs/photographs   # IMAGENETTE128/train/<class>/*

The modes come from the pooled within-class covariance of the training images: statistics, no images. The model has one
class, so it moves photographs of any class without adapting. Modes are stored in half precision.
"""

from __future__ import annotations

import argparse

import torch

from glem_augment import GLEM, open_data
from glem_augment.classes.fit import fit_classes
from glem_augment.classes.statistics import class_statistics
from glem_augment.images.matching import ONE_CLASS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", default="runs/photographs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(args.data, "train", image_size=128, channels=3)
    model = GLEM.create("identity", data.image_shape, [ONE_CLASS], autoencoder="taef2").eval().requires_grad_(False)
    model.codec.fit(data.some(64))
    rows = data.rows_of_classes()
    latents = model.latents_of_classes(data, rows, seed=0)
    # One class, which varies as the images of one of the classes do.
    statistics = class_statistics(latents, len(rows), model.dim, rank=128).as_one_class()
    model.latent_classes = fit_classes(statistics, rank=128)
    assert model.modes is not None
    for name in ("directions", "shared_directions"):
        setattr(model.modes, name, getattr(model.modes, name).half())
    model.config.training["data"] = "imagenette128"
    model.save(args.out)


if __name__ == "__main__":
    main()
