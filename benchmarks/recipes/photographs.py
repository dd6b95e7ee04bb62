"""Makes `bundled:photographs`: the modes in which photographs of one class vary, in TAEF2's latents at 128 pixels.

    python benchmarks/recipes/photographs.py IMAGENETTE128 --out runs/photographs   # IMAGENETTE128/train/<class>/*

The modes come from the pooled within-class covariance of the training images: statistics, no images. The model has one
class, so it moves photographs of any class without adapting. Modes are stored in half precision.
"""

from __future__ import annotations

import argparse

import torch

from glem_augment import GLEM, open_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", default="runs/photographs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(args.data, "train", image_size=128, channels=3)
    model = GLEM.fit(data, "taef2", rank=128, pooled=True)
    assert model.modes is not None
    for name in ("directions", "shared_directions"):
        setattr(model.modes, name, getattr(model.modes, name).half())
    model.config.training["data"] = "imagenette128"
    model.save(args.out)


if __name__ == "__main__":
    main()
