"""How much do the releases of a private fit tell about one image? A lower bound of epsilon, found by attacks.

    python benchmarks/proof/private_audit.py

The images are the bundled test images of Fashion-MNIST at 16 pixels, in TAEF2's public coordinates, two classes of
them. An attack decides whether a canary is among the images of the first class. The attacker knows every other image
and sees every release of `private_classes`. The score is the logarithm of the likelihood ratio, given all earlier
releases. There are three canaries: latents far from all images, the mean of the class, and a second copy of an image.

Two lower bounds of epsilon hold for the worst canary with 95 % confidence (Bonferroni over the canaries):

- "any mechanism": from the rates of true and false positives (Clopper & Pearson 1934; Jagielski et al. 2020). Half of
  the trials choose the threshold. It cannot exceed about the logarithm of the number of trials.
- "Gaussian": assumes that scores are normal with one variance. The distance of their means in standard deviations then
  bounds mu (Nasr et al. 2023 bound mu too), and mu gives epsilon. It is tighter.

A correct mechanism stays below its claim in both. The rows "noise halved" are a deliberate mistake that the audit must
catch. The images of a class times mu decide the branch of a fit: FITS has each branch. Stored rows are not measured
again.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from unittest import mock

import torch
from scipy import stats
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, parser
from glem_augment import GLEM, Privacy, open_data
from glem_augment.codec.published import prior_file
from glem_augment.privacy import epsilon_of, fit, mechanism
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.latents import latents_alone, public_codec
from glem_augment.privacy.sums import PrivateSums, fixed_point

CONFIDENCE, SIDE = 0.95, 16
FITS = (100, 1.0, False), (100, 10.0, False), (1500, 10.0, False), (100, 10.0, True)


def images(per_class: int) -> tuple[Tensor, Tensor, ReleaseCoordinates]:
    """Latents [n, d] in public coordinates and labels [n] of images of two classes; few images are repeated."""
    data = open_data("bundled:fashion-mnist", "test", image_size=SIDE)
    model = GLEM.create("identity", data.image_shape, data.classes, autoencoder="taef2").eval()
    model.codec = public_codec(model.codec)
    path = prior_file("taef2")
    assert path is not None
    coordinates = ReleaseCoordinates(path, model.config.flow_shape, data.image_shape[0] == 1)
    u, y = latents_alone(lambda x: coordinates(model.encode(x)[0]), data)
    rows = torch.cat([(y == k).nonzero()[:, 0].repeat(per_class)[:per_class] for k in range(2)])
    return u[rows], y[rows], coordinates


class Watched(PrivateSums):
    """Sums without the canaries, which are the last rows, except the one that is `present`.

    They add to `scores` [canaries] the logarithm of the likelihood ratio of their release, given all earlier releases.
    """

    present: int | None
    scores: Tensor

    def add(self, u: Tensor, slot: Tensor) -> None:
        first, one = len(u) - len(self.scores), 2.0**-20
        super().add(u[:first], slot[:first])
        unit = {"counts": 1.0, "sums": one, "scatter": one**2}[self.statistic]
        self.others = self._secret().double() * unit
        self.canaries = fixed_point(u[first:], self.clip).double() * one, slot[first:]
        if self.present is not None:
            super().add(u[first:][self.present, None], slot[first:][self.present, None])

    def release(self) -> Tensor:
        found = super().release()
        away = found / {"counts": 1.0, "sums": self.clip, "scatter": self.clip**2}[self.statistic] - self.others
        for i, (c, k) in enumerate(zip(*self.canaries, strict=True)):
            seen = {"counts": lambda: away[k], "sums": lambda: away[k] @ c, "scatter": lambda: away[k] @ c @ c}  # noqa: B023
            norm = {"counts": 1.0, "sums": float(c @ c), "scatter": float(c @ c) ** 2}[self.statistic]
            self.scores[i] += (seen[self.statistic]() - norm / 2) / self.noise**2
        return found


def scores_of(
    per_class: int, epsilon: float, delta: float, trials: int, halved: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """By canary: scores of `trials` fits without any canary, and of as many with this one."""
    u, y, coordinates = images(per_class)
    far = torch.zeros_like(u[0])
    far[0] = 1e6
    marks = {"far": far, "class mean": u[y == 0].mean(0), "a copy": u[0]}
    u = torch.cat([u, torch.stack(list(marks.values()))])
    y = torch.cat([y, y.new_zeros(len(marks))])
    honest = mechanism._gaussian
    noise = (lambda count: honest(count) / 2) if halved else honest

    def fits(present: int | None) -> Tensor:
        found = []
        for _ in trange(trials, desc=f"{per_class} images, epsilon {epsilon:g}, canary {present}"):
            scores = torch.zeros(len(marks)).double()
            watched = type("Watched", (Watched,), {"present": present, "scores": scores})
            with mock.patch.object(fit, "PrivateSums", watched), mock.patch.object(mechanism, "_gaussian", noise):
                fit.private_classes(u, y, 2, coordinates, Privacy(epsilon, delta))
            found.append(scores)
        return torch.stack(found)

    blank = fits(None)
    return {name: (blank[:, i], fits(i)[:, i]) for i, name in enumerate(marks)}


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


@torch.no_grad()
def main() -> None:
    args = parser(__doc__)
    args.add_argument("--trials", type=int, default=1000, help="fits without and with each canary (%(default)s)")
    args.add_argument("--delta", type=float, default=1e-6)
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("private", args.out)
    for per_class, epsilon, halved in FITS:

        def measure(per_class: int = per_class, epsilon: float = epsilon, halved: bool = halved) -> dict[str, float]:
            found: dict[str, float] = {"trials": args.trials}
            scores = scores_of(per_class, epsilon, args.delta, args.trials, halved)
            error = (1 - CONFIDENCE) / len(scores)
            for name, pair in scores.items():
                found[f"any mechanism: {name}"] = round(bound_of_any(*pair, args.delta, error), 3)
                mu = bound_of_mu(*pair, error)
                found[f"Gaussian: {name}"] = round(epsilon_of(mu, args.delta), 3) if mu else 0.0
            return found

        arm = "noise halved: a deliberate mistake" if halved else "a fit"
        rows.once(f"images={per_class} epsilon={epsilon:g} delta={args.delta:g}", arm, "", "audit", measure)


if __name__ == "__main__":
    main()
