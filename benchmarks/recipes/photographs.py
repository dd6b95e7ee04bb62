"""Makes `bundled:photographs`: the modes in which photographs of one class vary, in TAEF2's latents at 128 pixels.

    python benchmarks/recipes/photographs.py IMAGENETTE128 --out runs/photographs   # IMAGENETTE128/train/<class>/*

The modes come from the pooled within-class covariance of the training images: statistics, no images. The model has one
class, so it moves photographs of any class without adapting. Modes are stored in half precision.
"""

from __future__ import annotations

import argparse

import torch

from glem_augment import GLEM, open_data
from glem_augment.classes.classes import Classes
from glem_augment.classes.fit import fit_modes
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.statistics import ClassStatistics, class_statistics
from glem_augment.model.glem import STANDARDISED_BY

RANK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", default="runs/photographs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(args.data, "train", image_size=128, channels=3)
    model = GLEM.create("identity", data.image_shape, ["image"], autoencoder="taef2")
    model.codec.fit(data.some(STANDARDISED_BY))
    latents = model.latents_of_classes(data, data.rows_of_classes(), seed=0)
    pooled = class_statistics(latents, data.classes, model.dim, RANK, hold_out=False).pooled
    modes = fit_modes(ClassStatistics([pooled], pooled, whole=False), RANK)
    modes.directions = modes.directions.half()
    variance = (pooled.squares / pooled.count)[None]
    gaussians = ClassGaussians(1, model.dim, psi=None, initial_variance=float(variance.min()))
    gaussians.mu.data.copy_(pooled.mean[None])
    gaussians.set_variance(variance)
    model.latent_classes = Classes(gaussians, modes)
    model.config.psi = None
    model.config.training = {"data": "imagenette128", "images": len(data)}
    model.save(args.out)


if __name__ == "__main__":
    main()
