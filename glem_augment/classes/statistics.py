"""Statistics of classes: counts, means and scatter of their latents, made in one pass.

The latents z of a class of n images have the mean m and the scatter S = sum (z - m)(z - m)^T. Gaussians, modes, pooled
covariance, shrinkage and discriminant are fitted to these alone (`classes.fit`). S is stored as its eigenvectors V and
the roots l of its eigenvalues, S = V^T diag(l^2) V, and its diagonal. In up to `WHOLE_DIM` dimensions V is whole.
Above, V has the strongest rows only, and the diagonal is exact.

A few latents are kept to fit the temperature of the posterior (`classes.fit`). They may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glem_augment.classes.groups import k_means
from glem_augment.errors import DataError

# Scatter is whole up to these limits: dimensions, and numbers in all.
WHOLE_DIM, _MOST_WHOLE = 1024, 2**26
KEPT = 2000  # at most about so many latents are kept
IMAGES_PER_MODE = 8  # of a pooled covariance that whitens
# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
_COLUMNS = 512  # of float64 numbers that are squared at a time
# Up to this size an eigendecomposition takes seconds; above it, randomised subspace iteration finds the leading modes.
MAX_EIGH = 4096


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of n latents; float64 on the CPU.

    count: n. mean: [d]. directions: [r, d], orthonormal rows V. values: [r], descending, the roots l. squares: [d], the
    diagonal of S.
    """

    count: int
    mean: Tensor
    directions: Tensor
    values: Tensor
    squares: Tensor

    @classmethod
    def of(cls, latents: Tensor, name: object, most: int, pool: _Pool | None = None) -> Moments:
        """Moments of latents [n, d], with at most `most` directions. Their scatter is added to `pool`.

        DataError, with the class's `name`: no latents, or latents that are not finite.
        """
        if not len(latents):
            raise DataError(f"class {name} has no images: add images or leave it out")
        latents = latents.detach().cpu()
        mean = torch.cat([part.double().mean(0) for part in latents.split(_COLUMNS, 1)])
        squares = torch.cat([part.square().sum(0) for part in _deviations(latents, mean)])
        if not bool(squares.isfinite().all()):
            raise DataError(
                f"class {name} has latents that are not finite: check the flow with model.check_invertibility"
            )
        rows = leading_rows(latents, most if pool is None else pool.handed, mean)
        found = cls(len(latents), mean, *orthonormal(rows[:most]), squares)
        if pool is not None:
            pool.add(found, rows)
        return found

    @classmethod
    def of_covariance(cls, count: int, mean: Tensor, covariance: Tensor) -> Moments:
        """Moments of `count` latents with this mean [d] and covariance [d, d], which is made positive."""
        values, vectors = torch.linalg.eigh(covariance.double())
        values = (values.flip(0).clamp_min(0) * max(1, count - 1)).sqrt()
        directions = vectors.flip(1).T
        return cls(count, mean.double(), directions, values, (values[:, None] * directions).square().sum(0))

    def scatter(self) -> Tensor:
        """S [d, d] along the stored directions."""
        rows = self.values[:, None] * self.directions
        return rows.T @ rows

    def without(self, latents: Tensor) -> Moments:
        """Moments of the other latents, without some latents [j, d] that were counted; j < n. S must be whole."""
        z, n, j = latents.double(), self.count, len(latents)
        if not j:
            return self
        away = z - self.mean
        mean = self.mean - away.sum(0) / (n - j)
        shift = (mean - self.mean)[:, None]
        scatter = self.scatter() - away.T @ away - (n - j) * shift @ shift.T
        return Moments.of_covariance(n - j, mean, scatter / max(1, n - j - 1))


