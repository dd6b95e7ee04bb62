"""How much does a release of class statistics tell about one image? A lower bound of epsilon, found by attacks.

    python benchmarks/proof/private_audit.py

The latents are 32 principal components of the bundled Fashion-MNIST. The training images are public: they give the
components and the clip. Private images are drawn from the test images.

An attack decides from a release whether a canary is among the images of a class. There are four canaries: an image far
from the class, zeros, the class mean, and a real image. To "all others", the real image is a second copy of an image
that is there. The score is the logarithm of the likelihood ratio. Three kinds of attackers are measured:

- "all others": knows every image but the canary, as the definition of differential privacy assumes.
- "all others, of a model": the same, but sees only the mean and covariance of a class in a model that
  `private_classes` made of two classes, with all releases and all steps after them.
- "similar images": knows what releases of other images with and without the canary look like. The images of a class are
  drawn anew for each release.

Of the last two kinds, half of the releases train the attack, and the other half count.

Two lower bounds of epsilon hold for the worst canary with 95 % confidence (Bonferroni over the canaries):

- "any mechanism": from the rates of true and false positives (Clopper & Pearson 1934; Jagielski et al. 2020). Half of
  the trials choose the threshold. It cannot exceed about the logarithm of the number of trials.
- "Gaussian": assumes that scores are normal with one variance. The distance of their means in standard deviations then
  bounds mu (Nasr et al. 2023 bound mu too), and mu gives epsilon. It is tighter.

A correct mechanism stays below its claim in both. The rows "noise halved" are a deliberate mistake that the audit must
catch. "No protection" releases the exact count, mean and covariance.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy import stats
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment import open_data
from glem_augment.classes import privacy as mechanism
from glem_augment.classes.privacy import Privacy, PrivateSums, Release, epsilon_of
from glem_augment.classes.private import private_classes

NAME, CONFIDENCE, REAL = "private_audit", 0.95, "real image"
DIM, IMAGES, MODEL_IMAGES, CLASSES = 32, 100, 400, 20
EPSILONS, SIZES = (0.2, 1.0, 3.0, 10.0), (20, 50, 100, 200, 500)


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
    far[-1] = 100 * clip
    return {"far": far, "zeros": torch.zeros_like(far), "class mean": images.mean(0), REAL: images[0].clone()}


# ---- bounds ----------------------------------------------------------------------------------------------------------


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


# ---- attackers -------------------------------------------------------------------------------------------------------


class AllOthers:
    """The attacker that knows all `images` [n, DIM] of a class, but not whether the canary is there."""

    def __init__(self, images: Tensor, clip: float) -> None:
        self.clip, self.count, clipped = clip, len(images), _clipped(images, clip)
        self.sum, self.second = clipped.sum(0), clipped.T @ clipped

    def scores(self, release: Release, canary: Tensor) -> Tensor:
        """log p(release | images and canary) - log p(release | images), up to a constant, for each class [K]."""
        c = _clipped(canary, self.clip)
        # Products of the canary's statistic with the release minus the statistics of the images, over the variances.
        first, second = (release.sums - self.sum) @ c, (release.seconds - self.second) @ c @ c
        count = release.counts - self.count
        return count / release.sd_count**2 + first / release.sd_sum**2 + second / release.sd_second**2


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

    attacker, honest = AllOthers(images, clip), mechanism._gaussian
    noise = (lambda count: honest(count) / 2) if halved else honest
    without: dict[str, list[Tensor]] = {name: [] for name in marks}
    having: dict[str, list[Tensor]] = {name: [] for name in marks}
    with mock.patch.object(mechanism, "_gaussian", noise):
        for _ in trange(-(-trials // CLASSES), desc=f"epsilon {privacy.epsilon:g}{', noise halved' * halved}"):
            blank = release(None)
            for name, mark in marks.items():
                without[name].append(attacker.scores(blank, mark))
                having[name].append(attacker.scores(release(mark), mark))
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


def bare_scores(
    pool: Tensor, count: int, mark: Tensor, trials: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scores of "similar images" on exact means and covariances of `count` images, without and with the canary.

    A class with the canary has count - 1 other images, so that the count tells nothing.
    """
    attack = Leaning(pool, mark)

    def features(has: bool) -> Tensor:
        rows = pool[torch.randperm(len(pool), generator=generator)[:count]]
        if has:
            rows = torch.cat([rows[1:], mark[None]])
        return attack.features(rows.mean(0), rows.T.cov())

    without, having = (torch.stack([features(has) for _ in range(2 * trials)]) for has in (False, True))
    return trained_attack(without, having)


