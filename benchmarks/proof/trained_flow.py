r"""The result of a training run on its test images: NF accuracy, bits/dim, round trip, and training seconds.

    python benchmarks/proof/trained_flow.py RUN [--data DATA] [--threads N]

    python benchmarks/paper/research.py $GLEM_DATA/cifar10 --config benchmarks/recipes/cifar10.yaml \
        --out runs/cifar10
    GLEM_DATA=... python benchmarks/proof/trained_flow.py runs/cifar10 --threads 1

Seconds are wall-clock time from the run's record: training steps, M-steps and held-out measurements up to the end of
the last epoch. The default of DATA is the folder of the run's name in $GLEM_DATA. The weights are not copied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, parser, write_results
from glem_augment import GLEM, open_data
from glem_augment.evaluation.metrics import evaluate
from glem_augment.training.log import METRICS


def main() -> None:
    args = parser(__doc__)
    args.add_argument("run", type=Path, help="folder that `glem train` wrote")
    args.add_argument("--data", help="images, on whose test split it is measured (default: $GLEM_DATA/<name of RUN>)")
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = GLEM.from_pretrained(args.run)
    data = open_data(args.data or find_images("trained_flow", str(args.run), args.run.name), "test")
    epochs = [json.loads(line) for line in (args.run / METRICS).read_text().splitlines()]
    last = [entry for entry in epochs if entry["kind"] == "epoch"][-1]
    found = evaluate(model, data, round_trip=len(data))
    settings = model.config.training["config"]
    row = {
        "flow": args.run.name,
        "parameters": sum(p.numel() for p in model.flow.parameters()),
        "training seconds": round(last["seconds"]),
        "threads in training": settings["threads"],
        "steps": last["step"],
        "NF accuracy %": round(100 * found["accuracy"], 2),
        "bits/dim": round(found["bits_per_dim"], 3),
        "pixels that come back %": 100 * found["round_trip"]["within_half_step"],
    }
    write_results(
        args.out, "trained_flow", "A trained flow on its test images", [row], test_images=len(data), measured=found,
        settings=settings,
    )  # fmt: skip


if __name__ == "__main__":
    main()
