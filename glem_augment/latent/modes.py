"""Principal modes of every class's latents, and moves along them (principal-mode mixup, RFCM).

A class of n images in d dimensions has a covariance of rank n - 1 at most, and n < d as a rule. No d x d matrix is
needed: a class is its mean, its k strongest modes with their standard deviations, and a variance per dimension for
what the modes leave over,

    Cov_y  =  V_y^T diag(s_y^2) V_y + diag(rest_y),        V_y [k, d] with orthonormal rows.

A class may have several such parts, of groups of its images: a mixture of Gaussians.

Source: Enescu & Sahbi, ACCV 2024, "Reestimated Full Covariance Matrix" (RFCM, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glem_augment import distributed
from glem_augment.checks import check_whole
from glem_augment.devices import weights_key
from glem_augment.errors import DataError
from glem_augment.flows.precision import full_precision
from glem_augment.latent.gaussians import ClassSampler
from glem_augment.latent.groups import k_means

# The least variance of a dimension outside the modes. It keeps densities finite, and its root is far below one uint8
# step (4e-3), so nobody can see it in a decoded image.
REST_FLOOR = 1e-8
# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
# Up to this size an eigendecomposition takes seconds; above it, randomised subspace iteration finds the leading modes.
MAX_EIGH = 4096
# How far a class's covariance is shrunk to the pooled one: of 0, 0.2, 0.5, 0.8 and 1 the best for held-out images.
SHRUNK = 0.8
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

    Buffers, with P parts for each of K classes; row y P + j is part j of class y:
        mean: [K P, d].
        directions: [K P, k, d], orthonormal rows; zero rows where a part has fewer than k modes.
        scales: [K P, k], the standard deviation along each mode, descending.
        rest: [K P, d], the variance per dimension outside the modes.
        counts: int64 [K P], images seen; 0 for a part that is not there.
        shared_directions, shared_scales: [j, d] and [j], the modes of the pooled within-class covariance.

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

    def __init__(self, num_classes: int, rank: int, dim: int, parts: int = 1, shared_rank: int | None = None) -> None:
        super().__init__()
        rows, shared = num_classes * parts, shared_rank or rank
        self.register_buffer("mean", torch.zeros(rows, dim))
        self.register_buffer("directions", torch.zeros(rows, rank, dim))
        self.register_buffer("scales", torch.zeros(rows, rank))
        self.register_buffer("rest", torch.zeros(rows, dim))
        self.register_buffer("counts", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("shared_directions", torch.zeros(shared, dim))
        self.register_buffer("shared_scales", torch.zeros(shared))
        self.parts = parts
        self._classifier: tuple[object, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts) // self.parts

    @property
    def rank(self) -> int:
        """k, the modes stored per class, or per part of a class."""
        return self.directions.shape[1]

    @property
    def dim(self) -> int:
        """d."""
        return self.directions.shape[2]

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """The smallest and the largest number of modes (of any length) that a class has."""
        present = (self.scales > 0).sum(1)[self.counts > 0] if bool(self.counts.any()) else (self.scales > 0).sum(1)
        return int(present.min()), int(present.max())

    def in_words(self, most: int) -> str:
        """How many of the top `most` modes the classes have: "64", or "19 to 64"."""
        return " to ".join(dict.fromkeys(str(min(count, most)) for count in self.fewest_and_most))

    def variance(self) -> Tensor:
        """The variance of every dimension, along the modes and outside them: [K P, d]."""
        return (self.scales[..., None] * self.directions).square().sum(1) + self.rest

    def rows_of(self, y: Tensor, z: Tensor) -> Tensor:
        """The row of the part of class y, int64 [n], whose mean is nearest to z [n, d]: int64 [n]."""
        if self.parts == 1:
            return y
        of_class = self.mean.unflatten(0, (-1, self.parts))[y]
        far = (z[:, None] - of_class).square().sum(2)
        missing = (self.counts == 0).unflatten(0, (-1, self.parts))[y]
        return y * self.parts + far.masked_fill(missing, math.inf).argmin(1)

    # ---- classes as a whole ------------------------------------------------------------------------------------------

    def class_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance per dimension of each class, [K, d] float64, and its images, int64 [K]."""
        n, mean, variance = (t.unflatten(0, (-1, self.parts)) for t in (self.counts, self.mean, self.variance()))
        total, n, mean = n.sum(1), n[..., None].double(), mean.double()
        centre = (n * mean).sum(1) / total[:, None]
        scatter = (n - 1).clamp_min(0) * variance.double() + n * (mean - centre[:, None]).square()
        return centre, scatter.sum(1) / (total - 1).clamp_min(1)[:, None], total

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; m_y, C_y) of latents z [B, d] under every class, [B, K] nats: a regularised discriminant analysis.

        C_y = (1 - a) S_y + a W with the covariance S_y of the class (of its parts and between them), the pooled one W,
        whose modes must span the space, and a = `SHRUNK` (Friedman 1989).
        """
        means, whiteners, logdets = self._discriminant()
        with full_precision(z.device.type):
            q = [((z - m) @ w).square().sum(1) for m, w in zip(means, whiteners, strict=True)]
        return -0.5 * (torch.stack(q, 1) + logdets + self.dim * math.log(2 * math.pi))

    def log_determinants(self) -> Tensor:
        """log det C_y of the covariances in `log_prob`, [K]."""
        return self._discriminant()[2]

    @torch.no_grad()
    def _discriminant(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means [K, d], U_y [K, d, d] with U_y U_y^T = C_y^-1, and log det C_y [K]; kept while the modes stay."""
        key = weights_key(self)
        if self._classifier is None or self._classifier[0] != key:
            with torch.inference_mode(False):
                pooled = _outer(self.shared_scales, self.shared_directions)
                centres, _, totals = self.class_moments()
                whiteners, logdets = [], []
                for y, centre in enumerate(centres):
                    covariance = SHRUNK * pooled
                    for row in range(y * self.parts, (y + 1) * self.parts):
                        share = (1 - SHRUNK) * float(self.counts[row]) / float(totals[y])
                        away = self.mean[row].double() - centre
                        own = _outer(self.scales[row], self.directions[row]) + self.rest[row].double().diag()
                        covariance = covariance + share * (own + torch.outer(away, away))
                    factor = torch.linalg.cholesky(covariance)
                    logdets.append(2 * factor.diagonal().log().sum())
                    whiteners.append(torch.linalg.inv(factor).T)
                found = tuple(t.to(self.mean) for t in (centres, torch.stack(whiteners), torch.stack(logdets)))
            self._classifier = key, found  # type: ignore[assignment]
        return self._classifier[1]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_classifier": None}

    # ---- samples -----------------------------------------------------------------------------------------------------

    @property
    def noise_size(self) -> int:
        """k + d, and one more where classes have parts."""
        return self.rank + self.dim + (self.parts > 1)

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Samples [B, d] of the classes y, int64 [B]: mean + T (sum_m s_m e_m v_m + sqrt(rest) e').

        `noise` [B, noise_size] is standard normal: first the k coefficients e, then the d numbers e', then a number
        that chooses the part, each as often as it has images.
        """
        along, outside = noise[:, : self.rank], noise[:, self.rank : self.rank + self.dim]
        if self.parts > 1:
            upto = self.counts.unflatten(0, (-1, self.parts)).double().cumsum(1)
            share = torch.special.ndtr(noise[:, -1].double()) * upto[y, -1]
            y = y * self.parts + (share[:, None] >= upto[y]).sum(1).clamp_max(self.parts - 1)
        spread = combine_modes(along * self.scales[y], y, self.directions) + outside * self.rest[y].sqrt()
        return self.mean[y] + temperature * spread


def _outer(scales: Tensor, directions: Tensor) -> Tensor:
    """V^T diag(s^2) V [d, d] float64."""
    rows = scales[:, None].double() * directions.double()
    return rows.T @ rows


# ---- estimation ------------------------------------------------------------------------------------------------------


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
        num_classes: K.
        rank: modes to keep per class, or per part; more than d become d.
        dim: d.
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