@dataclass
class ClassStatistics:
    """Moments of K classes of latents in d dimensions.

    Attributes:
        classes: of each class as a whole.
        parts: of the groups of each class; one group, the class itself, without parts.
        pooled: the scatter of all classes about their means; `count` is its degrees of freedom, and the mean is the
            classes' mean.
        kept: a few latents [m, d] of all classes in order, evenly spread over the images of each; float32.
        kept_counts: how many of each class; empty for none.
        most_parts: P, the largest number of groups of a class.
        whole: whether the directions span all of the scatter.
    """

    classes: list[Moments]
    parts: list[list[Moments]]
    pooled: Moments
    whole: bool
    most_parts: int = 1
    kept: Tensor = field(default_factory=lambda: torch.empty(0))
    kept_counts: list[int] = field(default_factory=list)

    @property
    def dim(self) -> int:
        """d."""
        return len(self.pooled.mean)

    def counts(self) -> Tensor:
        """Images of each class, int64 [K]."""
        return torch.tensor([each.count for each in self.classes])

    def without(self, latents: list[Tensor]) -> ClassStatistics:
        """The statistics without some latents [j, d] of each class that were counted; S must be whole."""
        pairs = list(zip(self.classes, latents, strict=True))
        classes = [each.without(z) for each, z in pairs]
        parts = [[each] for each in classes]
        if self.most_parts > 1:
            parts = [_parts_without(*pair) for pair in zip(self.parts, latents, strict=True)]
        pool = _Pool(self.dim, self.dim)
        for each in classes:
            pool.add(each, each.values[:, None] * each.directions)
        return ClassStatistics(classes, parts, pool.moments(), True, self.most_parts)

    def as_one_class(self) -> ClassStatistics:
        """One class in place of all, which varies as the images of a class do: the pooled scatter."""
        images = int(self.counts().sum())
        # A class of n images has n - 1 degrees of freedom.
        scale = math.sqrt((images - 1) / self.pooled.count)
        one = replace(
            self.pooled, count=images, values=self.pooled.values * scale, squares=self.pooled.squares * scale**2
        )
        return ClassStatistics([one], [[one]], replace(one, count=images - 1), self.whole)


def _parts_without(parts: list[Moments], latents: Tensor) -> list[Moments]:
    """`ClassStatistics.without` for the parts of a class: k-means put a latent into the part with the nearest mean."""
    near = torch.cdist(latents.double(), torch.stack([part.mean for part in parts])).argmin(1)
    # Means moved a little after the last assignment, so a part may lose latents that it did not count: two stay.
    return [part.without(latents[near == j][: max(0, part.count - 2)]) for j, part in enumerate(parts)]


