"""Measurements of a model in training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.distributed import Share, add_up
from glem_augment.model.glem import GLEM


@torch.no_grad()
def held_out(model: GLEM, batches: Iterable[tuple[Tensor, Tensor, Share]]) -> dict[str, float]:
    """Number of images, NF accuracy unless there is one class, and the likelihood given the class.

    The numbers are over the images of all ranks. `batches` come from `ImageData.shared_batches`.
    """
    sums, (key, _, unit) = torch.zeros(3, dtype=torch.float64), model.likelihood
    for x, y, _ in batches:
        scores = model.log_prob_per_class(x)
        nll = float(-scores.gather(1, y[:, None]).double().sum()) / unit
        sums += torch.tensor([len(y), int((scores.argmax(1) == y).sum()), nll], dtype=torch.float64)
    add_up(sums)
    images, right, nll = sums.tolist()
    accuracy = {"val_accuracy": right / images} if model.num_classes > 1 else {}
    return {"val_images": int(images), **accuracy, f"val_{key}": nll / images}


@torch.no_grad()
def gaussian_state(gaussians: ClassGaussians) -> dict[str, float]:
    """max |mu|, smallest and mean pairwise KLD in nats, and the part of saturated variances."""
    k = gaussians.num_classes
    kld = gaussians.kld_matrix()
    pairs = kld[~torch.eye(k, dtype=torch.bool, device=kld.device)] if k > 1 else kld.flatten()
    return {
        "mu_max": float(gaussians.mu.abs().max()),
        "kld_min": float(pairs.min()),
        "kld_mean": float(pairs.mean()),
        "saturated_variances": float(gaussians.saturated_share()),
    }