def model_scores(
    pool: Tensor, images: int, marks: dict[str, Tensor], privacy: Privacy, clip: float, trials: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """By canary: scores of "all others, of a model", without and with the canary in the first of two classes."""
    z, y = pool[: 2 * images], torch.arange(2).repeat_interleave(images)
    prior = torch.ones(DIM, dtype=torch.float64)

    def gaussians(extra: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        rows, labels = (z, y) if extra is None else (torch.cat([z, extra[None]]), torch.cat([y, y[:1]]))
        found = []
        for _ in trange(2 * trials, desc=f"models, epsilon {privacy.epsilon:g}"):
            modes = private_classes(rows, labels, 2, prior, clip, privacy, None).classes.modes
            assert modes is not None
            cells, weight = modes.mean[: modes.parts].double(), modes.counts[: modes.parts].double()
            mean = weight @ cells / weight.sum()
            within = modes.directions[0].double() * modes.scales[0].double()[:, None]
            between = (cells - mean) * (weight / weight.sum()).sqrt()[:, None]
            found.append((mean, within.T @ within + between.T @ between + modes.rest[0].double().diag()))
        return found

    blank, scores = gaussians(None), {}
    for name, mark in marks.items():
        attack = Leaning(pool, mark)
        pairs = (torch.stack([attack.features(*each) for each in models]) for models in (blank, gaussians(mark)))
        scores[name] = trained_attack(*pairs)
    return scores


# ---- rows ------------------------------------------------------------------------------------------------------------


def row(
    kind: str, images: int, attacker: str, scores: dict[str, tuple[Tensor, Tensor]], delta: float, claim: float | None
) -> dict[str, Any]:
    """The worst canary's bounds."""
    error = (1 - CONFIDENCE) / 4  # for four canaries
    by_any = {name: bound_of_any(*pair, delta, error) for name, pair in scores.items()}
    by_mu = {name: bound_of_mu(*pair, error) for name, pair in scores.items() if float(pair[0].std()) > 0}
    normal = {name: epsilon_of(mu, delta) if mu else 0.0 for name, mu in by_mu.items()}
    tightest = normal if claim and normal else by_any
    worst = max(tightest.values())
    return {
        "release": kind,
        "images": images,
        "attacker knows": attacker,
        "claimed epsilon": claim,
        "at least, any mechanism": round(max(by_any.values()), 3),
        "at least, Gaussian": round(max(normal.values()), 3) if claim else None,
        "worst canary": max(tightest, key=tightest.__getitem__),
        "at least, for a real image": round(tightest[REAL], 3) if REAL in tightest else None,
        "caught": None if claim is None else max(worst, *by_any.values()) > claim,
        "epsilons, any mechanism": [round(value, 3) for value in by_any.values()],
        "epsilons, Gaussian": [round(value, 3) for value in normal.values()],
    }


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--trials", type=int, default=10_000, help="with and without each canary (%(default)s)")
    args.add_argument("--bare-trials", type=int, default=2000, help="the same, without protection (%(default)s)")
    args.add_argument("--model-trials", type=int, default=300, help="the same, of fitted models (%(default)s)")
    args.add_argument("--delta", type=float, default=1e-6)
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    began = time.process_time()
    public, private = latents()
    clip = float(public.norm(dim=1).quantile(0.9))
    generator = torch.Generator().manual_seed(0)  # of the images of a class; the noise has no seed
    images = private[torch.randperm(len(private), generator=generator)[:IMAGES]]
    marks, rows = canaries(images, clip), []
    for halved in (False, True):
        for epsilon in EPSILONS:
            privacy = Privacy(epsilon, args.delta)
            tried = {"far": marks["far"]} if halved else marks  # the worst of them, to save time
            scores = private_scores(images, tried, privacy, clip, args.trials, halved)
            kind = "ours, noise halved: a deliberate mistake" if halved else "ours"
            rows.append(row(kind, IMAGES, "all others", scores, args.delta, epsilon))
            print(*rows[-1].values(), flush=True)
    for epsilon in (1.0, 10.0):  # at 0.2, classes of this size are drowned in noise
        scores = model_scores(private, MODEL_IMAGES, marks, Privacy(epsilon, args.delta), clip, args.model_trials)
        rows.append(row("ours, a fitted model", MODEL_IMAGES, "all others, of a model", scores, args.delta, epsilon))
        print(*rows[-1].values(), flush=True)
    # The exact statistics of known images differ in every release with the canary, at any size.
    certain = torch.zeros(args.bare_trials).double(), torch.ones(args.bare_trials).double()
    rows.append(row("no protection", IMAGES, "all others", {"any": certain}, args.delta, None))
    pool = private[(private != marks[REAL]).any(1)]
    for count in SIZES:
        found = {k: bare_scores(pool, count, mark, args.bare_trials, generator) for k, mark in marks.items()}
        rows.append(row("no protection", count, "similar images", found, args.delta, None))
        print(*rows[-1].values(), flush=True)
    write_results(
        args.out, NAME, "What releases of class statistics tell about one image: lower bounds of epsilon, 95 %", rows,
        delta=args.delta, dimension=DIM, trials=args.trials, bare_trials=args.bare_trials,
        model_trials=args.model_trials, cpu_seconds=round(time.process_time() - began),
    )  # fmt: skip


if __name__ == "__main__":
    main()
