"""Measuring generated images: FID, coverage and density, label reliability, memorisation.

The measures take features [N, m] of the images. `features_and_logits` computes features by a classifier of the real
images (the paper's oracle, Sec. 5.1) or any timm network, `latent_features` by an autoencoder of photographs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from glem_augment.codec.published import open_autoencoder
from glem_augment.codec.resize import resized
from glem_augment.errors import DataError
from glem_augment.evaluation.metrics import spread
from glem_augment.evaluation.preview import Section, compose
from glem_augment.images.dataset import ImageData, LabelledImages, images_for, open_data
from glem_augment.images.matching import ClassMap
from glem_augment.images.sources import open_source
from glem_augment.io import expand, save_png, write_json
from glem_augment.tensors import evaluating

__all__ = ["coverage", "feature_fid", "features_and_logits", "label_reliability", "latent_features"]
__all__ += ["memorisation_ratio", "nearest", "quality_report", "random_batches", "train_network"]

# Rows of a distance matrix that are computed at a time; the least spread of a feature.
_CHUNK, _MIN_STD = 512, 1e-3
# A timm network of 0.2 million weights, which learns from 1000 images in seconds on a CPU. A held-out quarter of the
# demo's training images, without augmentation, chose network and learning rate.
NETWORK, LEARNING_RATE = "test_byobnet", 1e-2
ORACLE_STEPS, ORACLE_BATCH, ORACLE_MEAN, ORACLE_STD = 1500, 64, 0.5, 0.25
NEIGHBOURS = 5
# A judge is weak below this accuracy on held-out images, or below twice the accuracy of guessing.
WEAK, WEAK_OF_FEW = 0.6, 0.8
AUTOENCODER, COMPONENTS, LONGEST, FITTED = "taef2", 32, 64, 500  # of `latent_features`
_PAIRS, _ACROSS = 32, 4  # pairs in a section of the picture, and in one of its rows


def quality_report(
    synthetic: LabelledImages,
    real: LabelledImages,
    held_out: LabelledImages | None = None,
    out: str | os.PathLike[str] | None = None,
    network: Any = None,
    mean: Tensor | float = ORACLE_MEAN,
    std: Tensor | float = ORACLE_STD,
    max_images: int = 5000,
    progress: bool = True,
    class_map: ClassMap = None,
) -> dict[str, Any]:
    """Compare a synthetic set with its real images: are they alike, are the labels right, are they copies?

    Args:
        synthetic: a `SyntheticDataset`, or any argument of `open_data`, such as the folder of an export.
        real: the flow's training images, with class names (of a name the training split); resized like `synthetic`.
        held_out: real images outside the flow's training, such as a test split. Without them every fifth image of
            `real` is held out from the judge. The flow was trained on these images, so memorisation is left out.
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
    made = _some(synthetic, max_images, progress)
    trained = images_for(made, _some(real, max_images, progress, made.image_shape), class_map)
    if held_out is None:
        fifth = np.arange(len(trained)) % 5 == 4
        trained, unseen = (trained.subset(np.flatnonzero(rows)) for rows in (~fifth, fifth))
    else:
        some = _some(held_out, max_images, progress, made.image_shape, "test")
        unseen = images_for(made, some, class_map)
    counts = {"synthetic": len(made), "real": len(trained), "held_out": len(unseen)}
    if min(counts.values()) <= NEIGHBOURS:
        raise DataError(f"there are too few images, {counts}: at least {NEIGHBOURS + 1} of each are needed")
    judge, in_latents = "the classifier that was given", network is None and made.image_shape[0] == 3
    if network is None:
        bar = tqdm(random_batches(trained), total=ORACLE_STEPS, desc="classifier", delay=2, disable=not progress)
        network = train_network(bar, ORACLE_STEPS, made.image_shape[0], len(made.classes))
        judge = f"timm's {NETWORK}, trained on {len(trained)} of the real images for {ORACLE_STEPS} steps"
    sets = tqdm((made, unseen), desc="classes", delay=2, disable=not progress)
    (x, logits), (reference, judged) = (features_and_logits(network, data.tensor(), mean, std) for data in sets)
    reliable = label_reliability(logits, torch.from_numpy(made.targets))
    accuracy = label_reliability(judged, torch.from_numpy(unseen.targets))
    features = f"{judge}, right about {100 * accuracy:.0f} % of the real held-out images"
    if in_latents:
        x, reference = latent_features(trained.some(FITTED), made.tensor(), unseen.tensor(), progress=progress)
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
        "memorisation": None if held_out is None else memorisation_ratio(pixels, seen, others, progress=progress),
    }
    if out is not None:
        folder = expand(out)
        folder.mkdir(parents=True, exist_ok=True)
        text = f"the judge gives {reliable:.2f} of the synthetic images their class"
        note = warning or f"{text}, and {accuracy:.2f} of the real held-out images"
        save_png(_nearest_pairs(made, trained, *nearest(pixels, seen, progress), note), folder / "report.png")
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
    data: LabelledImages,
    count: int,
    progress: bool,
    shape: tuple[int, int, int] | None = None,
    split: str = "train",
) -> ImageData:
    """At most `count` images, evenly spread, resized to `shape` if given. Only these images are decoded."""
    data = data if isinstance(data, ImageData) else open_source(data, split)
    rows = spread(len(data), min(count, len(data)))
    if isinstance(data, ImageData):
        return data.subset(rows)
    channels, size = (None, None) if shape is None else (shape[0], shape[1:])
    return open_data(Subset(data, rows.tolist()), split, size, channels, progress=progress)


