"""How strong moves may be: before they are put back, and before a trained classifier takes them for other classes.

Both take seconds. Use images held out of the training set, never the test set.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from glem_augment.augment.labels import label_classes
from glem_augment.augment.moves import LADDER, basis_of, put_back, strongest_plausible
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import check_number
from glem_augment.data.dataset import ImageData
from glem_augment.devices import evaluating
from glem_augment.evaluation.metrics import spread
from glem_augment.model.glem import GLEM

__all__ = ["StrengthReport", "choose_strength", "moves_put_back"]


@torch.no_grad()
def moves_put_back(model: GLEM, data: ImageData, images: int = 128) -> dict[str, Any]:
    """Share of the moves that `GLEMAugment` puts back at its default settings, because the result is not plausible.

    Args:
        data: images of the flow's shape, labelled by its class indices. images: how many are moved, evenly spread.

    Returns:
        `mixup`: the share for policy "mixup" (images that the flow does not give back included); `noise`: that for
        "noise" at each strength from which "auto" chooses; `strength`: what it chooses on these images.

    Raises:
        ValueError: a model without modes.
    """
    count = min(images, len(data))
    x, y = (batch.to(model.device) for batch in next(data.batches(spread(len(data), count), count)))
    aug = GLEMAugment(model, p=1.0, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result tells the same
        aug(x, y)
    z, basis = model.encode(x)[0], basis_of(model, aug.basis, aug.modes, y)
    noise = {t: put_back(model, z, basis, t, aug.margin) for t in LADDER}
    strength = strongest_plausible(model, z, basis, aug.margin)
    return {"images": count, "mixup": aug.stats["replaced"] / count, "noise": noise, "strength": strength}


class StrengthReport(NamedTuple):
    """Accuracy on the unmoved images, on the moved ones by strength (rising), and the chosen strength (0: none)."""

    accuracy: float
    moved: dict[float, float]
    strength: float


@torch.no_grad()
def choose_strength(
    aug: GLEMAugment,
    classifier: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    strengths: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5),
    max_drop: float = 0.02,
) -> StrengthReport:
    """The largest strength at which a classifier still recognises held-out images that have all been moved.

    An image that is kept because the moved one is not plausible counts as not recognised. Images of classes that the
    flow does not have are left out.

    This is an upper bound: only training runs can tell whether moves of that strength help. The adversarial policy
    moves images like "noise" and then fools this very classifier, so choose the strength with policy "noise".

    Args:
        aug: with policy "noise"; it is not changed.
        classifier: trained without augmentation by the flow, and better than chance; it is in eval mode for the while.
        batches: held-out images and labels as `aug` takes them, on the classifier's device. Read once.
        strengths: to try. max_drop: how much accuracy may fall.

    Raises:
        ValueError: another policy, no images of the flow's classes, or an argument out of range.
    """
    if aug.policy != "noise":
        raise ValueError(f"choose_strength needs policy='noise', got {aug.policy!r}")
    max_drop = check_number("max_drop", max_drop, 0.0, 1.0)
    right = dict.fromkeys(sorted(check_number("strengths", s, 0.0, math.inf, open_low=True) for s in strengths), 0)
    trial = copy.deepcopy(aug, {id(aug.model): aug.model})  # the flow is shared
    trial.p, trial.labels = 1.0, "hard"
    classifier = unwrap_model(classifier)
    unmoved_right = total = 0
    with evaluating(classifier):
        for x, y in batches:
            rows = aug.moved_rows(y)
            if not len(rows):
                continue
            x, y = x[rows.to(x.device)], y[rows]
            classes = label_classes(y)
            total += len(y)
            unmoved_right += int(_is_right(classifier, x, classes).sum())
            drawn = trial.draw(x, y)  # one draw for all strengths
            for strength in right:
                trial.strength = strength
                moved = trial.apply(x, y, drawn)[0]
                put_back = (moved == x).flatten(1).all(1)
                right[strength] += int((_is_right(classifier, moved, classes) & ~put_back).sum())
    if not total:
        raise ValueError("batches gave no image of a class that the flow has")
    accuracy, of_moved = unmoved_right / total, {strength: count / total for strength, count in right.items()}
    good = itertools.takewhile(lambda strength: of_moved[strength] >= accuracy - max_drop, of_moved)
    return StrengthReport(accuracy, of_moved, max(good, default=0.0))


def _is_right(classifier: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images the classifier recognises: bool [B]."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return classifier(x).argmax(1) == y.to(x.device)
