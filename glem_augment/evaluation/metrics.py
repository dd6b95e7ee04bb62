"""Measurements of a GLEM on labelled images: accuracy, bits/dim, calibration, round trip."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glem_augment.classes.fit import fit_temperature
from glem_augment.distributed import Share, add_up, progress_bar
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData, LabelledImages, images_for
from glem_augment.model.glem import GLEM

__all__ = ["calibrate", "calibration_error", "evaluate", "spread"]

CALIBRATION_BINS = 15


def spread(total: int, count: int) -> np.ndarray:
    """`count` evenly spread indices out of `total`, so that all classes of sorted data are among them: int64."""
    return (np.arange(count, dtype=np.int64) * total) // count


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017) over 15 bins of equal width, in [0, 1].

    ECE = sum over bins of |number of right answers - sum of confidences| / N.

    Args:
        confidence: [N], the probability given to the predicted class.
        right: [N], whether that class is the true class.
    """
    bins = (confidence.double() * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, bins, right.double() - confidence.double())
    return float(gap.abs().sum()) / len(confidence)


@torch.no_grad()
def calibrate(model: GLEM, data: LabelledImages) -> float:
    """Fit the temperature of the model's posterior to images that it was not trained on, see `fit_temperature`.

    The trainer calls this. Accuracy and densities stay as they are; `model.save` keeps the result.

    Args:
        data: see `GLEM.fit_modes`; some hundred images, but none of the test images.

    Returns:
        T >= 1, which `model.latent_classes.temperature` holds from now on.
    """
    model.refuse_if_private("calibrate")
    images = images_for(model, data)
    scores, labels = [], []
    with progress_bar("calibrate", total=len(images)) as bar:
        for x, y in images.batches(np.arange(len(images)), 256):
            scores.append(model.latent_classes.log_prob(model.encode_batch(images, x)[0]).cpu())
            labels.append(y)
            bar.update(len(y))
    model.latent_classes.temperature = fit_temperature(torch.cat(scores), torch.cat(labels))
    return model.latent_classes.temperature


@torch.no_grad()
def evaluate(model: GLEM, data: ImageData, batch_size: int = 256, round_trip: int = 1000) -> dict[str, Any]:
    """Measure `model` as a classifier and as a density on `data`, whose targets are the model's class indices.

    Predictions use the middle of the bin. The dequantisation noise of likelihoods depends on each image alone.

    Args:
        round_trip: how many images to encode and decode for the round trip; 0 for none.

    Returns:
        The numbers that the help of `glem eval` explains.

    Raises:
        DataError: `data` holds no images.
    """
    if not len(data):
        raise DataError(f"{data.name} holds no images")

    found = []
    with progress_bar("eval", total=len(data)) as bar:
        for x, y in data.batches(np.arange(len(data)), batch_size):
            x, y = x.to(model.device), y.to(model.device)
            z, logdet = model.encode(x)
            scores = model.latent_classes.log_prob(z)
            best = (scores / model.latent_classes.temperature).log_softmax(1).topk(min(5, model.num_classes), 1)
            hits = best.indices == y[:, None]
            # Of levels, likelihoods have dequantisation noise.
            density = model.log_prob_per_class(x) if model.codec.levels else scores + logdet[:, None]
            density = density.double()
            own, any_class = density.gather(1, y[:, None])[:, 0], density.logsumexp(1) - math.log(model.num_classes)
            found.append(torch.stack([best.values[:, 0].exp(), hits[:, 0], hits.any(1), own, any_class], 1).cpu())
            bar.update(len(y))
    confidence, right, right_top, own, any_class = torch.cat(found).unbind(1)
    invertibility = None
    if count := min(round_trip, len(data)):
        x = data.subset(spread(len(data), count)).tensor()
        invertibility = {"images": count, **model.check_invertibility(x)}
    key, _, unit = model.likelihood
    return {
        "n": len(data),
        "accuracy": float(right.mean()),
        "top5": float(right_top.mean()),
        key: -float(own.mean()) / unit,
        f"{key}_marginal": -float(any_class.mean()) / unit,
        "bits": model.bits,
        "ece": calibration_error(confidence, right),
        "round_trip": invertibility,
    }


@torch.no_grad()
def held_out(model: GLEM, data: ImageData, batches: Iterable[tuple[Tensor, Tensor, Share]]) -> dict[str, float]:
    """Number of images, NF accuracy unless there is one class, and the likelihood given the class.

    The numbers are over the images of all ranks. `batches` of `data` come from `ImageData.shared_batches`.
    """
    sums, (key, _, unit) = torch.zeros(3, dtype=torch.float64), model.likelihood
    for x, y, _ in batches:
        z, logdet = model.encode_batch(data, x, 0)
        scores = model.latent_classes.log_prob(z) + logdet[:, None]
        nll = float(-scores.gather(1, y[:, None]).double().sum()) / unit
        sums += torch.tensor([len(y), int((scores.argmax(1) == y).sum()), nll], dtype=torch.float64)
    add_up(sums)
    images, right, nll = sums.tolist()
    accuracy = {"val_accuracy": right / images} if model.num_classes > 1 else {}
    return {"val_images": int(images), **accuracy, f"val_{key}": nll / images}
