"""Measuring a GLEM on labelled images: accuracy, bits/dim, calibration, round trip."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.model.glem import GLEM

__all__ = ["evaluate", "spread"]


def spread(total: int, count: int) -> np.ndarray:
    """``count`` of ``total`` indices, evenly spread, so that every class of sorted data is among them: int64."""
    return (np.arange(count, dtype=np.int64) * total) // count


@torch.no_grad()
def evaluate(
    model: GLEM, data: ImageData, batch_size: int = 256, round_trip: int = 1000, progress: bool = True
) -> dict[str, Any]:
    """Measure ``model`` as a classifier and as a density on ``data``, whose targets are the flow's class indices.

    Two passes: predictions are deterministic (middle of the bin); likelihoods use dequantisation noise, seeded, so that
    the same command gives the same numbers.

    Args:
        round_trip: images for the round trip; these are encoded a third time, and decoded.

    Returns:
        What the help of ``glem eval`` lists; ``ece`` is None without torchmetrics.
    """
    if not len(data):
        raise DataError(f"{data.name} holds no images")
    calibration = _calibration(model.num_classes)
    generator = torch.Generator().manual_seed(0)
    top = min(5, model.num_classes)
    right = right_top = 0
    nll = nll_marginal = seconds = 0.0
    wanted = set(spread(len(data), min(round_trip, len(data))).tolist())
    trips: list[tuple[int, dict[str, float]]] = []
    position = 0
    bar = tqdm(total=len(data), unit="image", desc="eval", disable=not progress, dynamic_ncols=True)
    for x, y in data.batches(np.arange(len(data)), batch_size):
        x, y = x.to(model.device), y.to(model.device)
        began = time.perf_counter()
        scores = model.gaussians.log_prob(model.encode(x)[0])
        best = scores.topk(top, 1).indices
        right += int((best[:, 0] == y).sum())
        seconds += time.perf_counter() - began
        right_top += int((best == y[:, None]).any(1).sum())
        if calibration is not None:
            # Below 1, which torchmetrics gives a bin of its own, a 16th.
            calibration.update(torch.softmax(scores, 1).cpu().clamp(max=1 - 2**-24), y.cpu())
        own, marginal = _nll(model.log_prob_per_class(x, generator), y)
        nll, nll_marginal = nll + own, nll_marginal + marginal
        rows = [i for i in range(len(y)) if position + i in wanted]
        if rows:
            trips.append((len(rows), model.check_invertibility(x[rows])))
        position += len(y)
        bar.update(len(y))
    bar.close()
    per_image = len(data) * model.dim * math.log(2)
    return {
        "n": len(data),
        "accuracy": right / len(data),
        "top5": right_top / len(data),
        "bits_per_dim": nll / per_image,
        "bits_per_dim_marginal": nll_marginal / per_image,
        "bits": model.bits,
        "ece": None if calibration is None else float(calibration.compute()),
        "round_trip": _together(trips, model.dim),
        "images_per_second": len(data) / max(seconds, 1e-9),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def _nll(scores: Tensor, y: Tensor) -> tuple[float, float]:
    """Sums over the batch of -log p(x|y) and -log p(x), nats; ``scores`` [B,K] holds log p(x|class)."""
    scores = scores.double()
    marginal = torch.logsumexp(scores, 1) - math.log(scores.shape[1])
    return -float(scores.gather(1, y[:, None]).sum()), -float(marginal.sum())


def _calibration(num_classes: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassCalibrationError
    except ImportError:
        return None
    # torchmetrics knows no posterior over a single class; there the answer is always right.
    return MulticlassCalibrationError(num_classes, n_bins=15, norm="l1") if num_classes > 1 else None


def _together(trips: list[tuple[int, dict[str, float]]], dim: int) -> dict[str, float] | None:
    """The ``check_invertibility`` of all images from those of the batches."""
    if not trips:
        return None
    images = sum(n for n, _ in trips)
    finite_pixels = sum(n * dim * (1 - part["non_finite"]) for n, part in trips)
    error = sum(n * dim * (1 - part["non_finite"]) * part["mean_error"] for n, part in trips if part["non_finite"] < 1)
    return {
        "images": images,
        "max_error": max(part["max_error"] for _, part in trips),
        "mean_error": error / max(1.0, finite_pixels),
        "within_half_step": sum(n * part["within_half_step"] for n, part in trips) / images,
        "non_finite": sum(n * part["non_finite"] for n, part in trips) / images,
    }
