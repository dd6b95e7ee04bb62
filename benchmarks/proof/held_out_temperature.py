"""Fit the posterior's temperature of a model that was trained before `glem train` did so, and write it to its config.

    python benchmarks/proof/held_out_temperature.py glem_augment/bundled/models/fashion-mnist

The images are those that the recorded seed and share held out of the model's (last) training, of its own training set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment import GLEM, open_data
from glem_augment.evaluation import calibrate
from glem_augment.io import atomic_write
from glem_augment.model.weights import CONFIG
from glem_augment.training.batches import stratified_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model, whose config.json is written again")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="its training data (%(default)s)")
    args = parser.parse_args()
    model, data = GLEM.from_pretrained(args.model), open_data(args.data, "train")
    record = model.config.training["config"]
    rows = stratified_split(data.targets, model.num_classes, record["val_fraction"], record["seed"]).val
    print(f"T = {calibrate(model, data.subset(rows)):.4f} on {len(rows)} images")
    with atomic_write(args.model / CONFIG) as file:
        file.write(model.config.to_json())


if __name__ == "__main__":
    main()
