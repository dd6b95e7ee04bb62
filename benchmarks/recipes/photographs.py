"""Makes `bundled:photographs`: the modes in which photographs of one thing vary, in TAEF2's latents at 128 pixels.

    python benchmarks/recipes/photographs.py IMAGENETTE128 --out runs/photographs   # IMAGENETTE128/train/<class>/*

The modes are those of the pooled within-class covariance of the training images: statistics, no images. The model has
one class, so it moves anyone's photographs before it is adapted. Modes are stored in half precision.
"""

from __future__ import annotations

import argparse
import copy

import torch

from glem_augment import GLEM, open_data
from glem_augment.data.classes import ONE_CLASS
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.latent.modes import ClassModes

RANK, SIZE = 128, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", default="runs/photographs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(args.data, "train", image_size=SIZE, channels=3)
    adapted = GLEM.create("identity", data.image_shape, data.classes, autoencoder="taef2").adapt(data, rank=RANK)
    assert adapted.modes is not None
    found, modes = adapted.modes, ClassModes(1, RANK, adapted.dim)
    modes.mean[0] = found.mean.mean(0)
    modes.directions[0] = modes.shared_directions[:] = found.shared_directions
    modes.scales[0] = modes.shared_scales[:] = found.shared_scales
    freedom = found.counts.double() - 1
    pooled = (freedom[:, None] * found.variance().double()).sum(0) / freedom.sum()
    along = (found.shared_scales[:, None] * found.shared_directions).double().square().sum(0)
    modes.rest[0], modes.counts[0] = (pooled - along).clamp_min(0).float(), int(found.counts.sum())
    for name in ("directions", "shared_directions"):
        setattr(modes, name, getattr(modes, name).half())
    config = copy.deepcopy(adapted.config)
    config.training["data"] = "imagenette128"
    config.class_ids = config.class_names = [ONE_CLASS]
    config.psi, config.posterior_temperature = None, 1.0
    gaussians = ClassGaussians(1, adapted.dim, psi=None)
    gaussians.mu.data[0] = modes.mean[0]
    gaussians.set_variance(pooled[None])
    model = GLEM(config, adapted.flow, gaussians, None, adapted.autoencoder)
    model.modes = modes
    model.save(args.out)


if __name__ == "__main__":
    main()
