"""Principal modes of every class's latents, and moves along them (principal-mode mixup, RFCM).

A class of n images in d dimensions has a covariance of rank n - 1 at most, and n < d as a rule. No d x d matrix is
needed: a class is its mean, its k strongest modes with their standard deviations, and a variance per dimension for
what the modes leave over,

    Cov_y  =  V_y^T diag(s_y^2) V_y + diag(rest_y),        V_y [k, d] with orthonormal rows.

Source: Enescu & Sahbi, ACCV 2024, "Reestimated Full Covariance Matrix" (RFCM, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glem_augment import distributed
from glem_augment.checks import DEFAULT_MODES, check_whole
from glem_augment.errors import DataError
from glem_augment.flows.precision import full_precision
from glem_augment.latent.gaussians import ClassSampler

# The least variance of a dimension outside the modes. It keeps densities finite, and its root is far below one uint8
# step (4e-3), so nobody can see it in a decoded image.
REST_FLOOR = 1e-8
# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
# Up to this size an eigendecomposition takes seconds; above it, randomised subspace iteration finds the leading modes.
MAX_EIGH = 4096
# How far a class's full covariance is shrunk to the pooled one: the best of 0, 0.2, 0.5, 0.8 and 1 for held-out images.
SHRUNK = 0.2
IMAGES_PER_MODE = 8  # of a pooled covariance that whitens
# When every row of a batch brings its own [k, d] modes, this many floats are gathered at a time (16 MiB).
GATHER_FLOATS = 2**22


# ---- moves along the modes -------------------------------------------------------------------------------------------


def combine_modes(coefficients: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """sum_m c_m v_m [n, d] for coefficients c [n, k] and the modes v_m of each row's class; see `project_on_modes`."""
    return _per_row(torch.matmul, coefficients, y, directions)


