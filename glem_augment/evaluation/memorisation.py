"""Does the flow repeat its training images?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from glem_augment.errors import DataError
from glem_augment.evaluation.coverage import nearest_distances
from glem_augment.model.glem import GLEM


def memorisation_ratio(samples: Tensor, train: Tensor, held_out: Tensor, seed: int = 0) -> dict[str, float]:
    """How much nearer samples lie to training images than to held-out ones.

    For each sample, the distance to the nearest of as many training as held-out images (the larger set is thinned to
    the smaller one, seeded, since more images are nearer by themselves). Nothing memorised: a ratio of 1 and a share
    of 1/2.

    Args:
        samples, train, held_out: features (or flattened pixels) [S, m], [N, m], [M, m].

    Returns:
        ``ratio``: median over samples of d(train) / d(held-out); ``share_nearer_train``: share of samples nearer to a
        training image (a tie counts half); ``images``: of each set.
    """
    count = min(len(train), len(held_out))
    if not count:
        raise DataError("train and held_out must hold images")
    g = torch.Generator().manual_seed(seed)
    train = train[torch.randperm(len(train), generator=g)[:count]]
    held_out = held_out[torch.randperm(len(held_out), generator=g)[:count]]
    a, b = nearest_distances(samples, train), nearest_distances(samples, held_out)
    tiny = torch.finfo(torch.float64).tiny
    tie = (a - b).abs() <= 1e-9 * torch.maximum(a, b)  # equal up to the order in which sums were rounded
    return {
        "ratio": statistics.median((a.clamp_min(tiny) / b.clamp_min(tiny)).tolist()),
        "share_nearer_train": float(((a < b) & ~tie).double().mean() + 0.5 * tie.double().mean()),
        "images": count,
    }


@torch.no_grad()
def mean_bits(model: GLEM, batches: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> float:
    """Mean -log2 p(x|y) per dimension, with seeded dequantisation noise."""
    g = torch.Generator().manual_seed(seed)
    total, images = 0.0, 0
    for x, y in batches:
        total -= float(model.log_prob(x, y, g).double().sum())
        images += len(y)
    if not images:
        raise DataError("no images to measure bits/dim on")
    return total / (images * model.dim * math.log(2))


def likelihood_gap(
    model: GLEM,
    train: Iterable[tuple[Tensor, Tensor]],
    held_out: Iterable[tuple[Tensor, Tensor]],
    seed: int = 0,
) -> dict[str, float]:
    """bits/dim of training and held-out images (batches of uint8 images and labels) and their difference, ``gap``.

    A flow that memorises codes its training images in fewer bits: gap = held-out - train > 0.
    """
    a, b = mean_bits(model, train, seed), mean_bits(model, held_out, seed)
    return {"train_bits_per_dim": a, "held_out_bits_per_dim": b, "gap": b - a}
