"""Is a synthetic set like its real images, are its labels right, and are its images copies?

    python examples/quality_report.py synthetic/ photos/train photos/test --out report/

Compares up to 5000 synthetic images with equally many training images of the model, and with equally many held-out
ones. Prints numbers as JSON; the folder of --out gets them as report.json, and report.png, which shows synthetic images
beside the nearest training images. A small network, the judge, is trained on the training images for about a minute.
Features of grey images come from the judge, and features of colour images from TAEF2's latents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import MEAN, STD, fit, new_network, normalised
from _quality import (
    coverage,
    feature_fid,
    features_and_logits,
    label_reliability,
    memorisation_ratio,
    nearest,
)
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from glem_augment import GLEM, GLEMError, open_data
from glem_augment.evaluation import Section, compose, spread
from glem_augment.images import match_classes

NETWORK, STEPS, BATCH = "test_byobnet", 1500, 64  # the judge: a small network of timm, and its training
NEIGHBOURS, FITTED = 5, 500  # of coverage and density; real images to which `latent_features` are fitted
WEAK, WEAK_OF_FEW = 0.6, 0.8  # accuracies below which a judge is weak, or below twice the accuracy of guessing
COMPONENTS, LONGEST = 32, 64  # of `latent_features`
PAIRS, ACROSS = 32, 4  # pairs in a section of the picture, and in one of its rows


def some(place: str, split: str, count: int, like: Any = None) -> tuple[Tensor, Tensor, list[str]]:
    """At most `count` images of a folder, evenly spread, with the labels and in the size of `like`, and classes."""
    shape = (None, None) if like is None else (like[0].shape[2:], like[0].shape[1])
    data = open_data(place, split, *shape)
    rows = spread(len(data), min(count, len(data)))
    x, y = data.subset(rows).tensor(), torch.as_tensor(data.targets)[rows]
    if like is not None:
        y = torch.as_tensor(match_classes(like[2], data))[y]
    return x, y, list(data.classes)


def trained_judge(x: Tensor, y: Tensor, classes: int, steps: int) -> nn.Module:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(0)
        while True:
            rows = torch.randint(len(x), (BATCH,), generator=g)
            yield normalised(x[rows]), y[rows]

    return fit(new_network(NETWORK, x.shape[1], classes), batches(), steps)


@torch.no_grad()
def latent_features(real: Tensor, *sets: Tensor) -> list[Tensor]:
    """Features [M, m] of sets of colour images, from latents of TAEF2 at up to 64 pixels.

    The features are the means of a latent's channels and its first principal components among the `real` images, uint8
    [N,3,H,W]. Each has variance 1 over the real images.
    """
    shrink = min(1.0, LONGEST / max(real.shape[2:]))
    size = [8 * max(1, round(side * shrink / 8)) for side in real.shape[2:]]
    model = GLEM.create("identity", (3, *size), ["image"], autoencoder="taef2")

    def encoded(images: Tensor) -> Tensor:
        return torch.cat([model.encode(resize(part, size))[0] for part in images.split(32)])

    def features(z: Tensor) -> Tensor:
        return torch.cat([z.unflatten(1, (-1, size[0] * size[1] // 64)).mean(2), (z - centre) @ components], 1)

    z = encoded(real)
    centre, count = z.mean(0), min(COMPONENTS, len(real) // 4)  # later components overfit the real images
    components = torch.linalg.svd(z - centre, full_matrices=False).Vh[:count].T
    scale = features(z).std(0).clamp_min(1e-3)
    return [features(encoded(images)) / scale for images in sets]


def quality(made: Any, real: Any, held_out: Any, judge: nn.Module) -> dict[str, Any]:
    """The numbers; docs/synthetic.md explains them. The sets are images uint8, labels and names of classes."""
    (x, reference), colour = (made[0], held_out[0]), made[0].shape[1] == 3
    (features, logits), (others, judged) = (features_and_logits(judge, images, MEAN, STD) for images in (x, reference))
    accuracy = label_reliability(judged, held_out[1])
    source = f"the judge, right about {100 * accuracy:.0f} % of the held-out images"
    if colour:
        fitted = real[0][spread(len(real[0]), min(FITTED, len(real[0])))]
        (features, others), source = latent_features(fitted, x, reference), "the latents of TAEF2"
    weak = accuracy < max(WEAK, min(2 / len(made[2]), WEAK_OF_FEW))
    figures = "label_reliability says" if colour else "label_reliability, fid, coverage and density say"
    flat = [images.flatten(1).float() / 255 for images in (x, real[0], reference)]
    return {
        "images": {"synthetic": len(x), "real": len(real[0]), "held_out": len(reference)},
        "features": source,
        "fid": feature_fid(others, features),
        **coverage(others, features, NEIGHBOURS),
        "label_reliability": label_reliability(logits, made[1]),
        "judge_accuracy": accuracy,
        "warning": f"The judge is weak, so {figures} little." if weak else None,
        "memorisation": memorisation_ratio(*flat),
    }


def picture(made: Tensor, real: Tensor) -> Any:
    """Synthetic images, each beside the nearest real image by pixels: the nearest pairs, and pairs of the whole set."""
    distance, twin = nearest(*(images.flatten(1).float() / 255 for images in (made, real)))
    count = min(PAIRS, len(made) // ACROSS * ACROSS)
    found = {"The nearest pairs": distance.argsort()[:count], "Pairs of the whole set": spread(len(made), count)}
    pairs = {title: torch.stack([made[rows], real[twin[rows]]], 1).flatten(0, 1) for title, rows in found.items()}
    names = ["made", "real"] * ACROSS
    sections = [Section(title, cells.unflatten(0, (-1, 2 * ACROSS)), names) for title, cells in pairs.items()]
    return compose(f"Synthetic images, and the nearest of {len(real)} real ones by pixels", sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic", help="the folder of an export")
    parser.add_argument("real", help="the images of the model's training, with folders of the same names")
    parser.add_argument("held_out", help="real images outside the model's training")
    parser.add_argument("--out", type=Path, help="folder for report.json and report.png")
    parser.add_argument("--max-images", type=int, default=5000, help="of each set (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the judge's training (%(default)s)")
    args = parser.parse_args()
    made = some(args.synthetic, "train", args.max_images)
    if made[0].dtype != torch.uint8:
        raise SystemExit(f"{args.synthetic} has images of {made[0].dtype}: a report needs 8-bit images")
    real = some(args.real, "train", args.max_images, made)
    held_out = some(args.held_out, "test", args.max_images, made)
    numbers = quality(made, real, held_out, trained_judge(*real[:2], len(made[2]), args.steps))
    print(text := json.dumps(numbers, indent=2))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.json").write_text(text, encoding="utf-8")
        picture(made[0], real[0]).save(args.out / "report.png")


if __name__ == "__main__":
    try:
        main()
    except GLEMError as error:
        raise SystemExit(str(error)) from None
