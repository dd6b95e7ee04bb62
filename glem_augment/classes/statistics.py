"""Statistics of classes: counts, means and scatter of their latents, made in one pass.

The latents z of a class of n images have the mean m and the scatter S = sum (z - m)(z - m)^T. Gaussians, modes, pooled
covariance, shrinkage and discriminant are fitted to these alone (`classes.fit`). S is stored as its eigenvectors V and
the roots l of its eigenvalues, S = V^T diag(l^2) V, and its diagonal. In up to `WHOLE_DIM` dimensions V is whole.
Above, V has the strongest rows only, and the diagonal is exact.

A few latents are held out of a second set of statistics. They judge a fit to it (`classes.fit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glem_augment.errors import DataError

# Scatter is whole up to these limits: dimensions, and numbers in all.
WHOLE_DIM, _MOST_WHOLE = 1024, 2**26
HELD = 2000  # at most about so many latents are held out
IMAGES_PER_MODE = 8  # of a pooled covariance that whitens
# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
_MOST_ROWS = 1024  # directions of the pooled scatter
_COLUMNS = 512  # of float64 numbers that are squared at a time
# Up to this size an eigendecomposition takes seconds; above it, randomised subspace iteration finds the leading modes.
MAX_EIGH = 4096


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of n latents; float64 on the CPU.

    count: n. mean: [d]. directions: [r, d], orthonormal rows V. values: [r], descending, the roots l. squares: [d], the
    diagonal of S.
    """

    count: float
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
        rows = leading_rows(latents, most if pool is None else max(most, pool.most), mean)
        found = cls(len(latents), mean, *orthonormal(rows[:most]), squares)
        if pool is not None:
            pool.add(found, rows)
        return found

    def rows(self) -> Tensor:
        """F [r, d] with F^T F = S along the stored directions."""
        return self.values[:, None] * self.directions


@dataclass
class ClassStatistics:
    """Moments of K classes of latents in d dimensions.

    Attributes:
        classes: of each class.
        pooled: the scatter of all classes about their means; `count` is its degrees of freedom, and the mean is the
            classes' mean.
        whole: whether the directions span all of the scatter.
        held: a few latents [m, d] of all classes in order, evenly spread over the images of each, up to a fifth.
        held_counts: how many of each class.
        others: the statistics without the held latents, which then judge a fit; None without such latents.
    """

    classes: list[Moments]
    pooled: Moments
    whole: bool
    held: Tensor = field(default_factory=lambda: torch.empty(0))
    held_counts: list[int] = field(default_factory=list)
    others: ClassStatistics | None = None

    @property
    def dim(self) -> int:
        """d."""
        return len(self.pooled.mean)

    def counts(self) -> Tensor:
        """Images of each class, int64 [K]."""
        return torch.tensor([each.count for each in self.classes])


@torch.no_grad()
def class_statistics(
    latents_of_class: Callable[[int], Tensor], names: Sequence[object], dim: int, rank: int, hold_out: bool = True
) -> ClassStatistics:
    """Statistics of the classes that errors call `names`, with one class in memory at a time.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. K - 1; called once for each.
        rank: how many directions of a class will be used; with scatter that is not whole, no more are stored.
        hold_out: whether there are statistics without a few latents, too.

    Raises:
        DataError: a class without images, no class with two, or latents not finite.
    """
    whole = can_be_whole(len(names), dim)
    classes, others, held = list[Moments](), list[Moments](), list[Tensor]()
    pools = _Pool(dim), _Pool(dim)
    for y, name in enumerate(names):
        z = latents_of_class(y)
        rows = _spread(len(z), max(1, HELD // len(names))) if hold_out else torch.arange(0)
        seen = torch.ones(len(z), dtype=torch.bool).index_fill_(0, rows, False)
        held.append(z[rows].detach().cpu())
        for found, pool, part in ((classes, pools[0], z), (others, pools[1], z[seen]))[: 1 + hold_out]:
            each = Moments.of(part, name, dim if whole else rank, pool)
            found.append(each if whole else replace(each, directions=each.directions.float()))
        del z, part  # they would stay during the next class
    statistics = ClassStatistics(classes, pools[0].moments(), whole, torch.cat(held), [len(z) for z in held])
    if len(statistics.held):
        statistics.others = ClassStatistics(others, pools[1].moments(), whole)
    return statistics


def can_be_whole(num_classes: int, dim: int) -> bool:
    """Whether the whole scatter of so many classes fits in memory and in a file."""
    return dim <= WHOLE_DIM and num_classes * dim * dim <= _MOST_WHOLE


def _spread(count: int, most: int) -> Tensor:
    """At most `most` of `count` indices, evenly spread, and no more than a fifth."""
    chosen = min(count // 5, most)
    return torch.arange(chosen) * count // max(1, chosen)


class _Pool:
    """Adds up the scatter of classes, with up to `_MOST_ROWS` directions."""

    def __init__(self, dim: int) -> None:
        self.most = min(dim, _MOST_ROWS)
        # Where directions are left out anyway, float32 takes half the memory.
        self.factor = torch.empty(0, dim, dtype=torch.float64 if self.most == dim else torch.float32)
        self.squares, self.means = torch.zeros(2, dim, dtype=torch.float64)
        self.freedom: float = 0
        self.classes = 0

    def add(self, each: Moments, rows: Tensor) -> None:
        """Add a class with its `leading_rows`."""
        self.means += each.mean
        self.classes += 1
        if each.count < 2:
            return
        self.factor = torch.cat([self.factor, rows.to(self.factor)])
        self.squares += each.squares
        self.freedom += each.count - 1
        if len(self.factor) > 3 * self.most:  # one decomposition for several classes
            self.factor = leading_rows(self.factor, self.most).to(self.factor)

    def moments(self) -> Moments:
        """The pooled scatter. DataError: no class has two images."""
        if not self.freedom:
            raise DataError("no class has two images, so the variation within a class is unknown: add images")
        found = orthonormal(leading_rows(self.factor, self.most))
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
    pool = _Pool(dim)
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
