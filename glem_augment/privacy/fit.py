"""Classes from private images: `classes.fit`'s Gaussians, estimated from releases of noisy sums alone.

The noise's variance takes the place of sampling variance, and public knowledge of what no release tells
(`privacy.coordinates`). Of the promise's mu^2,

- counts take `COUNTS`: how much noise the classes bear. The rest follows from their median times mu, the size.
- the sum over all images takes `MIDDLE`: the overall mean, shrunk to the public centre. Images unlike photographs are
  far from that centre, and clipping about it would cut the differences between their classes.
- sums of weighted coordinates about the overall mean give the class means. They are shrunk by f / (f + s / n + noise),
  with f the public variance of class means plus a number.
- squares about the class means, added up over all classes, take `SQUARES`: the variance s within classes, and the
  variance of each leading coordinate, shrunk to s. They are the target T.
- from the size `_LEAST_SIZE` on, the scatter of each class in its leading coordinates about its mean takes `CLASSES`.
  It adds up to the pooled one, S.
- from the size `_LEAST_POOLED` of all classes on, a part of the budget buys S of all leading coordinates directly.

W = (nu0 T + N S) / (nu0 + N) as in `classes.fit`, with N the images that would have as much sampling variance as S has
noise and sampling variance together. A class has W + a (S_y - W) in its leading m coordinates, with
a = N_y / (nu1 + N_y) and nu1 = 2 m + 4 N_y, or 2 m for samples and moves, and W elsewhere. The parts were chosen on
training images of CIFAR-10 and Fashion-MNIST.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glem_augment.classes.classes import Classes
from glem_augment.classes.covariances import PUBLIC, ClassCovariances, from_public
from glem_augment.classes.fit import (
    NU0,
    NU1,
    NU1_IMAGES,
    classes_of,
    directions_of_class,
    shrunk,
    strengths,
)
from glem_augment.names import DEFAULT_MODES
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.mechanism import Privacy
from glem_augment.privacy.record import describe
from glem_augment.privacy.sums import PrivateSums, Statistic

COUNTS, MIDDLE, SQUARES, CLASSES, POOLED = 0.02, 0.1, 0.05, 0.4, 0.3  # parts of mu^2; sums have the rest
_LEAST_SIZE, _LEAST_POOLED = 150, 5000
_LEADING, _MOST_LEADING, _MOST_POOLED = 64, 192, 512  # coordinates: of classes of the size 600, at most, and pooled
_MOST_SQUARE = 1.25  # of the expected norm of squares, to which they are clipped; photographs have about 1
_CLIP = 0.9  # of scatter, in the expected squared norm
_LEAST_SHARE = 0.5  # of the least variance of T, along any direction of W
_LEAST_VARIANCE = 0.05  # within classes, and along any direction of a class as a share of W / 2
_SPREAD = 10  # the variance of the overall mean about the public centre, in variances of class means
_TEMPERATURE = 3.0  # of the posterior: the best were 2 to 8 on held-out training images
_LOST = 0.25  # a class that keeps less, or whose count is below two deviations of its noise, is mostly noise


class Plan(NamedTuple):
    """Parts of mu^2, and the numbers of leading coordinates, of the scatter of each class and of all classes."""

    classes: float
    leading: int
    pooled: float
    pooled_leading: int

    @classmethod
    def of(cls, size: float, classes: int, dim: int) -> Plan:
        """`size`: images of a class times mu. A scatter that does not pay has the part 0."""
        leading = min(round(_LEADING * math.sqrt(size / 600)), _MOST_LEADING, directions_of_class(classes, dim))
        if size < _LEAST_SIZE:
            return cls(0.0, 0, 0.0, 0)
        if (total := size * classes) < _LEAST_POOLED:
            return cls(CLASSES, leading, 0.0, 0)
        pooled = POOLED * math.sqrt(_LEAST_POOLED / total)
        return cls(2 * POOLED - pooled, leading, pooled, min(dim, _MOST_POOLED))


@dataclass
class PrivateClasses:
    """The classes of a private model, and what a recipient may know of them.

    Attributes:
        classes: means, covariances, Gaussians and modes.
        privacy: the entry of config.json.
        counts: noisy numbers of images [K].
        kept: the share of the public variance of class means that rises above the noise, of each class [K].
        lost: classes that are mostly noise; they are drawn much like the average of classes.
    """

    classes: Classes
    privacy: dict[str, Any]
    counts: Tensor
    kept: Tensor
    lost: list[int]


@torch.no_grad()
def private_classes(
    u: Tensor, y: Tensor, num_classes: int, coordinates: ReleaseCoordinates, privacy: Privacy
) -> PrivateClasses:
    """Gaussians of K classes that keep the promise. All ranks call this together, each with its images.

    `u` [n, d] are in `coordinates`, each a function of one image; `y` int64 [n] are labels.
    """
    rounds: list[dict[str, Any]] = []
    dim, everyone = u.shape[1], torch.zeros_like(y)

    def released(name: str, statistic: Statistic, rows: Tensor, slots: Tensor, clip: float, part: float) -> Any:
        sums = PrivateSums(statistic, num_classes if slots is y else 1, rows.shape[1], clip, privacy, part)
        sums.add(rows, slots)
        rounds.append({"release": name, "statistic": statistic, "noise": sums.noise, "clip": clip})
        return sums.release(), sums.sd

    counts, sd_count = released("counts", "counts", u[:, :1], y, 1.0, COUNTS)
    n = _likely_counts(counts, sd_count)
    size = float(n.median()) * privacy.mu_per_image
    plan = Plan.of(size, num_classes, dim)

    weights, between, images = coordinates.weights, coordinates.between, float(n.sum())
    sums, sd = released("middle", "sums", u * weights.to(u), everyone, coordinates.norm, MIDDLE)
    error = (sd / images / weights[None]).square() + 1 / images
    middle, unsure = shrunk(sums / images / weights, error, _SPREAD * between, trust=error**-2)
    u = u - middle.to(u)
    rest = 1 - COUNTS - MIDDLE - SQUARES - plan.classes - plan.pooled
    sums, sd = released("sums", "sums", u * weights.to(u), y, coordinates.norm, rest)
    mean, noise = sums / n[:, None] / weights, (sd / n[:, None] / weights).square()
    means, posterior = _shrunk(mean, noise + 1 / n[:, None], between, unsure)

    rows, clip = _squares(u.double() - means[y])
    squares, sd = released("squares", "sums", rows, everyone, clip, SQUARES)
    s, target = _variances(squares[0] / images, sd / images, images, posterior.mean(0))
    error = noise + s / n[:, None]
    means, posterior = _shrunk(mean, error, between, unsure)
    kept = (posterior / error * between).sum(1) / between.sum()

    away = u.double() - means[y]
    pooled: tuple[Tensor, float] | None = None
    own, sd = None, 0.0
    if plan.pooled:
        clip = math.sqrt(_CLIP * float(target[: plan.pooled_leading].sum()))
        scatter, sd = released("scatter", "scatter", away[:, : plan.pooled_leading], everyone, clip, plan.pooled)
        pooled = scatter[0], sd
    if plan.classes:
        clip = math.sqrt(_CLIP * float(target[: plan.leading].sum()))
        own, sd = released("scatter of classes", "scatter", away[:, : plan.leading], y, clip, plan.classes)
        pooled = pooled or (own.sum(0), sd * math.sqrt(num_classes))

    covariances = _covariances(coordinates, means + middle, pooled, images, s, target, plan.leading)
    if own is not None:
        _add_classes(covariances, coordinates, own, n, sd, s)
    classes = classes_of(covariances, n.round().long(), min(DEFAULT_MODES, dim))
    classes.temperature = _TEMPERATURE
    lost = ((kept < _LOST) | (counts < 2 * sd_count)).nonzero()[:, 0].tolist()
    return PrivateClasses(classes, describe(privacy, rounds), counts, kept, lost)


def _likely_counts(noisy: Tensor, sd: float) -> Tensor:
    """Counts [K] shrunk to their mean by the share of noise in their differences, and at least `sd` and 1."""
    spread = float(noisy.var()) if len(noisy) > 1 else math.inf
    share = max(0.0, 1 - sd * sd / max(spread, 1e-9))
    return (noisy.mean() + (noisy - noisy.mean()) * share).clamp_min(max(sd, 1.0))


def _shrunk(mean: Tensor, error: Tensor, between: Tensor, unsure: Tensor) -> tuple[Tensor, Tensor]:
    """Means [K, d] from noisy ones, whose errors have the variances `error` [K, d], and what remains of them.

    `unsure` [1, d] are the variances of the means' middle about zero.
    """
    weight = 1 / (error + between)
    middle, wrong = ((mean * weight).sum(0) / weight.sum(0))[None], 1 / weight.sum(0)[None]
    middle, _ = shrunk(middle, wrong, unsure, trust=wrong**-2)
    away, left = shrunk(mean - middle, error, between, len(mean) / max(1, len(mean) - 1), error**-2)
    return middle + away, left


def _squares(away: Tensor) -> tuple[Tensor, float]:
    """Squares of the leading coordinates of differences [n, d], and a multiple of their mean square: [n, m + 1].

    And the norm to clip to. The multiple has half the norm that is expected of the squares, so it bears little noise.
    """
    known, dim = min(away.shape[1], _MOST_POOLED), away.shape[1]
    length = math.sqrt(2 * known + dim)
    rows, whole = away[:, :known].square(), torch.zeros_like(away[:, :1])
    for column in away.unbind(1):  # sums of columns: no row depends on another
        whole[:, 0] += column.square() * (length / 2 / dim)
    return torch.cat([rows, whole], 1), _MOST_SQUARE * length


def _variances(squares: Tensor, sd: float, images: float, unsure: Tensor) -> tuple[float, Tensor]:
    """The variance s within classes, and the variance [m] of each leading coordinate, from mean squares [m + 1].

    `sd` is the noise's deviation, and `unsure` [d] the variance of the means about which the squares were taken.
    """
    known, dim = len(squares) - 1, len(unsure)
    s = float(squares[-1]) / (math.sqrt(2 * known + dim) / 2) - float(unsure.mean())
    s = max(s, _LEAST_VARIANCE)
    varied, error = squares[:-1] - unsure[:known] - s, sd * sd + 2 * s * s / images
    spread = max(0.0, float(varied.square().mean()) - error)
    return s, (s + varied * spread / (spread + error)).clamp_min(_LEAST_VARIANCE * s)


def _alike(images: float, noise: float) -> float:
    """How many images have the sampling variance that `images` have with noise of variance `noise`, unit variances."""
    return 1 / (1 / images + noise)


def _covariances(
    coordinates: ReleaseCoordinates,
    means: Tensor,
    pooled: tuple[Tensor, float] | None,
    images: float,
    s: float,
    target: Tensor,
    rank: int,
) -> ClassCovariances:
    """The means, and W for all classes, from T [m] and the noisy pooled scatter with its noise; None: T alone."""
    dim, public, known = means.shape[1], coordinates.public, len(target)
    shared = target.diag()
    if pooled is not None:
        scatter, sd = pooled
        m, nu0, count = len(scatter), NU0 * dim, _alike(images, (sd / images / s) ** 2 / 2)
        shared[:m, :m] = (nu0 * shared[:m, :m] + count * scatter / images) / (nu0 + count)
    values, vectors = torch.linalg.eigh(shared)
    values = values.clamp_min(_LEAST_SHARE * float(target.min()))  # the noise of S makes some too small
    outside = max((s * dim - float(target.sum())) / max(1, dim - known), _LEAST_VARIANCE * s)
    directions = coordinates.to_public(torch.nn.functional.pad(vectors.T, (0, dim - known)))
    found = ClassCovariances(len(means), public.image_shape, rank, known, PUBLIC, *strengths(dim))
    found.coordinates.set(public, outside**-0.5, directions, outside / values)
    v = coordinates.to_public(means) + coordinates.centre_in_public()
    found.mean.copy_(from_public(v.float(), public))
    return found


def _add_classes(
    found: ClassCovariances, coordinates: ReleaseCoordinates, scatter: Tensor, n: Tensor, sd: float, s: float
) -> None:
    """Give classes W + a (S_y - W) in the leading coordinates, from their noisy scatter [K, m, m]; see above."""
    leading, dim = scatter.shape[1], found.dim
    unit = coordinates.to_public(torch.eye(leading, dim, dtype=torch.float64))
    whiten = found.coordinates.whiten.double()
    # W is the identity after `whiten`, a symmetric map G. A matrix X of the coordinates P becomes (G P) X (G P)^T.
    q, r = torch.linalg.qr(whiten(unit).T)
    shared = whiten.inverse(unit)
    shared = shared @ shared.T
    found.coordinates.whiten.float()
    for y, count in enumerate(n.tolist()):
        alike = _alike(count, (sd / count / s) ** 2 / 2)
        values, vectors = torch.linalg.eigh(r @ (scatter[y] / count - shared) @ r.T)
        found.directions[y] = (q @ vectors).T.float()
        drawn = NU1 * leading + alike
        for total, variances in ((drawn + NU1_IMAGES * alike, found.variances), (drawn, found.drawn_variances)):
            variances[y] = (1 + alike / total * values).clamp_min(2 * _LEAST_VARIANCE).float()
