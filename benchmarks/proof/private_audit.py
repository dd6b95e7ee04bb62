"""How much does a release of class statistics tell about one image? A lower bound of epsilon, found by attacks.

    python benchmarks/proof/private_audit.py

The latents are 32 principal components of the bundled Fashion-MNIST. The training images are public: they give the
components and the clip. Private images are drawn from the test images.

An attack decides from a release whether a canary is among the images of a class. There are four canaries: an image far
from the class, zeros, the class mean, and a real image. To "all others", the real image is a second copy of an image
that is there. The score is the logarithm of the likelihood ratio. Three kinds of attackers are measured:

- "all others": knows every image but the canary, as the definition of differential privacy assumes.
- "all others, of a fit": the same, and sees every release that `private_classes` makes of two classes: counts, sums of
  the leading coordinates, energies, second moments, and cells where there are some. A model is computed from these.
- "all others, of a model": the same, but sees only the mean and covariance of a class in the model.

Of the last kind, half of the releases train the attack, and the other half count. The number of images times mu
decides the branch of a fit: FITS has classes of each branch, and the smallest classes that a fit takes. Stored rows are
not measured again. Rows without protection were measured by the code of commit 309e287.

Two lower bounds of epsilon hold for the worst canary with 95 % confidence (Bonferroni over the canaries):

- "any mechanism": from the rates of true and false positives (Clopper & Pearson 1934; Jagielski et al. 2020). Half of
  the trials choose the threshold. It cannot exceed about the logarithm of the number of trials.
- "Gaussian": assumes that scores are normal with one variance. The distance of their means in standard deviations then
  bounds mu (Nasr et al. 2023 bound mu too), and mu gives epsilon. It is tighter.

A correct mechanism stays below its claim in both. The rows "noise halved" are a deliberate mistake that the audit must
catch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy import stats
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.classes.privacy import Privacy, PrivateSums, Release, epsilon_of

from benchmarks.common import Rows, parser
from glem_augment import open_data
from glem_augment.classes import privacy as mechanism
from glem_augment.classes import private as fitting
from glem_augment.errors import DataError

CONFIDENCE, REAL = 0.95, "real image"
DIM, IMAGES, CLASSES = 32, 100, 20
FITS = (100, 1.0), (100, 10.0), (400, 1.0), (400, 3.0), (400, 10.0)  # images of a class, and epsilon
LEAST = 50  # images of a class times mu from which every fit makes a model
Scores = dict[str, tuple[Tensor, Tensor]]  # by canary: without, and with it
EPSILONS = 0.2, 1.0, 3.0, 10.0


def latents() -> tuple[Tensor, Tensor]:
    """Public and private numbers [n, DIM] float64: components of the public images with variance 1."""
    public, private = (
        open_data("bundled:fashion-mnist", split).tensor().flatten(1).double() / 255 for split in ("train", "test")
    )
    mean = public.mean(0)
    _, values, directions = torch.linalg.svd(public - mean, full_matrices=False)
    scale = directions[:DIM].T / values[:DIM] * math.sqrt(len(public) - 1)
    return (public - mean) @ scale, (private - mean) @ scale


def canaries(images: Tensor, clip: float) -> dict[str, Tensor]:
    """The numbers [DIM] that the attacks look for."""
    far = torch.zeros(DIM, dtype=torch.float64)
    far[0] = 100 * clip  # along a coordinate that every release has
    return {"far": far, "zeros": torch.zeros_like(far), "class mean": images.mean(0), REAL: images[0].clone()}


def bound_of_any(without: Tensor, having: Tensor, delta: float, error: float) -> float:
    """A lower bound of epsilon from scores without and with the canary, wrong with probability `error`."""
    tuning, counting = (without[::2], having[::2]), (without[1::2], having[1::2])
    best = 0.0
    for sign in (1, -1):  # positives are high scores of "with", and low scores of "without"
        negative, positive = (sign * scores for scores in tuning[::sign])
        thresholds = torch.cat([negative, positive]).quantile(torch.linspace(0, 1, 201, dtype=torch.float64))
        guesses = [_ratio(negative, positive, float(t), delta, error / 2) for t in thresholds]
        threshold = float(thresholds[max(range(len(guesses)), key=guesses.__getitem__)])
        negative, positive = (sign * scores for scores in counting[::sign])
        best = max(best, _ratio(negative, positive, threshold, delta, error / 2))
    return best


def _ratio(negative: Tensor, positive: Tensor, threshold: float, delta: float, error: float) -> float:
    """log((true positives - delta) / false positives), at the pessimistic ends of their Clopper-Pearson intervals."""
    hits, alarms = int((positive >= threshold).sum()), int((negative >= threshold).sum())
    true = float(stats.beta.ppf(error / 2, hits, len(positive) - hits + 1)) if hits else 0.0
    false = float(stats.beta.ppf(1 - error / 2, alarms + 1, len(negative) - alarms)) if alarms < len(negative) else 1.0
    return math.log((true - delta) / false) if true - delta > false else 0.0


def bound_of_mu(without: Tensor, having: Tensor, error: float) -> float:
    """A lower bound of mu for normal scores of one variance, wrong with probability `error`, from Cohen's d."""
    n = min(len(without), len(having))
    distance = float((having.mean() - without.mean()) / ((without.var() + having.var()) / 2).sqrt())
    return max(0.0, distance + float(stats.norm.ppf(error)) * math.sqrt(2 / n + distance**2 / (4 * n)))


