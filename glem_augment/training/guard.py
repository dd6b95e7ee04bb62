"""When a run has diverged.

The guard sees the loss of every E-step, in nats per dimension, and its likelihood alone, in bits/dim. It judges by
medians of the last `SPAN` (25) steps, which a few spikes can't move. Steps that are not finite count as infinite. A run
is away while one of these holds:

- its loss exceeds b + max(1, |b|, 10 v), where b is its best, the lowest median of the last `WINDOW` (500) steps, and
  v the median absolute difference from one loss to the next, a measure of noise that neither a trend nor a few spikes
  can raise;
- its likelihood is worse, by a bit per dimension, than those of uniform noise and of the untrained flow; or, once it
  was better than that of independent pixels, worse than halfway from there to uniform noise. Repulsion of the classes
  may cost some of it.

A run that was away for `PATIENCE` (100) steps in a row has diverged, and so has one with `MAX_BAD_STEPS` (10) steps in
a row that were not finite. It returns to its last good checkpoint and goes on at half the learning rates, at most
`MAX_ROLLBACKS` times. The rule is on the side of patience: neither noise nor a slow rise can meet it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glem_augment.errors import TrainingError

MAX_BAD_STEPS, MAX_ROLLBACKS = 10, 3
SPAN, WINDOW, PATIENCE = 25, 500, 100
START = 5  # losses before the guard has something to compare with
CALM = 10  # steps in a row that were not away make a checkpoint good


class DivergenceError(TrainingError):
    """The run has diverged; a return to the last good checkpoint may help."""


def independent_pixels(x: Tensor, bits: int) -> float:
    """Bits/dim of a model whose pixels are independent draws from their channel's histogram: its mean entropy.

    One histogram serves all positions of a channel. One per position would be a better model of aligned images, but
    takes more images than many sets have.

    Args:
        x: uint8 [N,C,H,W]; `bits`: how many of the bits count.
    """
    channels = (x >> (8 - bits)).transpose(0, 1).flatten(1).long()
    shares = torch.stack([channel.bincount(minlength=2**bits) for channel in channels]) / channels.shape[1]
    return float(torch.special.entr(shares.double()).sum(1).mean() / math.log(2))


class LossGuard:
    """Watches the E-steps one by one.

    `uniform` and `pixels` are what uniform noise and independent pixels cost, in bits/dim; the first is the number of
    `bits` of a channel, the second is infinite until it is set.

    >>> guard = LossGuard(bits=8)
    >>> for _ in range(300):
    ...     guard.see(2.0, 2.0 / math.log(2))
    >>> guard.limit()
    4.0
    """

    def __init__(self, bits: int) -> None:
        self.uniform, self.pixels = float(bits), math.inf
        self.losses, self.medians = deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW)
        self.bits = deque[float](maxlen=SPAN)
        self.start = 0.0  # bits/dim of the untrained flow, once they are known
        self.away = 0  # steps in a row
        self.learned = False  # whether the likelihood was better than independent pixels

    def limit(self) -> float:
        """Median losses above this are away, nats per dimension; infinite while there is nothing to compare with."""
        if not self.medians:
            return math.inf
        best, finite = min(self.medians), [loss for loss in self.losses if loss < math.inf]
        return best + max(1.0, abs(best), 10 * _median(abs(after - before) for before, after in pairwise(finite)))

    def see(self, loss: float, bits: float) -> None:
        """Take in one E-step: its loss, nats per dimension, and its likelihood, bits/dim. NaN and infinity are allowed.

        Raises:
            DivergenceError: the run has diverged.
        """
        good = math.isfinite(loss)
        self.losses.append(loss if good else math.inf)
        self.bits.append(bits if good else math.inf)
        recent = list(self.losses)[-SPAN:]
        if recent[-MAX_BAD_STEPS:] == [math.inf] * MAX_BAD_STEPS:
            raise DivergenceError(f"{MAX_BAD_STEPS} steps in a row were not finite")
        if len(recent) < START:
            return
        now, limit, likelihood = _median(recent), self.limit(), _median(self.bits)
        if not self.start and likelihood < math.inf:
            self.start = likelihood
        most = (self.pixels + self.uniform) / 2 if self.learned else max(self.uniform, self.start) + 1
        self.learned = self.learned or likelihood < self.pixels < math.inf
        self.away = self.away + 1 if now > limit or likelihood > most else 0
        self.medians.append(now)
        if self.away >= PATIENCE:
            if now > limit:
                raise DivergenceError(f"the loss has left for good: {now:.4g} nats/dim, after {min(self.medians):.4g}")
            raise DivergenceError(
                f"the flow has become worse than independent pixels: {likelihood:.4g} bits/dim, not {self.pixels:.4g}"
            )

    @property
    def calm(self) -> bool:
        """Whether a diverged run may return to a checkpoint that is written now."""
        return not self.away and all(loss <= self.limit() for loss in list(self.losses)[-CALM:] if self.medians)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: facts as JSON, and series as float64 tensors."""
        facts = {name: getattr(self, name) for name in _FACTS}
        return facts, {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in _SERIES}

    def load(self, facts: dict[str, Any], series: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for name in _FACTS:
            setattr(self, name, facts[name])
        for name in _SERIES:
            values = getattr(self, name)
            values.clear()
            values.extend(series[name].tolist())


_FACTS, _SERIES = ("pixels", "start", "away", "learned"), ("losses", "medians", "bits")


def _median(values: Iterable[float]) -> float:
    """The upper median, an element of the list; 0 for none."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
