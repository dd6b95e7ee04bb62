"""Estimation of the modes of `classes.modes` from latents, one class in memory at a time; k-means within a class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glem_augment import distributed
from glem_augment.checks import check_whole
from glem_augment.classes.modes import ClassModes
from glem_augment.errors import DataError

# The least variance of a dimension outside the modes. It keeps densities finite. Its root is far below one uint8 step
# (4e-3), so it is invisible in a decoded image.
REST_FLOOR = 1e-8
# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
# Up to this size an eigendecomposition takes seconds; above it, randomised subspace iteration finds the leading modes.
MAX_EIGH = 4096
IMAGES_PER_MODE = 8  # of a pooled covariance that whitens
_ROUNDS = 30  # of k-means


@torch.no_grad()
def fit_class_modes(
    latents_of_class: Callable[[int], Tensor],
    num_classes: int,
    rank: int,
    dim: int,
    borrow: bool = False,
    parts: int = 1,
    full: bool = False,
) -> ClassModes:
    """Estimate means, principal modes and remaining variances, one class in memory at a time.

    Covariances are unbiased (n - 1) and computed in float64. A class keeps min(rank, n - 1, d) modes, fewer where its
    latents span fewer directions. All ranks call this together; each decomposes some of the classes.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. K - 1; called once for each.
        rank: modes to keep per class, or per part; more than d become d.
        borrow: give a class of one image the modes and the remaining variance that all classes have together.
        parts: P, into which k-means divides the images of a class.
        full: keep all modes of the pooled covariance, for `ClassModes.log_prob`.

    Returns:
        ClassModes on the CPU.

    Raises:
        DataError: a class has fewer than two images (no image, with `borrow`; 2 P, with parts), no class has two, or
            latents are not finite.
        ValueError: the rank is below 1.
    """
    rank, shared = min(check_whole("rank", rank, 1), dim), dim if full else None
    modes, pool = ClassModes(num_classes, rank, dim, parts, shared), _Pool(dim, shared or rank)
    for first in range(0, num_classes, distributed.world_size()):
        group = range(num_classes)[first : first + distributed.world_size()]
        own: Any = None
        for y in group:
            latents = latents_of_class(y)
            if y - first == distributed.rank():
                whole = _facts(latents, y, pool.handed, least=1 if borrow else 2)
                label = None if parts == 1 else k_means(latents.detach().cpu(), parts)
                own = [whole] if label is None else [_facts(latents[label == j], y, rank, 2) for j in label.unique()]
                own = whole[1:], own
        for y, (whole, found) in zip(group, distributed.gather(own), strict=False):
            for row, (mean, count, directions, values, variance) in enumerate(found, y * parts):
                modes.mean[row], modes.counts[row] = mean, count
                if count > 1:
                    _store(modes, row, directions, values / math.sqrt(count - 1), variance / (count - 1))
            if whole[0] > 1:
                pool.add(*whole)
    directions, values, variance = pool.covariance()
    modes.shared_directions[: len(values)] = directions.float()
    modes.shared_scales[: len(values)] = values.float()
    for row in (modes.counts == 1).nonzero()[:, 0].tolist():
        _store(modes, row, directions, values, variance)
    return modes


def _facts(latents: Tensor, y: int, rank: int, least: int) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
    """Mean, number, leading modes and summed squares [d] of latents of class y."""
    mean, rows = centred(latents, f"class {y}", least)
    return mean, len(rows), *leading_modes(rows, rank), rows.square().sum(0)


class _Pool:
    """The pooled within-class covariance, by its leading modes and its exact diagonal."""

    def __init__(self, dim: int, rank: int) -> None:
        # Classes hand on more modes than are kept, so that the top modes of the pooled covariance lose little.
        self.rank, self.handed = rank, min(dim, max(4 * rank, 128))
        self.rows = torch.zeros(0, dim, dtype=torch.float64)  # F with F^T F = the summed scatter, nearly
        self.scatter = torch.zeros(dim, dtype=torch.float64)  # the exact diagonal of that sum
        self.freedom = 0

    def add(self, count: int, directions: Tensor, values: Tensor, scatter: Tensor) -> None:
        """Add a class of `count` images: the leading modes of its centred latents, and their summed squares [d]."""
        self.rows = torch.cat([self.rows, values[:, None] * directions])
        self.scatter += scatter
        self.freedom += count - 1
        if len(self.rows) > 5 * self.handed:  # one decomposition for several classes
            directions, values = leading_modes(self.rows, self.handed)
            self.rows = values[:, None] * directions

    def covariance(self) -> tuple[Tensor, Tensor, Tensor]:
        """Directions [k, d], their standard deviations [k], and the variance of every dimension [d]; float64."""
        if not self.freedom:
            raise DataError("no class has two images, so the variation within a class is unknown: add images")
        directions, values = leading_modes(self.rows, self.rank)
        return directions, values / math.sqrt(self.freedom), self.scatter / self.freedom


@torch.no_grad()
def pooled_covariance(
    rows_of_class: Callable[[int], Tensor], num_classes: int, rank: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The classes' mean [d], and the modes [k, d], standard deviations [k] and rest [d] of their pooled covariance.

    `rows_of_class` gives numbers [n, d] of a class, n >= 2, once for each. The results are float64 on the CPU. There
    are at most `rank` modes, and one for every `IMAGES_PER_MODE` images: the weakest directions of a few images are
    noise, and `flows.linear.Whiten` would blow up other images by dividing by their spread.
    """
    mean, pool = torch.zeros(dim, dtype=torch.float64), _Pool(dim, rank)
    for y in range(num_classes):
        own, rows = centred(rows_of_class(y), f"class {y}")
        mean += own / num_classes
        pool.add(len(rows), *leading_modes(rows, pool.handed), rows.square().sum(0))
    directions, values, variance = pool.covariance()
    most = max(1, pool.freedom // IMAGES_PER_MODE)
    directions, values = directions[:most], values[:most]
    return mean, directions, values, (variance - (values[:, None] * directions).square().sum(0)).clamp_min(0)


def _store(modes: ClassModes, y: int, directions: Tensor, scales: Tensor, variance: Tensor) -> None:
    """Write the strongest modes of class y, and the part of its variance [d] outside them."""
    directions, scales = directions[: modes.rank], scales[: modes.rank]
    modes.directions[y, : len(scales)] = directions.float()
    modes.scales[y, : len(scales)] = scales.float()
    explained = (scales[:, None] * directions).square().sum(0)
    modes.rest[y] = (variance - explained).clamp_min(REST_FLOOR).float()


def centred(latents: Tensor, name: str, least: int = 2) -> tuple[Tensor, Tensor]:
    """The mean [d] of a class's latents [n, d] and their deviations from it [n, d], float64 on the CPU.

    DataError, with the class's `name`: fewer than `least` latents, or latents that are not finite.
    """
    if len(latents) < least:
        raise DataError(
            f"{name} has {len(latents)} images; its covariance needs at least {least}: add images or leave it out"
        )
    rows = latents.detach().cpu().double()
    mean = rows.mean(0)
    rows = rows - mean
    if not bool(rows.isfinite().all()):
        raise DataError(f"{name} has latents that are not finite: check the flow with model.check_invertibility")
    return mean, rows


def leading_modes(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors [r, d] and values [r], descending, of rows [n, d] float64.

    r <= min(rank, n, d): values that are numerically zero are left out. The largest entry of a vector is positive, so
    that fits can be compared.
    """
    rows = rows[rows.abs().amax(1) > 0]
    values, directions = _decomposed(rows, min(rank, *rows.shape))
    real = values > math.sqrt(RELATIVE_TOLERANCE) * values[:1]
    values, directions = values[real], directions[real]
    # Vectors from a Gram matrix are orthogonal up to rounding relative to the largest singular value. So weak vectors
    # are not quite orthogonal to strong ones. A QR decomposition (Gram-Schmidt in the order of strength) mends that.
    directions = torch.linalg.qr(directions.T).Q.T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), values


def _decomposed(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values [rank] and right singular vectors [rank, d], not quite orthonormal, by the fastest method."""
    n, dim = rows.shape
    if not n:
        return rows.new_zeros(0), rows
    if min(n, dim) > MAX_EIGH:
        with torch.random.fork_rng(devices=[]):  # a fit is repeatable
            torch.manual_seed(0)
            _, values, right = torch.svd_lowrank(rows, q=min(n, dim, 2 * rank + 16), niter=12)
        return values[:rank], right[:, :rank].T
    try:
        # The eigenvectors of the smaller of the two Gram matrices take a fraction of the time of an SVD.
        values, vectors = torch.linalg.eigh(rows @ rows.T if n <= dim else rows.T @ rows)
    except torch.linalg.LinAlgError:  # repeated eigenvalues can keep it from converging
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        return values[:rank], right[:rank]
    values = values.flip(0)[:rank].clamp_min(0).sqrt()
    vectors = vectors.flip(1)[:, :rank].T
    if n <= dim:
        vectors = vectors @ rows
    return values, vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)


@torch.no_grad()
def k_means(z: Tensor, groups: int, seed: int = 0) -> Tensor:
    """The group of each latent z [n, d], int64 [n], a function of z and the seed; no group has fewer than two.

    It starts as k-means++ does (Arthur & Vassilvitskii 2007). Groups that end with fewer than two latents are
    dissolved, so there may be fewer than `groups`. DataError: fewer than two latents for each group.
    """
    if len(z) < 2 * groups:
        raise DataError(
            f"{groups} parts need at least {2 * groups} images of each class, one has {len(z)}: lower parts"
        )
    generator, z = torch.Generator().manual_seed(seed), z.float()
    centres = z[torch.randint(len(z), (1,), generator=generator)]
    for _ in range(groups - 1):
        far = torch.cdist(z, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, z[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(_ROUNDS):
        group = torch.cdist(z, centres).argmin(1)
        count = torch.bincount(group, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, group, z)
        centres, before = sums[count > 1] / count[count > 1, None], centres
        if centres.shape == before.shape and torch.equal(centres, before):
            break
    return torch.cdist(z, centres).argmin(1)