def log_ratios(release: Release, others: Sequence[Tensor], c: Tensor) -> Tensor:
    """log p(release | images and canary) - log p(release | images), for each class [K].

    `others` are the exact counts, sums and second moments of the images, and c [d] is the canary, clipped.
    """
    found, squared = torch.zeros((), dtype=torch.float64), c @ c
    if len(release.counts):
        found = found + (release.counts - others[0] - 0.5) / release.sd_count**2
    if release.sums.numel():
        found = found + ((release.sums - others[1]) @ c - squared / 2) / release.sd_sum**2
    if release.seconds.numel():
        found = found + ((release.seconds - others[2]) @ c @ c - squared**2 / 2) / release.sd_second**2
    return found


def _clipped(u: Tensor, clip: float) -> Tensor:
    return u * (clip / u.norm(dim=-1, keepdim=True)).clamp(max=1)


def private_scores(
    images: Tensor, marks: dict[str, Tensor], privacy: Privacy, clip: float, trials: int, halved: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """By canary: scores of "all others" in `trials` classes without the canary, and in as many with it.

    To save time, a release has CLASSES classes with the same images. Their noise is independent, so each is a trial.
    """

    def release(extra: Tensor | None) -> Release:
        sums = PrivateSums(CLASSES, DIM, clip, privacy)
        rows = images if extra is None else torch.cat([images, extra[None]])
        sums.add(rows.repeat(CLASSES, 1), torch.arange(CLASSES).repeat_interleave(len(rows)))
        return sums.release()

    clipped, honest = _clipped(images, clip), mechanism._gaussian
    others = torch.tensor(len(images)), clipped.sum(0), clipped.T @ clipped
    noise = (lambda count: honest(count) / 2) if halved else honest
    without: dict[str, list[Tensor]] = {name: [] for name in marks}
    having: dict[str, list[Tensor]] = {name: [] for name in marks}
    with mock.patch.object(mechanism, "_gaussian", noise):
        for _ in trange(-(-trials // CLASSES), desc=f"epsilon {privacy.epsilon:g}{', noise halved' * halved}"):
            blank = release(None)
            for name, mark in marks.items():
                without[name].append(log_ratios(blank, others, _clipped(mark, clip)))
                having[name].append(log_ratios(release(mark), others, _clipped(mark, clip)))
    return {name: (torch.cat(without[name])[:trials], torch.cat(having[name])[:trials]) for name in marks}


class Leaning:
    """Four numbers that show whether a canary is in a class, from the mean and covariance of the class.

    They are how far mean and covariance lean towards the canary, and the canary's distance and log-density under the
    Gaussian. Linear discriminant analysis of them is the attack.
    """

    def __init__(self, pool: Tensor, mark: Tensor) -> None:
        self.mark, self.centre, self.eye = mark, pool.mean(0), torch.eye(DIM, dtype=torch.float64)
        self.lean = torch.linalg.solve(pool.T.cov() + 1e-6 * self.eye, mark - self.centre)

    def features(self, mean: Tensor, covariance: Tensor) -> Tensor:
        covariance = covariance + 1e-6 * self.eye
        distance = (self.mark - mean) @ torch.linalg.solve(covariance, self.mark - mean)
        spread = (self.lean @ covariance @ self.lean).clamp_min(1e-300).log()
        return torch.stack([(mean - self.centre) @ self.lean, spread, distance.log1p(), covariance.logdet() + distance])


def trained_attack(without: Tensor, having: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the second half of features [2n, 4], by the discriminant of the first half."""
    (a, b), rest = (found[: len(found) // 2] for found in (without, having)), len(without) // 2
    scale = torch.cat([a, b]).std(0).clamp_min(1e-12)
    scatter = ((a / scale).T.cov() + (b / scale).T.cov()) / 2 + 1e-6 * torch.eye(4, dtype=torch.float64)
    direction = torch.linalg.solve(scatter, (b.mean(0) - a.mean(0)) / scale) / scale
    return without[rest:] @ direction, having[rest:] @ direction


class Watched(PrivateSums):
    """Sums without the canaries, which are the last rows, except the one that is `present`.

    They add to `scores` [canaries] the logarithm of the likelihood ratio of their release, given all earlier releases.
    """

    present: int | None
    scores: Tensor

    def add(self, u: Tensor, y: Tensor) -> None:
        first, units = len(u) - len(self.scores), (1.0, self.clip / mechanism._ONE, (self.clip / mechanism._ONE) ** 2)
        super().add(u[:first], y[:first])
        self.others = [exact.double() * unit for exact, unit in zip(self._secret(), units, strict=False)]
        self.canaries = mechanism._fixed_point(u[first:], self.clip).double() * units[1], y[first:]
        if self.present is not None:
            super().add(u[first:][self.present, None], y[first:][self.present, None])

    def release(self) -> Release:
        found = super().release()
        ratios = [log_ratios(found, self.others, c)[k] for c, k in zip(*self.canaries, strict=True)]
        self.scores += torch.stack(ratios)
        return found


def fit_scores(
    pool: Tensor, images: int, marks: dict[str, Tensor], privacy: Privacy, clip: float, trials: int
) -> tuple[Scores, Scores]:
    """By canary: scores of "all others, of a fit", without and with the canary in the first of two classes.

    The second result has the scores of "all others, of a model". It is empty if a fit refused the classes, whose scores
    are of the counts alone.
    """
    z = torch.cat([pool[: 2 * images], *(mark[None] for mark in marks.values())])
    y = torch.cat([torch.arange(2).repeat_interleave(images), torch.zeros(len(marks), dtype=torch.int64)])
    prior = torch.ones(DIM, dtype=torch.float64)

    def fits(present: int | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        scores, models = [], []
        for _ in trange(trials, desc=f"fits of {images} images, epsilon {privacy.epsilon:g}"):
            watched = type("Watched", (Watched,), {"present": present, "scores": torch.zeros(len(marks)).double()})
            with mock.patch.object(fitting, "PrivateSums", watched), contextlib.suppress(DataError):
                modes = fitting.private_classes(z, y, 2, prior, clip, privacy, None).classes.modes
                models.append(_gaussian_of(modes))
            scores.append(watched.scores)
        return torch.stack(scores), models

    (blank, blanks), having = fits(None), [fits(place) for place in range(len(marks))]
    releases = {name: (blank[:, i], having[i][0][:, i]) for i, name in enumerate(marks)}
    if any(len(models) < trials for models in (blanks, *(models for _, models in having))):
        return releases, {}
    found = {}
    for (name, mark), (_, models) in zip(marks.items(), having, strict=True):
        attack = Leaning(pool, mark)
        found[name] = trained_attack(*(torch.stack([attack.features(*m) for m in each]) for each in (blanks, models)))
    return releases, found


def _gaussian_of(modes: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the first class, over its cells."""
    cells, weight = modes.mean[: modes.parts].double(), modes.counts[: modes.parts].double()
    mean = weight @ cells / weight.sum()
    within = modes.directions[0].double() * modes.scales[0].double()[:, None]
    between = (cells - mean) * (weight / weight.sum()).sqrt()[:, None]
    return mean, within.T @ within + between.T @ between + modes.rest[0].double().diag()


def bounds(scores: Scores, delta: float, claim: float | None) -> dict[str, float]:
    """The bounds of each canary, of scores by canary."""
    error = (1 - CONFIDENCE) / 4  # for four canaries
    found: dict[str, float] = {"trials": len(next(iter(scores.values()))[0])}
    for name, pair in scores.items():
        found[f"any mechanism: {name}"] = round(bound_of_any(*pair, delta, error), 3)
        if claim is not None and float(pair[0].std()) > 0:
            mu = bound_of_mu(*pair, error)
            found[f"Gaussian: {name}"] = round(epsilon_of(mu, delta), 3) if mu else 0.0
    return found


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--trials", type=int, default=10_000, help="with and without each canary (%(default)s)")
    args.add_argument("--fit-trials", type=int, default=1000, help="the same, of whole fits (%(default)s)")
    args.add_argument("--delta", type=float, default=1e-6)
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    public, private = latents()
    clip = float(public.norm(dim=1).quantile(0.9))
    generator = torch.Generator().manual_seed(0)  # of the images of a class; the noise has no seed
    images = private[torch.randperm(len(private), generator=generator)[:IMAGES]]
    marks, rows = canaries(images, clip), Rows("private", args.out)

    def measure(kind: str, count: int, attacker: str, claim: float | None, scores: Callable[[], Scores]) -> None:
        setting = f"images={count}" + (f" epsilon={claim:g} delta={args.delta:g}" if claim else "")
        rows.once(setting, f"{kind} | {attacker}", "", "audit", lambda: bounds(scores(), args.delta, claim))

    for halved, epsilon in itertools.product((False, True), EPSILONS):
        tried = {"far": marks["far"]} if halved else marks  # the worst of them, to save time
        given = images, tried, Privacy(epsilon, args.delta), clip, args.trials, halved
        kind = "ours, noise halved: a deliberate mistake" if halved else "ours"
        measure(kind, IMAGES, "all others", epsilon, partial(private_scores, *given))
    for count, epsilon in FITS:
        fits = cache(partial(fit_scores, private, count, marks, Privacy(epsilon, args.delta), clip, args.fit_trials))
        measure("ours, a fit", count, "all others, of a fit", epsilon, lambda: fits()[0])  # noqa: B023
        if count * Privacy(epsilon, args.delta).mu > LEAST:
            measure("ours, a model", count, "all others, of a model", epsilon, lambda: fits()[1])  # noqa: B023


if __name__ == "__main__":
    main()
