"""Do moves of photographs help, beside common stacks? Imagenette at 64 pixels with few images per class.

    GLEM_DATA=... python benchmarks/proof/photographs.py --per-class 20 50 --seeds 0 1 2 3 4

A small ResNet of timm is trained from scratch with crop + flip, with the best of ten other stacks (up to three
operations on top), and with moves. Moves are noise, mixup and adversarial steps (against the network in training; in
stored rows, against a network trained with crop + flip). They follow modes of the pixels, of TAEF2's latents, or of a
flow in these latents that was trained on the same few images. 1,000 other training images choose the best stack of
each kind, with seed 0. Each seed draws other training images. All seeds are measured on the same 1,000 test images.
`glem compare` does the same on the user's images. Stored rows are not measured again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, parser, write_results
from benchmarks.paper.research import method_trainer
from glem_augment import GLEM, Adversarial, ImageData, Noise, open_data
from glem_augment.evaluation.compare import report
from glem_augment.evaluation.intervals import difference
from glem_augment.evaluation.stacks import ORDINARY, PLAIN, POLICIES, Stack, moves
from glem_augment.evaluation.trainings import MODES, Comparison, models_for
from glem_augment.io import write_json

NAME, SIZE, STEPS = "photographs", 64, 300
SHOWN = {"pixels": "pixel modes", "autoencoder": "taef2 modes", "flow": "flow's modes"}
TRIED = (
    *POLICIES,
    Noise(strength=2.0),
    Adversarial(strength=0.5),
    Adversarial(strength=1.0),
)
OTHERS = (
    *ORDINARY,
    Stack("RandAugment, RandomErasing", "ordinary", ("RandAugment", "RandomErasing")),
    Stack("RandomErasing, Mixup", "ordinary", ("RandomErasing",), "MixUp"),
    Stack("RandomErasing, CutMix", "ordinary", ("RandomErasing",), "CutMix"),
    Stack("RandAugment, RandomErasing, CutMix", "ordinary", ("RandAugment", "RandomErasing"), "CutMix"),
)


def few(data: ImageData, per_class: int, seed: int, first: int = 0) -> ImageData:
    """Random images, equally many of each class: the images from `first` on in the seed's random order."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(data.targets == k))[first:][:per_class] for k in range(len(data.classes))]
    return data.subset(np.sort(np.concatenate(rows)))


def trained_flow(data: ImageData) -> GLEM:
    """A flow in TAEF2's latents, trained on these images alone, with modes of these images."""
    settings: dict[str, Any] = dict(
        preset="latent", flow_options=dict(whiten=64, depth=[6], blocks=[1], width=[128]),
        autoencoder="taef2", batch_size=50,
        epochs=max(1, 15_000 // len(data)), lr=1e-3, latent_noise=0.3, augment=("flip", "crop"), threads=1,
    )  # fmt: skip
    with TemporaryDirectory() as out:
        model = method_trainer("lambda0-psi", data, out, progress=False, **settings).fit()
        return model.adapt(data, rank=MODES, progress=False)


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--per-class", nargs="+", type=int, default=[20, 50], help="training images (20 50)")
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="at most ten (0 1 2 3 4)")
    args.add_argument("--flow", nargs="*", type=int, default=[20], help="of --per-class: with a flow, too (20)")
    args.add_argument("--steps", type=int, default=STEPS, help="of each training (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    folder = find_images(NAME, "imagenette128", "imagenette128")
    train, test = (open_data(folder, split, image_size=SIZE, channels=3, progress=False) for split in ("train", "val"))
    path = args.out / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    tables: list[dict[str, Any]] = []

    def accuracy(comparison: Comparison, stack: Stack, images: ImageData, judged: ImageData, **known: Any) -> float:
        known |= {"stack": stack.name, "kind": stack.kind, "steps": args.steps}
        for row in rows:
            if known.items() <= row.items():
                return float(row["value"])
        rows.append(known | {"value": comparison.accuracy(stack, images, judged, known["seed"])})
        write_json(path, rows)
        print(*rows[-1].values(), flush=True)
        return float(rows[-1]["value"])

    for per_class in args.per_class:
        measured: dict[Stack, list[float]] = {}
        own = few(train, per_class, 0)
        models = models_for(own, "taef2", None) | ({"flow": trained_flow} if per_class in args.flow else {})
        stacks = [PLAIN, *OTHERS, *(stack for kind in models for stack in moves(kind, SHOWN[kind], TRIED))]
        held = few(train, 100, 0, first=per_class)
        comparison = Comparison(models, args.steps)
        tuned = {
            s: accuracy(comparison, s, own, held, metric="validation", per_class=per_class, seed=0) for s in stacks
        }
        kinds = dict.fromkeys(stack.kind for stack in stacks)
        chosen = [max((s for s in stacks if s.kind == kind), key=lambda s: tuned[s]) for kind in kinds]
        for seed in args.seeds:
            images = few(train, per_class, seed)
            comparison = Comparison(models, args.steps)
            for stack in chosen:
                value = accuracy(comparison, stack, images, test, metric="test", per_class=per_class, seed=seed)
                measured.setdefault(stack, []).append(value)
        lines = report(measured)  # in the order of `chosen`: crop + flip and the best other stack come first
        strongest = max(lines[:2], key=lambda line: line["mean"])
        for line in lines:
            over = difference(line, strongest) if line is not strongest else (None, None)
            tables.append(
                {
                    "images per class": per_class, "stack": line["name"], "seeds": len(line["accuracies"]),
                    "accuracy": line["mean"], "+/-": line["interval"], "over crop + flip": line["gain"],
                    "+/- (1)": line["gain_interval"], "over the best other stack": over[0], "+/- (2)": over[1],
                }
            )  # fmt: skip
    write_results(args.out, NAME, "Few photographs per class (Imagenette, 64 pixels)", tables, record=rows)


if __name__ == "__main__":
    main()
