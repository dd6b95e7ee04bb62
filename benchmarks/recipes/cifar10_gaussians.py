"""The control of `bundled:cifar10`: a Gaussian for each class of CIFAR-10, in TAEF2's latents, without a flow.

    python benchmarks/recipes/cifar10_gaussians.py CIFAR10 --out runs/cifar10-gaussians   # CIFAR10/train/<class>/*

The Gaussians are fitted to the latents of the 50,000 training images and of their mirror images; nothing is trained.
"""

from __future__ import annotations

import argparse

import torch

from glem_augment import GLEM, open_data
from glem_augment.images.dataset import ImageData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", default="runs/cifar10-gaussians")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(args.data, "train")
    x, y = data.tensor(), torch.from_numpy(data.targets)
    both = ImageData.from_tensors(torch.cat([x, x.flip(3)]), torch.cat([y, y]), data.classes, data.class_ids, "cifar10")
    model = GLEM.create("identity", data.image_shape, data.classes, autoencoder="taef2").adapt(both)
    model.save(args.out)


if __name__ == "__main__":
    main()