def normalised(x: Tensor) -> Tensor:
    """Images uint8, normalised for the networks of this module: float."""
    return (x.float() / 255 - ORACLE_MEAN) / ORACLE_STD


def random_batches(data: ImageData, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random images, normalised, and labels, without end."""
    rng = np.random.default_rng(seed)
    while True:
        for x, y in data.batches(rng.permutation(len(data)), min(ORACLE_BATCH, len(data))):
            if len(y) > 1:
                yield normalised(x), y


def train_network(
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    channels: int,
    num_classes: int,
    seed: int = 0,
    name: str = NETWORK,
    rate: float = LEARNING_RATE,
    pretrained: bool = False,
) -> torch.nn.Module:
    """A timm classifier trained on `steps` batches of normalised images float [B,C,H,W] and labels, hard or soft.

    AdamW with a cosine schedule, after a warm-up over a tenth of the steps. Returned in eval mode, on the CPU.

    Args:
        name: of the network in timm. rate: the highest learning rate. pretrained: start from timm's weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(name, pretrained, num_classes=num_classes, in_chans=channels).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    optimizer = create_optimizer_v2(network, opt="adamw", lr=rate, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=rate / 100, t_in_epochs=False
    )
    for (x, y), step in zip(batches, range(1, steps + 1), strict=False):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step_update(step)
    return network.eval()


