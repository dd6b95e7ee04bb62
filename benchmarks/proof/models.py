"""Accuracy, likelihood, calibration and round trip of a model on test images.

    GLEM_DATA=... python benchmarks/proof/models.py --data cifar10 --model bundled:cifar10
    GLEM_DATA=... python benchmarks/proof/models.py --data cifar10 --model runs/cifar10-gaussians --name Gaussians

The numbers are those of `glem eval`. recipes/cifar10_gaussians.py makes the second model.
The Gaussians of Tiny ImageNet: `glem fit tiny-imagenet/ --autoencoder taef2 --image-size 64 --rank 1 --out ...`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, find_images, parser
from glem_augment import GLEM, open_data
from glem_augment.evaluation import evaluate
from glem_augment.images.dataset import images_for


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", required=True, help="a folder in $GLEM_DATA, or bundled:NAME")
    args.add_argument("--model", required=True, help="as for GLEM.from_pretrained")
    args.add_argument("--name", help="of the rows' arm (the model)")
    args.add_argument("--round-trip", type=int, default=1000, help="images (%(default)s)")
    args.add_argument("--limit", type=int, help="of the test images, the first (all)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    model = GLEM.from_pretrained(args.model)
    folder = args.data if args.data.startswith("bundled:") else find_images("models", args.data, args.data)
    data = images_for(model, open_data(folder, "test", image_size=model.image_shape[1]))
    found = evaluate(model, data.subset(range(args.limit)) if args.limit else data, round_trip=args.round_trip)
    measured = {name: value for name, value in found.items() if isinstance(value, int | float)}
    measured |= {f"round trip: {name}": value for name, value in found["round_trip"].items()}
    Rows("models", args.out).add(args.data, args.name or args.model, "", "test", measured)


if __name__ == "__main__":
    main()