def project_on_modes(delta: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """P delta = V^T V delta, the part of delta [n, d] that lies along the modes V of each row's class.

    Args:
        delta: [n, d].
        y: int64 [n], the class of each row.
        directions: [K, k, d] with orthonormal rows V.

    Returns:
        [n, d]. Row i does not depend on the other rows, to the last bit.
    """
    return _per_row(lambda rows, modes: (rows @ modes.mT) @ modes, delta, y, directions)


def _per_row(function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Apply `function` to rows [m, 1, *] and their own modes [m, k, d]: one product per row, a few rows at a time."""
    step = max(1, GATHER_FLOATS // directions[0].numel())
    pairs = zip(rows.split(step), y.split(step), strict=True)
    with full_precision(rows.device.type):
        return torch.cat([function(r[:, None], directions[c])[:, 0] for r, c in pairs])


def mix_along_modes(z: Tensor, partner: Tensor, l: Tensor, y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Principal-mode mixup z' = z + (1 - l) P (partner - z), with the projection P of `project_on_modes`.

    Args:
        z, partner: [n, d].
        l: [n], the share of z that is kept along the modes.
        y, directions: see `project_on_modes`.

    Returns:
        z' [n, d], and the share [n] of |partner - z|^2 that P keeps (0 for no difference).
    """
    delta = partner - z
    projected = project_on_modes(delta, y, directions)
    total = delta.square().sum(dim=1)
    share = projected.square().sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return z + (1.0 - l)[:, None] * projected, share.clamp(max=1.0)


# ---- modes and samples of all classes --------------------------------------------------------------------------------


class ClassModes(ClassSampler):
    """Mean, principal modes and remaining variance of every class's latents. All are float32 buffers; none is trained.

    Buffers:
        mean: [K, d].
        directions: [K, k, d], orthonormal rows; zero rows where a class has fewer than k modes.
        scales: [K, k], the standard deviation along each mode, descending.
        rest: [K, d], the variance per dimension outside the modes.
        counts: int64 [K], images seen.
        shared_directions, shared_scales: [k, d] and [k], the modes of the pooled within-class covariance.

    >>> latents = torch.randn(2, 10, 6)
    >>> modes = fit_class_modes(lambda y: latents[y], num_classes=2, rank=3, dim=6)
    >>> modes.directions.shape, modes.sample(torch.tensor([0, 1, 1])).shape
    (torch.Size([2, 3, 6]), torch.Size([3, 6]))
    """

    mean: Tensor
    directions: Tensor
    scales: Tensor
    rest: Tensor
    counts: Tensor
    shared_directions: Tensor
    shared_scales: Tensor

    def __init__(self, num_classes: int, rank: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("directions", torch.zeros(num_classes, rank, dim))
        self.register_buffer("scales", torch.zeros(num_classes, rank))
        self.register_buffer("rest", torch.zeros(num_classes, dim))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("shared_directions", torch.zeros(rank, dim))
        self.register_buffer("shared_scales", torch.zeros(rank))

    @property
    def num_classes(self) -> int:
        """K."""
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        """k, the modes stored per class."""
        return self.directions.shape[1]

    @property
    def dim(self) -> int:
        """d."""
        return self.directions.shape[2]

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """The smallest and the largest number of modes (of any length) that a class has."""
        present = (self.scales > 0).sum(1)
        return int(present.min()), int(present.max())

    def in_words(self, most: int) -> str:
        """How many of the top `most` modes the classes have: "64", or "19 to 64"."""
        return " to ".join(dict.fromkeys(str(min(count, most)) for count in self.fewest_and_most))

    def variance(self) -> Tensor:
        """The variance of every dimension, along the modes and outside them: [K, d]."""
        return (self.scales[..., None] * self.directions).square().sum(1) + self.rest

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; m_y, V_y^T diag(s_y^2) V_y) of latents z [B, d] under every class: [B, K] nats.

        For modes that span the whole space, as `fit_covariances` makes them: k = d, and nothing is left over.
        """
        with full_precision(z.device.type):
            facts = zip(self.mean, self.directions, self.scales, strict=True)
            scores = [-0.5 * (((z - m) @ v.T) / s).square().sum(1) - s.log().sum() for m, v, s in facts]
        return torch.stack(scores, 1) - 0.5 * self.dim * math.log(2 * math.pi)

    @property
    def noise_size(self) -> int:
        """k + d."""
        return self.rank + self.dim

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Samples [B, d] of the classes y, int64 [B]: mean + T (sum_m s_m e_m v_m + sqrt(rest) e').

        `noise` [B, k + d] is standard normal: first the k coefficients e, then the d numbers e'.
        """
        along, outside = noise.split([self.rank, self.dim], 1)
        spread = combine_modes(along * self.scales[y], y, self.directions) + outside * self.rest[y].sqrt()
        return self.mean[y] + temperature * spread


# ---- estimation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_class_modes(
    latents_of_class: Callable[[int], Tensor], num_classes: int, rank: int, dim: int, borrow: bool = False
) -> ClassModes:
    """Estimate means, principal modes and remaining variances, one class in memory at a time.

    Covariances are unbiased (n - 1) and computed in float64. A class keeps min(rank, n - 1, d) modes, fewer where its
    latents span fewer directions. All ranks call this together; each decomposes some of the classes.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. K - 1; called once for each.
        num_classes: K.
        rank: modes to keep per class; more than d become d.
        dim: d.
        borrow: give a class of one image the modes and the remaining variance that all classes have together.

    Returns:
        ClassModes on the CPU.

    Raises:
        DataError: a class has fewer than two images (no image, with `borrow`), no class has two, or latents are not
            finite.
        ValueError: the rank is below 1.
    """
    rank = min(check_whole("rank", rank, 1), dim)
    modes, pool = ClassModes(num_classes, rank, dim), _Pool(dim, rank)
    for first in range(0, num_classes, distributed.world_size()):
        group = range(num_classes)[first : first + distributed.world_size()]
        own: Any = None
        for y in group:
            latents = latents_of_class(y)
            if y - first == distributed.rank():
                mean, rows = centred(latents, f"class {y}", least=1 if borrow else 2)
                own = mean, len(rows), *leading_modes(rows, pool.handed), rows.square().sum(0)
        for y, found in zip(group, distributed.gather(own), strict=False):
            mean, count, directions, values, variance = found
            modes.mean[y], modes.counts[y] = mean, count
            if count == 1:
                continue
            _store(modes, y, directions, values / math.sqrt(count - 1), variance / (count - 1))
            pool.add(count, directions, values, variance)
    directions, values, variance = pool.covariance()
    modes.shared_directions[: len(values)] = directions.float()
    modes.shared_scales[: len(values)] = values.float()
    for y in (modes.counts == 1).nonzero()[:, 0].tolist():
        _store(modes, y, directions, values, variance)
    return modes


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
            raise DataError("no class has two images, so nothing is known of how images of one class differ: add some")
        directions, values = leading_modes(self.rows, self.rank)
        return directions, values / math.sqrt(self.freedom), self.scatter / self.freedom


@torch.no_grad()
def pooled_covariance(
    rows_of_class: Callable[[int], Tensor], num_classes: int, rank: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `flows.layers.Whiten.fit` takes: the classes' mean, and their pooled covariance as modes and a rest.

    Args:
        rows_of_class: gives numbers [n, d] of class y = 0 .. K - 1, n >= 2; called once for each.
        num_classes, dim: K and d. rank: modes to keep, at most d, and at most one for every `IMAGES_PER_MODE` images:
            the weakest directions of a few images are noise, and dividing by their spread would blow other images up.

    Returns:
        mean [d], directions [k, d], standard deviations [k] and the remaining variance [d]; float64 on the CPU.
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


@torch.no_grad()
def fit_covariances(latents_of_class: Callable[[int], Tensor], num_classes: int, dim: int) -> ClassModes:
    """Means and full covariances of classes with many images: modes that span the whole space.

    The unbiased covariance S_y of a class is shrunk to the pooled one W, as `(1 - a) S_y + a W` with a = `SHRUNK`
    (regularised discriminant analysis, Friedman 1989).

    Args:
        latents_of_class, num_classes, dim: see `fit_class_modes`.

    Raises:
        DataError: too few images for W to have full rank, or latents that are not finite.
    """
    modes = ClassModes(num_classes, dim, dim)
    scatter = torch.zeros(num_classes, dim, dim, dtype=torch.float64)
    for y in range(num_classes):
        mean, rows = centred(latents_of_class(y), f"class {y}")
        modes.mean[y], modes.counts[y], scatter[y] = mean, len(rows), rows.T @ rows
    freedom = modes.counts.double() - 1
    if freedom.sum() < 2 * dim:
        raise DataError(
            f"full covariances of {dim} dimensions need at least {2 * dim + num_classes} images, there are "
            f"{int(modes.counts.sum())}: give a number of modes as rank, such as {DEFAULT_MODES}"
        )
    pooled = scatter.sum(0) / freedom.sum()
    for y in range(num_classes + 1):
        own = pooled if y == num_classes else (1 - SHRUNK) * scatter[y] / freedom[y] + SHRUNK * pooled
        values, vectors = torch.linalg.eigh(own)
        scales, directions = values.flip(0).clamp_min(REST_FLOOR).sqrt().float(), vectors.flip(1).T.float()
        if y == num_classes:
            modes.shared_scales[:], modes.shared_directions[:] = scales, directions
        else:
            modes.scales[y], modes.directions[y] = scales, directions
    return modes


def _store(modes: ClassModes, y: int, directions: Tensor, scales: Tensor, variance: Tensor) -> None:
    """Write the strongest modes of class y, and what they leave of its variance [d]."""
    directions, scales = directions[: modes.rank], scales[: modes.rank]
    modes.directions[y, : len(scales)] = directions.float()
    modes.scales[y, : len(scales)] = scales.float()
    explained = (scales[:, None] * directions).square().sum(0)
    modes.rest[y] = (variance - explained).clamp_min(REST_FLOOR).float()


def centred(latents: Tensor, name: str, least: int = 2) -> tuple[Tensor, Tensor]:
    """The mean [d] of a class's latents [n, d] and their deviations from it [n, d], float64 on the CPU.

    Raises:
        DataError: fewer than `least` latents, or latents that are not finite; the error has the class's `name`.
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
    """The leading right singular vectors and values of rows [n, d] float64.

    Values that are numerically zero are left out. The sign of a vector is fixed (its largest entry is positive), so
    that fits can be compared.

    Returns:
        Directions [r, d], orthonormal rows, and singular values [r], descending; r <= min(rank, n, d).
    """
    rows = rows[rows.abs().amax(1) > 0]
    values, directions = _decomposed(rows, min(rank, *rows.shape))
    real = values > math.sqrt(RELATIVE_TOLERANCE) * values[:1]
    values, directions = values[real], directions[real]
    # Vectors from a Gram matrix are orthogonal only up to rounding relative to the largest singular value, so weak ones
    # lean on strong ones. A QR decomposition (Gram-Schmidt in the order of strength) removes that.
    directions = torch.linalg.qr(directions.T).Q.T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), values


def _decomposed(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values [rank] and right singular vectors [rank, d], not quite orthonormal, by the cheapest way."""
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