@torch.no_grad()
def features_and_logits(
    network: Any, x: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Penultimate features and logits of a timm network, in eval mode.

    Args:
        x: images [N,C,H,W] of the network's size, uint8 or float in [0, 1].
        mean, std: normalise the network's input, broadcast to [B,C,H,W].

    Returns:
        features [N, m] and logits [N, K], on the CPU.
    """
    device = next(network.parameters()).device
    features, logits = [], []
    with evaluating(network):
        for part in x.split(batch_size):
            part = part.to(device)
            part = part.float() / 255 if part.dtype == torch.uint8 else part
            pooled = network.forward_head(network.forward_features((part - mean) / std), pre_logits=True)
            features.append(pooled.cpu())
            logits.append(network.get_classifier()(pooled).cpu())
    return torch.cat(features), torch.cat(logits)


@torch.no_grad()
def latent_features(real: Tensor, *sets: Tensor, progress: bool = False) -> list[Tensor]:
    """Features of colour images from the latents of TAEF2, an autoencoder of photographs that ships with the package.

    Latents have mean 0 and variance 1 per channel over the real images. Features are a latent's means over positions
    and its first 32 principal components (fewer for under 128 real images), each with variance 1 over the real images.
    Images are reduced to 64 pixels.

    Args:
        real: images uint8 [N,3,H,W] for statistics and components. sets: images of the same size.

    Returns:
        Features float32 [M, m] of each set.
    """
    module: Any = open_autoencoder(AUTOENCODER, fetch=lambda name: (Path(name), name))[0]  # it ships with the package
    shrink = min(1.0, LONGEST / max(real.shape[2:]))
    size = [8 * max(1, round(side * shrink / 8)) for side in real.shape[2:]]

    def encoded(images: Tensor) -> Tensor:
        bar = tqdm(images.split(32), desc="features", delay=2, disable=not progress)
        return torch.cat([module.encode(resized(part.float() / 255, size)) for part in bar])

    def features(h: Tensor) -> Tensor:
        h = (h - mean) / std
        return torch.cat([h.mean((2, 3)), (h.flatten(1) - centre) @ components], 1)

    h = encoded(real)
    mean, std = h.mean((0, 2, 3), keepdim=True), h.std((0, 2, 3), keepdim=True).clamp_min(_MIN_STD)
    flat = ((h - mean) / std).flatten(1)
    centre, count = flat.mean(0), min(COMPONENTS, len(real) // 4)  # later components overfit the real images
    components = torch.linalg.svd(flat - centre, full_matrices=False).Vh[:count].T
    scale = features(h).std(0).clamp_min(_MIN_STD)
    return [features(encoded(images)) / scale for images in sets]


def label_reliability(logits: Tensor, y: Tensor) -> float:
    """Share of generated images that a classifier of real images, with logits [N, K], assigns to their class y [N]."""
    return float((logits.argmax(1) == y.to(logits.device)).double().mean())


def feature_fid(real: Tensor, generated: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

        |m_r - m_g|^2 + tr(S_r + S_g) - 2 tr (S_r S_g)^1/2

    With S_r = R R^T, the symmetric matrix R^T S_g R has the eigenvalues of S_r S_g. The last trace is the sum of their
    square roots. The distance depends on the network and falls with the number of images, so state both.

    Args:
        real, generated: features [N, m] and [M, m]; N, M >= 2.

    Raises:
        ValueError: other shapes. DataError: too few rows, or values that are not finite.
    """
    real, generated = _check_features(real, generated, least=2)
    covariance, other = torch.cov(real.T).view(real.shape[1], -1), torch.cov(generated.T).view(real.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ other @ root).clamp_min(0).sqrt().sum()
    gap = (real.mean(0) - generated.mean(0)).square().sum()
    return float(gap + covariance.trace() + other.trace() - 2 * cross)


def coverage(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Coverage and density (Naeem et al., ICML 2020, Eq. 3 and 4; the same numbers as the `prdc` package).

        coverage = mean_i [min_j |r_i - g_j| < NND_k(r_i)]
        density  = 1/(k M) sum_ij [|r_i - g_j| < NND_k(r_i)]

    NND_k(r) is the distance of r to its k-th nearest other real image. Both depend on N, M and k, so state them.

    Args:
        real, generated: features [N, m] and [M, m]. k: neighbours, 1 <= k < N.

    Returns:
        `coverage` in [0, 1] and `density` >= 0.

    Raises:
        ValueError: other shapes. DataError: too few rows, or values that are not finite.
    """
    real, generated = _check_features(real, generated, least=k + 1)
    covered = inside = 0
    for part in real.split(_CHUNK):
        # The smallest distance in a row is that of the image to itself, 0.
        radius = _squared_distances(part, real).kthvalue(k + 1, dim=1, keepdim=True).values
        near = _squared_distances(part, generated) < radius
        covered += int(near.any(1).sum())
        inside += int(near.sum())
    return {"coverage": covered / len(real), "density": inside / (k * len(generated))}


def memorisation_ratio(
    samples: Tensor, train: Tensor, held_out: Tensor, seed: int = 0, progress: bool = False
) -> dict[str, float]:
    """How much nearer samples lie to training images than to held-out images.

    The larger real set is thinned to the size of the smaller set: the nearest of more images is nearer. Without
    memorisation the ratio is 1 and the share 1/2.

    Args:
        samples, train, held_out: features (or flattened pixels) [S, m], [N, m] and [M, m].

    Returns:
        `ratio`: median over samples of d(train) / d(held-out), each the distance to the nearest image.
        `share_nearer_train`: share of samples that are nearer to a training image; a tie counts half.
    """
    count = min(len(train), len(held_out))
    g = torch.Generator().manual_seed(seed)
    to_train = nearest(samples, train[torch.randperm(len(train), generator=g)[:count]], progress)[0]
    to_held_out = nearest(samples, held_out[torch.randperm(len(held_out), generator=g)[:count]], progress)[0]
    tiny = torch.finfo(torch.float64).tiny
    tie = torch.isclose(to_train, to_held_out, rtol=1e-9, atol=0)
    nearer = torch.where(tie, 0.5, (to_train < to_held_out).double())
    return {
        "ratio": float((to_train.clamp_min(tiny) / to_held_out.clamp_min(tiny)).quantile(0.5)),
        "share_nearer_train": float(nearer.mean()),
    }


def nearest(x: Tensor, others: Tensor, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Distance of every row of `x` [N, m] to the nearest row of `others` [M, m], float64 [N], and its index [N]."""
    x, others = _check_features(x, others)
    bar = tqdm(x.split(_CHUNK), desc="nearest images", delay=2, disable=not progress)
    found = [_squared_distances(part, others).min(1) for part in bar]
    return torch.cat([part.values for part in found]).sqrt(), torch.cat([part.indices for part in found])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances [N, M] of float64 rows, by one matrix product."""
    size = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(size, a, b.T, alpha=-2)
    # Equal rows have distance 0. Rounding leaves less than 1e-13 of |a|^2 + |b|^2.
    return squared.masked_fill_(squared < 1e-13 * size, 0.0)


def _check_features(first: Tensor, second: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets, float64 on the CPU, with at least `least` rows each.

    The mean of the first set becomes the origin: no measure depends on it, and sums of squares keep more digits.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features must be [N, m] and [M, m], got {list(first.shape)} and {list(second.shape)}: "
            "take both from one network"
        )
    pair = first.detach().to("cpu", torch.float64), second.detach().to("cpu", torch.float64)
    for features in pair:
        if len(features) < least:
            raise DataError(f"{len(features)} images are too few: at least {least} are needed")
        if not bool(features.isfinite().all()):
            raise DataError("features are not finite: check the images and the network")
    centre = pair[0].mean(0)
    return pair[0] - centre, pair[1] - centre
