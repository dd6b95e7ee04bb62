"""The guard against divergence of a run."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from statistics import median_high
from typing import Any

import torch
from torch import Tensor

from glem_augment.codec.codec import Codec
from glem_augment.errors import TrainingError

SPAN, WINDOW = 25, 500  # losses of a median, and medians whose lowest is the best
MAX_BAD_STEPS, PATIENCE = 10, 100  # steps in a row, not finite or away, that make a divergence
START = 5  # losses before the guard has something to compare with
CALM = 10  # steps in a row that were not away make a checkpoint good


class DivergenceError(TrainingError):
    """The run has diverged; a rollback to the last good checkpoint may help."""


def independent_pixels(x: Tensor, bits: int) -> float:
    """Bits/dim of independent pixels: the mean entropy of the channels' histograms.

    One histogram serves all positions of a channel. A histogram per position would suit aligned images better, but it
    takes more images than many sets have. x is uint8 [N,C,H,W], and its top `bits` bits count.
    """
    channels = (x >> (8 - bits)).transpose(0, 1).flatten(1).long()
    shares = torch.stack([channel.bincount(minlength=2**bits) for channel in channels]) / channels.shape[1]
    return float(torch.special.entr(shares.double()).sum(1).mean() / math.log(2))


def independent_latents(codec: Codec) -> float:
    """Bits per number, if the codec's numbers are independent standard normal."""
    return 0.5 * math.log2(2 * math.pi * math.e) - float(codec.logdet()) / (math.log(2) * math.prod(codec.shape))


class LossGuard:
    """Detects that a run has diverged, from medians of the last 25 steps, which a few spikes can't move.

    A step that is not finite counts as infinite. A run is away in two cases:

    - its loss exceeds b + max(1, |b|, 10 v). b is the lowest median of the last 500 steps. v, the median absolute
      difference from one loss to the next, measures noise: neither a trend nor a few spikes can raise it;
    - its likelihood is worse, by a bit per dimension, than uniform noise and than the untrained flow. Once it was
      better than independent pixels, the limit is halfway from independent pixels to uniform noise. Repulsion of the
      classes may cost some likelihood.

    A run has diverged after 100 steps away in a row, or 10 steps in a row that were not finite. Neither noise nor a
    slow rise leads to this.
    """

    def __init__(self, bits: int) -> None:
        self.uniform, self.pixels = float(bits), math.inf  # bits/dim of uniform noise, of independent pixels once known
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
        changes = [abs(after - before) for before, after in pairwise(finite)] or [0.0]
        return best + max(1.0, abs(best), 10 * median_high(changes))

    def see(self, loss: float, bits: float) -> None:
        """Add one E-step: its loss, nats per dimension, and its likelihood, bits/dim. DivergenceError: it has diverged.

        NaN and infinity are allowed.
        """
        good = math.isfinite(loss)
        self.losses.append(loss if good else math.inf)
        self.bits.append(bits if good else math.inf)
        recent = list(self.losses)[-SPAN:]
        if recent[-MAX_BAD_STEPS:] == [math.inf] * MAX_BAD_STEPS:
            raise DivergenceError(f"{MAX_BAD_STEPS} steps in a row were not finite")
        if len(recent) < START:
            return
        now, limit, likelihood = median_high(recent), self.limit(), median_high(self.bits)
        if not self.start and likelihood < math.inf:
            self.start = likelihood
        most = (self.pixels + self.uniform) / 2 if self.learned else max(self.uniform, self.start) + 1
        self.learned = self.learned or likelihood < self.pixels < math.inf
        self.away = self.away + 1 if now > limit or likelihood > most else 0
        self.medians.append(now)
        if self.away >= PATIENCE:
            if now > limit:
                raise DivergenceError(f"the loss stays high: {now:.4g} nats/dim, after {min(self.medians):.4g}")
            raise DivergenceError(
                f"the flow has become worse than independent pixels: {likelihood:.4g} bits/dim, not {self.pixels:.4g}"
            )

    @property
    def calm(self) -> bool:
        """Whether a diverged run may return to a checkpoint that is written now."""
        return not self.away and all(loss <= self.limit() for loss in list(self.losses)[-CALM:] if self.medians)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: facts as JSON, and series, which may hold infinity, as float64 tensors."""
        facts = {name: getattr(self, name) for name in ("uniform", "pixels", "start", "away", "learned")}
        series = {"losses": self.losses, "medians": self.medians, "bits": self.bits}
        return facts, {name: torch.tensor(values, dtype=torch.float64) for name, values in series.items()}

    def load(self, facts: dict[str, Any], series: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for name in ("uniform", "pixels", "start", "away", "learned"):
            setattr(self, name, facts[name])
        for name in ("losses", "medians", "bits"):
            setattr(self, name, deque(series[name].tolist(), getattr(self, name).maxlen))