@torch.no_grad()
def class_statistics(
    latents_of_class: Callable[[int], Tensor], names: Sequence[object], dim: int, rank: int, parts: int = 1
) -> ClassStatistics:
    """Statistics of the classes that errors call `names`, with one class in memory at a time.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. K - 1; called once for each.
        rank: how many modes of a class will be used; with scatter that is not whole, no more are stored.
        parts: P, into which k-means divides the images of a class.

    Raises:
        DataError: a class without images (fewer than 2 P, with parts), no class with two, or latents not finite.
    """
    whole = can_be_whole(len(names), dim)
    pool, found, groups = _Pool(dim, dim if whole else rank), [], []
    most = max(1, KEPT // len(names))
    kept, kept_counts = torch.empty(len(names) * most, dim), list[int]()
    for y, name in enumerate(names):
        z = latents_of_class(y)
        chosen, start = _spread(len(z), most), sum(kept_counts)
        kept[start : start + len(chosen)] = z[chosen]
        kept_counts.append(len(chosen))
        each = Moments.of(z, name, pool.rank, pool)
        found.append(each if whole else replace(each, directions=each.directions.float()))
        groups.append(found[-1:])
        if parts > 1:
            group = k_means(z, parts)
            groups[-1] = [Moments.of(z[group == j], name, pool.rank) for j in group.unique()]
        del z, each  # they would stay during the next class
    return ClassStatistics(found, groups, pool.moments(), whole, parts, kept[: sum(kept_counts)], kept_counts)


def can_be_whole(num_classes: int, dim: int) -> bool:
    """Whether the whole scatter of so many classes fits in memory and in a file."""
    return dim <= WHOLE_DIM and num_classes * dim * dim <= _MOST_WHOLE


def _spread(count: int, most: int) -> Tensor:
    """At most `most` of `count` indices, evenly spread; none of a single one, which can't be missed."""
    chosen = min(count, most) if count > 1 else 0
    return torch.arange(chosen) * count // max(1, chosen)


class _Pool:
    """Adds up the scatter of classes."""

    def __init__(self, dim: int, rank: int) -> None:
        # Classes hand on more modes than are stored, so that the top modes of the pooled covariance lose little.
        self.rank, self.handed = rank, min(dim, max(4 * rank, 128))
        # Where modes are left out anyway, float32 takes half the memory.
        dtype = torch.float64 if self.handed == dim else torch.float32
        self.factor = torch.empty(6 * self.handed, dim, dtype=dtype)
        self.used = 0  # rows F of `factor` with F^T F = the summed scatter, nearly
        self.squares, self.means = torch.zeros(2, dim, dtype=torch.float64)
        self.freedom = self.classes = 0

    def add(self, each: Moments, rows: Tensor) -> None:
        """Add a class with its `leading_rows`."""
        if each.count < 2:
            return
        self._append(rows)
        self.squares += each.squares
        self.means += each.mean
        self.freedom += each.count - 1
        self.classes += 1
        if self.used > 5 * self.handed:  # one decomposition for several classes
            rows, self.used = leading_rows(self.factor[: self.used], self.handed), 0
            self._append(rows)

    def _append(self, rows: Tensor) -> None:
        self.factor[self.used : self.used + len(rows)] = rows
        self.used += len(rows)

    def moments(self) -> Moments:
        """The pooled scatter. DataError: no class has two images."""
        if not self.freedom:
            raise DataError("no class has two images, so the variation within a class is unknown: add images")
        found = orthonormal(leading_rows(self.factor[: self.used], self.rank))
        return Moments(self.freedom, self.means / self.classes, *found, self.squares)


@torch.no_grad()
def pooled_covariance(
    rows_of_class: Callable[[int], Tensor], names: Sequence[object], rank: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The classes' mean [d], and the modes [k, d], standard deviations [k] and rest [d] of their pooled covariance.

    `rows_of_class` gives numbers [n, d] of a class, n >= 2, once for each. The results are float64 on the CPU. There
    are at most `rank` modes, and one for every `IMAGES_PER_MODE` images: the weakest directions of a few images are
    noise, and `flows.linear.Whiten` would blow up other images by dividing by their spread.
    """
    pool = _Pool(dim, rank)
    for y, name in enumerate(names):
        Moments.of(rows_of_class(y), name, rank, pool)
    found, most = pool.moments(), min(rank, max(1, pool.freedom // IMAGES_PER_MODE))
    directions, values = found.directions[:most], found.values[:most] / math.sqrt(found.count)
    rest = found.squares / found.count - (values[:, None] * directions).square().sum(0)
    return found.mean, directions, values, rest.clamp_min(0)


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The directions [r, d] and the lengths [r], descending, of `leading_rows`.

    Values that are numerically zero are left out. The largest entry of a direction is positive, so that fits can be
    compared.
    """
    values = rows.norm(dim=1)
    real = int((values > math.sqrt(RELATIVE_TOLERANCE) * values[:1]).sum())
    # Rows from a Gram matrix are orthogonal up to rounding relative to the largest. So weak rows are not quite
    # orthogonal to strong ones. A QR decomposition (Gram-Schmidt in the order of strength) mends that.
    directions = torch.linalg.qr(rows[:real].T).Q.T
    positive = directions.amax(1, keepdim=True) >= -directions.amin(1, keepdim=True)
    return directions.mul_(torch.where(positive, 1, -1)), values[:real]


def leading_rows(rows: Tensor, rank: int, mean: Tensor | None = None) -> Tensor:
    """Rows F [min(rank, n, d), d] with F^T F the strongest part of the scatter of rows [n, d] about `mean`; float64.

    They are the leading right singular vectors times their values, not quite orthogonal, by the fastest method.
    """
    n, dim = rows.shape
    rank = min(rank, n, dim)
    mean = torch.zeros(dim, dtype=torch.float64) if mean is None else mean
    if min(n, dim) > MAX_EIGH:
        with torch.random.fork_rng(devices=[]):  # a fit is repeatable
            torch.manual_seed(0)
            _, values, right = torch.svd_lowrank(rows - mean, q=min(n, dim, 2 * rank + 16), niter=12)
        return (right * values).T[:rank]
    # The eigenvectors of the smaller of the two Gram matrices take a fraction of the time of an SVD.
    gram = torch.zeros(min(n, dim), min(n, dim), dtype=torch.float64)
    for part in [(rows - mean).T] if n > dim else _deviations(rows, mean):
        gram.addmm_(part, part.T)
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # repeated eigenvalues can keep it from converging
        _, values, right = torch.linalg.svd(rows - mean, full_matrices=False)
        return values[:rank, None] * right[:rank]
    vectors = vectors.flip(1)[:, :rank].T
    if n > dim:
        return values.flip(0)[:rank, None].clamp_min(0).sqrt() * vectors
    return torch.cat([vectors @ part for part in _deviations(rows, mean)], 1)


def _deviations(rows: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """Rows [n, d] less their mean [d], a few columns at a time: a float64 copy would take twice their memory."""
    return (part - centre for part, centre in zip(rows.split(_COLUMNS, 1), mean.split(_COLUMNS), strict=True))
