"""The quality report of a synthetic set: `report.json`, `report.png`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from glem_augment.distributed import progress_bar
from glem_augment.errors import DataError
from glem_augment.evaluation.classifier import MEAN, NETWORK, STD, random_batches, train_network
from glem_augment.evaluation.features import AUTOENCODER, COMPONENTS, features_and_logits, latent_features
from glem_augment.evaluation.metrics import spread
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.evaluation.quality import coverage, feature_fid, label_reliability, memorisation_ratio, nearest
from glem_augment.images.dataset import ImageData, LabelledImages, images_for, open_data
from glem_augment.images.matching import ClassMap
from glem_augment.images.sources import open_source
from glem_augment.io import expand, save_png, write_json

__all__ = ["quality_report"]

JUDGE_STEPS = 1500  # of the training of the default judge
NEIGHBOURS = 5
# A judge is weak below this accuracy on held-out images, or below twice the accuracy of guessing.
WEAK, WEAK_OF_FEW = 0.6, 0.8
FITTED = 500  # real images to which `latent_features` are fitted
_PAIRS, _ACROSS = 32, 4  # pairs in a section of the picture, and in one of its rows


def quality_report(
    synthetic: LabelledImages,
    real: LabelledImages,
    held_out: LabelledImages | None = None,
    out: str | os.PathLike[str] | None = None,
    network: Any = None,
    mean: Tensor | float = MEAN,
    std: Tensor | float = STD,
    max_images: int = 5000,
    class_map: ClassMap = None,
) -> dict[str, Any]:
    """Compare a synthetic set with its real images: are they alike, are the labels right, are they copies?

    Args:
        synthetic: a `SyntheticDataset`, or any argument of `open_data`, such as the folder of an export.
        real: the model's training images, with class names (of a name the training split); resized like `synthetic`.
        held_out: real images outside the model's training, such as a test split. Without them every fifth image of
            `real` is held out from the judge. The model was trained on these images, so memorisation is left out.
        out: a folder for report.json and report.png, which shows synthetic images beside the nearest images of `real`:
            the nearest pairs of all, and pairs evenly spread over the synthetic images.
        network, mean, std: the judge, a timm classifier of the classes of `synthetic`, see `features_and_logits`; it
            gives the features too. None: a small network is trained on `real`, which takes about a minute on a CPU,
            and the features of colour images are `latent_features`.
        max_images: of each of the three sets, evenly spread.
        class_map: how classes of `real` and `held_out` map to the classes of `synthetic`, see `match_classes`.

    Returns:
        JSON-able:

        - `images`: counts of the three sets; `features`, `judge`: sources of features and predicted classes.
        - `fid`, `coverage`, `density`: against the held-out images (5 neighbours).
        - `label_reliability`: share of synthetic images that the judge assigns to their class; `judge_accuracy`: the
          same share of real held-out images, the most to expect; `warning`: a sentence on a weak judge, or None.
        - `memorisation`: see `memorisation_ratio`, by distances of pixels, since the judge was trained on some of the
          images. None without `held_out`.

    Raises:
        DataError: fewer than six images in a set. ClassMismatchError: classes of `real` that `synthetic` does not name.
    """
    made = _some(synthetic, max_images)
    made.pixel_range.need_8_bits("a quality report")
    trained = images_for(made, _some(real, max_images, made.image_shape), class_map)
    if held_out is None:
        fifth = np.arange(len(trained)) % 5 == 4
        trained, unseen = (trained.subset(np.flatnonzero(rows)) for rows in (~fifth, fifth))
    else:
        some = _some(held_out, max_images, made.image_shape, "test")
        unseen = images_for(made, some, class_map)
    counts = {"synthetic": len(made), "real": len(trained), "held_out": len(unseen)}
    if min(counts.values()) <= NEIGHBOURS:
        raise DataError(f"there are too few images, {counts}: at least {NEIGHBOURS + 1} of each are needed")
    judge, in_latents = "the classifier that was given", network is None and made.image_shape[0] == 3
    if network is None:
        bar = progress_bar("classifier", random_batches(trained), JUDGE_STEPS, "step")
        network = train_network(bar, JUDGE_STEPS, made.image_shape[0], len(made.classes))
        judge = f"timm's {NETWORK}, trained on {len(trained)} of the real images for {JUDGE_STEPS} steps"
    sets = progress_bar("classes", (made, unseen), unit="set")
    (x, logits), (reference, judged) = (features_and_logits(network, data.tensor(), mean, std) for data in sets)
    reliable = label_reliability(logits, torch.from_numpy(made.targets))
    accuracy = label_reliability(judged, torch.from_numpy(unseen.targets))
    features = f"{judge}, right about {100 * accuracy:.0f} % of the real held-out images"
    if in_latents:
        x, reference = latent_features(trained.some(FITTED), made.tensor(), unseen.tensor())
        features = f"the latents of {AUTOENCODER}: means and {COMPONENTS} principal components"
    pixels, seen, others = (data.tensor().flatten(1).float() / 255 for data in (made, trained, unseen))
    warning = _warning(accuracy, len(made.classes), in_latents)
    numbers = {
        "images": counts,
        "features": features,
        "judge": judge,
        "fid": feature_fid(reference, x),
        **coverage(reference, x, NEIGHBOURS),
        "label_reliability": reliable,
        "judge_accuracy": accuracy,
        "warning": warning,
        "memorisation": None if held_out is None else memorisation_ratio(pixels, seen, others),
    }
    if out is not None:
        folder = expand(out)
        folder.mkdir(parents=True, exist_ok=True)
        text = f"the judge gives {reliable:.2f} of the synthetic images their class"
        note = warning or f"{text}, and {accuracy:.2f} of the real held-out images"
        save_png(_nearest_pairs(made, trained, *nearest(pixels, seen), note), folder / "report.png")
        write_json(folder / "report.json", numbers)
    return numbers


def _warning(accuracy: float, classes: int, in_latents: bool) -> str | None:
    """A sentence if the judge is weak."""
    if accuracy >= max(WEAK, min(2 / classes, WEAK_OF_FEW)):
        return None
    figures = "label_reliability says" if in_latents else "label_reliability, fid, coverage and density say"
    right = f"it is right about {100 * accuracy:.0f} % of the real held-out images"
    return f"The judge is weak: {right}, so {figures} little; give a better network."


def _nearest_pairs(made: ImageData, real: ImageData, distance: Tensor, twin: Tensor, judged: str) -> Image.Image:
    """Pictures of synthetic images, each beside the nearest real image, with a line on the judge."""
    sections: list[Section] = []
    count = min(_PAIRS, len(made) // _ACROSS * _ACROSS)
    for title, rows in (
        ("The nearest pairs", distance.argsort()[:count]),
        ("Pairs evenly spread over the synthetic images", torch.from_numpy(spread(len(made), count))),
    ):
        pairs = torch.stack([made.tensor()[rows], real.tensor()[twin[rows]]], 1).flatten(0, 1)
        cells = pairs.unflatten(0, (-1, 2 * _ACROSS))
        sections.append(Section(title, cells, ["made", "real"] * _ACROSS, note="" if sections else judged))
    note = f"{len(made)} synthetic images, each beside the nearest of {len(real)} real ones, by pixels"
    return compose("Synthetic images beside real ones", note, sections)


def _some(
    data: LabelledImages, count: int, shape: tuple[int, int, int] | None = None, split: str = "train"
) -> ImageData:
    """At most `count` images, evenly spread, resized to `shape` if given. Only these images are decoded."""
    data = data if isinstance(data, ImageData) else open_source(data, split)
    rows = spread(len(data), min(count, len(data)))
    if isinstance(data, ImageData):
        return data.subset(rows)
    channels, size = (None, None) if shape is None else (shape[0], shape[1:])
    return open_data(Subset(data, rows.tolist()), split, size, channels)
