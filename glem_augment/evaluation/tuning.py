"""Picking strength and p on held-out data: a quick check with one trained classifier, and a search with training runs.

Neither may look at the test set: the images are held out of the training set.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from glem_augment.augment.adversarial import unwrapped
from glem_augment.augment.labels import data_class
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import check_number
from glem_augment.devices import evaluating


@dataclass(frozen=True)
class StrengthRow:
    """What one strength does to held-out images of the flow's classes.

    strength; accuracy of the classifier on what comes out, in [0, 1]; change, the mean absolute change of a pixel in
    uint8 steps; replaced, the share of images that came out as they were because the moved one was not plausible;
    kept_right, the share that were replaced and are recognised, part of both.
    """

    strength: float
    accuracy: float
    change: float
    replaced: float
    kept_right: float


@dataclass(frozen=True)
class StrengthReport:
    """accuracy on the images as they are, one row per strength (rising), and the strength that was chosen (0: none)."""

    accuracy: float
    rows: list[StrengthRow]
    strength: float


@torch.no_grad()
def choose_strength(
    aug: GLEMAugment,
    classifier: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    strengths: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5),
    max_drop: float = 0.02,
) -> StrengthReport:
    """The largest strength at which held-out images, all moved, are still recognised: labels stay right.

    An image that is kept because its moved one is not plausible counts as lost. Images of classes that the flow does
    not have are left out: nothing moves them.

    A bound from above, in seconds: whether so strong a move also helps, only `search` can tell. For policy
    "adversarial" the moves are noise with a step that fools this very classifier, so the drop says little: use "noise".

    Args:
        aug: policy "noise"; not changed.
        classifier: trained without it; put in eval mode for the while.
        batches: held-out (images, labels), as `aug` takes them, on the classifier's device. Gone through once.
        strengths: to try; max_drop: of accuracy.

    Returns:
        The report.

    Raises:
        ValueError: for another policy, no images of the flow's classes, or an argument out of range.
    """
    if aug.policy != "noise":
        raise ValueError(f"choose_strength needs policy='noise', got {aug.policy!r}: see `search` for the others")
    max_drop = check_number("max_drop", max_drop, 0.0, 1.0)
    tried = sorted(check_number("strengths", s, 0.0, math.inf, open_low=True) for s in strengths)
    if not tried:
        raise ValueError("strengths is empty")
    plainly_right, total, trials = 0, 0, []
    right, kept_right, change = [0] * len(tried), [0] * len(tried), [0.0] * len(tried)
    for strength in tried:
        # The same draws at every strength, through the same flow: it is large.
        trial = copy.deepcopy(aug, {id(aug.model): aug.model})
        trial.p, trial.strength, trial.labels = 1.0, strength, "hard"
        trials.append((trial, trial.stats))
    classifier = unwrapped(classifier)
    std = torch.tensor([1.0] if aug.pixels.std is None else list(aug.pixels.std)).view(-1, 1, 1)
    with evaluating(classifier):
        for x, y in batches:
            rows = trials[0][0].moved_rows(y)
            x, y = x[rows.to(x.device)], y[rows]
            cls, scale = data_class(y), 1.0 if x.dtype == torch.uint8 else 255.0 * std.to(x.device)
            total += len(y)
            if len(y) == 0:
                continue
            plainly_right += int(_right(classifier, x, cls).sum())
            for i, (trial, _) in enumerate(trials):
                before = trial.stats["replaced"]
                moved = trial(x, y)[0]
                recognised = _right(classifier, moved, cls)
                right[i] += int(recognised.sum())
                if trial.stats["replaced"] > before:
                    kept_right[i] += int((recognised & (moved == x).flatten(1).all(1)).sum())
                change[i] += float(((moved.float() - x.float()).abs() * scale).flatten(1).mean(1).sum())
    if total == 0:
        raise ValueError("batches gave no image of a class that the flow has")
    rows = [
        StrengthRow(
            strength,
            right[i] / total,
            change[i] / total,
            (trials[i][0].stats["replaced"] - trials[i][1]["replaced"]) / total,
            kept_right[i] / total,
        )
        for i, strength in enumerate(tried)
    ]
    plain, chosen = plainly_right / total, 0.0
    chance = 1 / aug.num_classes
    if plain <= min(1.5 * chance, chance + 0.1) < 1:
        warnings.warn(
            f"the classifier is right on {100 * plain:.1f} % of the images, which among {aug.num_classes} classes is "
            "little more than chance: what it still recognises says nothing. Train it first",
            stacklevel=2,
        )
    for row in rows:  # up to the first that is too strong
        if row.accuracy - row.kept_right < plain - max_drop:
            break
        chosen = row.strength
    return StrengthReport(plain, rows, chosen)


def _right(classifier: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images are recognised, bool [n]."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return classifier(x).argmax(1) == y.to(x.device)


@dataclass(frozen=True)
class Trial:
    """Scores of one setting, one per seed; p = 0 is the run without augmentation."""

    strength: float
    p: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean score."""
        return fmean(self.scores)

    def gain(self, baseline: Trial) -> tuple[float, float]:
        """Mean and standard error of the paired differences to another trial (error: nan for one seed)."""
        differences = [a - b for a, b in zip(self.scores, baseline.scores, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return fmean(differences), error


@dataclass(frozen=True)
class SearchResult:
    """All trials, the one without augmentation first, and the best of them."""

    trials: list[Trial]
    best: Trial

    @property
    def baseline(self) -> Trial:
        """The run without augmentation."""
        return self.trials[0]

    def table(self) -> str:
        """Markdown, best first."""
        lines = ["| strength | p | score | gain over p = 0 |", "|---|---|---|---|"]
        for trial in sorted(self.trials, key=lambda t: -t.mean):
            gain, error = trial.gain(self.baseline)
            spread = "" if math.isnan(error) else f" ± {error:.4f}"
            lines.append(f"| {trial.strength:g} | {trial.p:g} | {trial.mean:.4f} | {gain:+.4f}{spread} |")
        return "\n".join(lines)


def search(
    score: Callable[[float, float, int], float],
    strengths: Sequence[float] = (0.25, 0.5, 1.0),
    ps: Sequence[float] = (0.25, 0.5, 1.0),
    seeds: int = 1,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Train with every strength and p, and without, and keep the best by its mean score on held-out images.

    Args:
        score: (strength, p, seed) -> score on held-out images, larger is better; it trains a classifier.
        strengths, ps: to try in every combination (policy "mixup" has no strength: give one, or pass `alpha` as it).
        seeds: runs per setting, with the same seeds 0, 1, ... for all, so that differences are paired.
        on_trial: told each trial as it is done.

    Returns:
        All trials. Where nothing is better than no augmentation, the best trial is that one (p = 0).

    Raises:
        ValueError: for an empty grid, a strength or p out of range, or a score that is not a finite number.
    """
    settings = _settings(strengths, ps)  # all of them looked at before the first training
    if seeds < 1 or len(settings) < 2:
        raise ValueError(f"nothing to try: strengths={strengths!r}, ps={ps!r}, seeds={seeds}")
    trials: list[Trial] = []
    for strength, p in settings:
        scores = [float(score(strength, p, seed)) for seed in range(seeds)]
        if not all(math.isfinite(value) for value in scores):
            raise ValueError(f"score({strength:g}, {p:g}) gave {scores}: it must be a finite number")
        trials.append(Trial(strength, p, tuple(scores)))
        if on_trial is not None:
            on_trial(trials[-1])
    return SearchResult(trials, max(trials, key=lambda trial: trial.mean))


def _settings(strengths: Sequence[float], ps: Sequence[float]) -> list[tuple[float, float]]:
    """No augmentation, and then all combinations that are any."""
    checked = [check_number("strengths", value, 0.0, math.inf) for value in strengths]
    shares = [check_number("ps", value, 0.0, 1.0) for value in ps]
    return [(0.0, 0.0), *((s, p) for s, p in itertools.product(checked, shares) if s > 0 and p > 0)]
