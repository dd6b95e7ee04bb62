"""Make a trained flow ready to ship: networks and modes in half precision, and a posterior temperature if it has none.

    python benchmarks/proof/ship_flow.py runs/cifar10 --data $GLEM_DATA/cifar10 --name cifar10 --license unknown \
        --out glem_augment/bundled/models/cifar10

Loading turns the halves into float32, so both directions compute with the same numbers. The temperature is fitted to
the images that the recorded seed and share held out of the model's (last) training, of its own training set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment import GLEM, open_data
from glem_augment.evaluation import calibrate
from glem_augment.io import atomic_write
from glem_augment.model.weights import CONFIG, WEIGHTS, weights_bytes
from glem_augment.training.batches import stratified_split

HALVED = (".weight", "directions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("--data", help="its training data, if a temperature is to be fitted")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new one; may be the same")
    parser.add_argument("--name", help="what its record and its card call this data")
    parser.add_argument("--license", help="the data's licence there, as the Hub names it")
    args = parser.parse_args()
    model = GLEM.from_pretrained(args.model)
    state = model.state_dict()
    halves = {name: tensor.half() if name.endswith(HALVED) else tensor for name, tensor in state.items()}
    model.load_state_dict(halves)
    if args.data:
        record, data = model.config.training["config"], open_data(args.data, "train")
        rows = stratified_split(data.targets, model.num_classes, record["val_fraction"], record["seed"]).val
        print(f"T = {calibrate(model, data.subset(rows)):.4f} on {len(rows)} images")
    named = {"data": args.name, "license": args.license}
    model.config.training |= {key: value for key, value in named.items() if value}
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / WEIGHTS) as weights, atomic_write(args.out / CONFIG) as config:
        weights.write(weights_bytes(halves))
        config.write(model.config.to_json())


if __name__ == "__main__":
    main()
