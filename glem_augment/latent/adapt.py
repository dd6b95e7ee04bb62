"""What a flow knows of classes, read off the latents of labelled images: modes, and Gaussians for new classes.

Nothing is trained here. One pass over the images gives, per class with n_y images, mean and sum of squares; with SS_y
the summed squared deviations from the class's own mean and v the pooled within-class variance, per dimension,

    v = sum_y SS_y / sum_y (n_y - 1),        sigma_y^2 = (SS_y + k v) / (n_y - 1 + k),

so a class of one image gets the pooled variance, and a class of many its own. k (``shrinkage``) counts as k more images
whose spread is v: it is the posterior mode of the variance under a conjugate prior at v, up to the constant in k.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glem_augment.checks import check_number, check_whole
from glem_augment.data.dataset import ImageData, open_data
from glem_augment.errors import DataError
from glem_augment.hub import files as hub
from glem_augment.io import expand
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.latent.modes import REST_FLOOR, ClassModes, fit_class_modes

if TYPE_CHECKING:
    from glem_augment.model.glem import GLEM

__all__ = ["adapt", "class_latents"]

_CHUNK = 256  # images per pass through the flow
# psi's three numbers must stay below 1e6 in config.json; latents near that have left what a flow can invert anyway.
_LARGEST_VARIANCE = 1e5
# The variances that psi represents well lie between these shares of its range; nearer to its ends s runs off.
_LOW_SHARE, _HIGH_SHARE = 0.01, 0.99


def class_latents(
    model: GLEM,
    data: ImageData,
    rows_of_class: Sequence[np.ndarray],
    seed: int,
    count: Callable[[int], object] = lambda images: None,
) -> Callable[[int], Tensor]:
    """A function from the class index y to the latents of the images ``rows_of_class[y]``, float32 [n, d] on the CPU.

    Every class has its own dequantisation noise, a function of ``seed`` and y alone. ``count`` is told how many images
    have been encoded.
    """

    def latents(index: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        parts = []
        for x, _ in data.batches(rows_of_class[index], _CHUNK):
            parts.append(model.encode(x, generator)[0].cpu())
            count(len(x))
        return torch.cat(parts) if parts else torch.empty(0, model.dim)

    return latents


@torch.no_grad()
def adapt(
    model: GLEM,
    data: ImageData | tuple[Tensor, Tensor] | str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    split: str = "train",
    rank: int = 64,
    shrinkage: float = 10.0,
    max_per_class: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GLEM:
    """See ``GLEM.adapt``."""
    shrinkage = check_number("shrinkage", shrinkage, 0.0, float("inf"))
    max_per_class = None if max_per_class is None else check_whole("max_per_class", max_per_class, 1)
    rank, seed = check_whole("rank", rank, 1), check_whole("seed", seed, 0)
    classes = None if classes is None else [str(name) for name in classes]
    images = _opened(model, data, classes, split, progress)
    rows = _rows_of_class(images, max_per_class)
    total = sum(len(r) for r in rows)
    with tqdm(total=total, unit="image", desc="adapt", disable=not progress, dynamic_ncols=True) as bar:
        statistics = _Statistics(class_latents(model, images, rows, seed, bar.update), len(rows), model.dim)
        modes = _modes(statistics, [len(r) for r in rows], rank)
    variance = statistics.variance(shrinkage)
    psi = psi_that_holds(variance, model.config.psi)
    config = replace(
        copy.deepcopy(model.config),
        psi=psi,
        class_ids=list(images.class_ids),
        class_names=list(images.classes),
        modes_rank=modes.rank,
        training={
            "data": images.name,
            "images": total,
            "images_per_class": [min(len(r) for r in rows), max(len(r) for r in rows)],
            "adapt": {"shrinkage": shrinkage, "rank": modes.rank, "max_per_class": max_per_class, "seed": seed},
            "adapted_from": {
                "weights_sha256": hashlib.sha256(hub.weights_bytes(model.state_dict())).hexdigest(),
                "origin": model.origin,
                "classes": model.num_classes,
                "psi": None if model.config.psi is None else list(model.config.psi),
                "training": copy.deepcopy(model.config.training),
            },
        },
    )
    like = model.gaussians.mu
    gaussians = gaussians_of(statistics.mean, variance, psi).to(like.device, like.dtype)
    result = type(model)(config, copy.deepcopy(model.flow), gaussians, modes.to(like.device))
    return result.eval().requires_grad_(False)


# ---- data ------------------------------------------------------------------------------------------------------------


def _opened(model: GLEM, data: Any, classes: Sequence[str] | None, split: str, progress: bool) -> ImageData:
    channels, height, width = model.image_shape
    if isinstance(data, str | os.PathLike):
        data = open_data(
            data,
            split,
            image_size=(height, width),
            channels=channels if channels in (1, 3) else None,
            progress=progress,
        )
    elif isinstance(data, tuple):
        x, y = data
        if classes is None:
            classes = [str(index) for index in range(int(torch.as_tensor(y).max()) + 1)] if len(y) else []
        data = ImageData.from_tensors(x, y, classes)
    elif not isinstance(data, ImageData):
        raise TypeError(f"data must be an ImageData, a folder, or (images, labels); got {type(data).__name__}")
    if classes is not None and list(classes) != data.classes:
        same = len(classes) == len(data.class_ids)
        data = data.with_targets(data.targets, classes, data.class_ids if same else None)
    if tuple(data.image_shape) != model.image_shape:
        have, want = data.image_shape, model.image_shape
        what = "grey images" if have[0] == 1 else f"images of {have[0]} channels"
        raise DataError(
            f"{data.name} holds {what} of {have[1]}x{have[2]}, the flow takes {want[0]} channel{'s' * (want[0] > 1)} "
            f"of {want[1]}x{want[2]}: open the data with open_data(..., image_size=({want[1]}, {want[2]}), "
            f"channels={want[0]}), or give its folder in place of the opened images"
        )
    return data


def _rows_of_class(data: ImageData, max_per_class: int | None) -> list[np.ndarray]:
    """Indices of each class's images, the first ``max_per_class`` of them.

    Raises:
        DataError: a class without images, or no class with two.
    """
    rows = [np.flatnonzero(data.targets == index)[:max_per_class] for index in range(len(data.classes))]
    empty = [data.classes[index] for index, found in enumerate(rows) if not len(found)]
    if empty:
        names = ", ".join(map(repr, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise DataError(
            f"{data.name} has no images of {len(empty)} of its {len(rows)} classes ({names}): add some, or name only "
            "the classes that it has (data.with_targets)"
        )
    if max_per_class == 1:
        raise ValueError("max_per_class=1 says nothing about how images of one class differ: give 2 or more")
    if max(len(found) for found in rows) < 2:
        raise DataError(
            f"{data.name} has one image per class, which says nothing about how images of one class differ: at least "
            "one class needs two"
        )
    return rows


# ---- statistics ------------------------------------------------------------------------------------------------------


class _Statistics:
    """Mean and summed squares of each class, taken in passing while ``latents_of_class`` is read once per class.

    Attributes:
        mean [K, d], squares [K, d], count [K], float64: n_y, mean, and sum of (z - mean)^2.
    """

    def __init__(self, latents_of_class: Callable[[int], Tensor], num_classes: int, dim: int) -> None:
        self._latents_of_class = latents_of_class
        self.mean = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.squares = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.count = torch.zeros(num_classes, dtype=torch.float64)

    def latents(self, index: int) -> Tensor:
        z = self._latents_of_class(index)
        wide = z.double()
        mean = wide.mean(0)
        if not bool(torch.isfinite(mean).all()):
            raise DataError(
                f"class {index} has latents that are not finite: check the flow with model.check_invertibility"
            )
        self.count[index] = len(z)
        self.mean[index] = mean
        self.squares[index] = (wide - mean).square_().sum(0)
        return z

    def pooled(self) -> Tensor:
        """Within-class variance over all classes, unbiased: [d]."""
        freedom = (self.count - 1).clamp_min(0).sum()
        return (self.squares.sum(0) / freedom).clamp_min(REST_FLOOR)

    def variance(self, shrinkage: float) -> Tensor:
        """sigma_y^2 [K, d], shrunk towards the pooled variance."""
        pooled = self.pooled()
        # Without shrinkage a class of one image would divide by zero; it has nothing but the pool in any case.
        weight = (self.count - 1 + shrinkage)[:, None]
        own = (self.squares + shrinkage * pooled) / weight.clamp_min(1e-12)
        return torch.where(weight > 0, own, pooled).clamp_min(REST_FLOOR)


def _modes(statistics: _Statistics, counts: Sequence[int], rank: int) -> ClassModes:
    """Modes of every class. One of a single image gets those of the pooled covariance, as its variances do."""
    several = [index for index, count in enumerate(counts) if count > 1]
    single = [index for index, count in enumerate(counts) if count == 1]
    dim = statistics.mean.shape[1]
    order: Iterator[int] = iter(several)
    fitted = fit_class_modes(lambda _: statistics.latents(next(order)), len(several), rank, dim)
    for index in single:
        statistics.latents(index)
    if not single:
        return fitted
    modes = ClassModes.empty(len(counts), fitted.rank, dim)
    for name, values in fitted.named_buffers():
        if name.startswith("shared"):
            getattr(modes, name).copy_(values)
        else:
            getattr(modes, name)[several] = values
    explained = (fitted.shared_scales[:, None] * fitted.shared_directions).square().sum(0)
    modes.mean[single] = statistics.mean[single].float()
    modes.directions[single] = fitted.shared_directions
    modes.scales[single] = fitted.shared_scales
    modes.rest[single] = (statistics.pooled().float() - explained).clamp_min(REST_FLOOR)
    modes.counts[single] = 1
    return modes


# ---- variances as the Gaussians store them ---------------------------------------------------------------------------


@torch.no_grad()
def psi_that_holds(variance: Tensor, psi: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    """``psi`` itself where its range holds all of ``variance`` [K, d]; else one, (a, b, c), that is wide enough.

    The flow was trained towards the range of its own psi, but images of another kind need not stay in it; cutting their
    variances off would change densities silently.

    Raises:
        DataError: variances beyond 1e5.
    """
    low, high = float(variance.min()), float(variance.max())
    if not high <= _LARGEST_VARIANCE:
        raise DataError(
            f"the latents of these images have variances up to {high:.3g}: they are off the scale of what the flow was "
            "trained on; check it with model.check_invertibility, or train it on them"
        )
    if psi is None:
        # Plain variances have a lower bound as well.
        plain = ClassGaussians(1, 1, psi=None)
        plain.s.fill_(low)
        if bool(plain.variance() == plain.s):
            return None
    if psi is not None:
        a, _, c = psi
        if c + _LOW_SHARE * a <= low and high <= c + _HIGH_SHARE * a:
            return psi
    return (2 * high, 0.2 if psi is None else psi[1], low / 2)


@torch.no_grad()
def gaussians_of(mean: Tensor, variance: Tensor, psi: tuple[float, float, float] | None) -> ClassGaussians:
    """Class Gaussians with these means and variances [K, d], all within psi's range: exact up to float32."""
    gaussians = ClassGaussians(*mean.shape, psi=psi)
    gaussians.mu.copy_(mean)
    if psi is None:
        gaussians.s.copy_(variance)
    else:
        a, b, c = psi
        gaussians.s.copy_(torch.logit((variance.double() - c) / a) / b)
    return gaussians


def check_out(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """``folder`` for a new model. Raises FileExistsError if one is there, unless ``overwrite``."""
    path = expand(folder)
    there = [name for name in (hub.WEIGHTS, hub.CONFIG) if (path / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{path} holds a model already ({', '.join(there)}): give another folder, or --overwrite")
    return path
