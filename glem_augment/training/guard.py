"""When a run has diverged: steps that are not finite, and losses that left for good.

**Not finite.** A step whose loss or gradient is not finite is skipped, and nothing moves. `MAX_BAD_STEPS` of them in a
row, in the E-step or in the M-step, are a divergence.

**Exploded.** A divergence need not be NaN. An E-step loss counts as exploded when it exceeds

    r + max(1, |r|, 10 v)      nats per dimension

for one of two references r. The recent one is the median of the last `WINDOW` (200) losses that had not exploded; it
is used once there are `MIN` (50). The other is the untrained flow: the median of the first `START` (5) losses, or what
a uniform distribution over the pixel levels costs, bits * ln 2, if that is more. A run whose learning rate was too high
from the start has no better days to compare with. v is the median absolute difference from one of those 200 losses to
the next, a measure of noise that neither a trend nor a few spikes can raise. When `SHARE` (80) of the last `PATIENCE`
(100) losses have exploded or were not finite, the run has diverged.

The rule is meant to be wrong on the side of patience. Noise can't meet it: half of all losses lie below their median. A
slow rise is followed by the recent reference, since objectives with repulsion or an annealed weight may rise by design.
What does meet it is a sudden doubling, by more than a nat per dimension (1.44 bits), that does not heal within some 100
steps (a flow at 3.5 bits/dim then does as well as one that has learned nothing), or twice the loss of having learned
nothing.

A diverged run returns to its last good checkpoint and goes on at half the learning rates, at most `MAX_ROLLBACKS`
times.
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
WINDOW, MIN, START, PATIENCE, SHARE = 200, 50, 5, 100, 80
# A checkpoint is good if each of the last so many losses was finite and had not exploded.
CALM = 10


class DivergenceError(TrainingError):
    """The run has diverged; a return to the last good checkpoint may help."""


class LossGuard:
    """Watches the losses of the E-steps one by one. `bits` of the pixels give the cost of a uniform distribution.

    >>> guard = LossGuard(bits=8)
    >>> for _ in range(300):
    ...     guard.see(2.0)
    >>> guard.threshold()
    4.0
    """

    def __init__(self, bits: int) -> None:
        self.uniform = bits * math.log(2)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.start: list[float] = []
        self.bad: deque[bool] = deque(maxlen=PATIENCE)

    def threshold(self) -> float:
        """Losses above this have exploded, nats per dimension; infinite while there is nothing to compare with."""
        references = []
        if len(self.losses) >= MIN:
            references.append(_median(self.losses))
        if len(self.start) >= START:
            references.append(max(self.uniform, _median(self.start)))
        if not references:
            return math.inf
        noise = _median(abs(after - before) for before, after in pairwise(self.losses))
        return min(r + max(1.0, abs(r), 10 * noise) for r in references)

    def see(self, loss: float) -> None:
        """Take in the loss of one E-step, nats per dimension; NaN and infinity are allowed.

        Raises:
            DivergenceError: the losses have exploded, and stayed so.
        """
        limit, finite = self.threshold(), math.isfinite(loss)
        good = finite and loss <= limit
        self.bad.append(not good)
        if finite and len(self.start) < START:
            self.start.append(loss)
        if good:
            self.losses.append(loss)
        elif sum(self.bad) >= SHARE:
            raise DivergenceError(
                f"{sum(self.bad)} of the last {len(self.bad)} losses were above {limit:.4g} nats per dimension or not "
                f"finite (now {loss:.4g}, median of those before {_median(self.losses):.4g})"
            )

    @property
    def calm(self) -> bool:
        """Whether a diverged run may return to a checkpoint that is written now."""
        return not any(list(self.bad)[-CALM:])

    def state(self) -> tuple[dict[str, Any], Tensor]:
        """For a checkpoint: which losses were bad, as JSON, and the losses, float64 [<= START + WINDOW]."""
        facts = {"bad": "".join("x" if bad else "." for bad in self.bad), "start": len(self.start)}
        return facts, torch.tensor([*self.start, *self.losses], dtype=torch.float64)

    def load(self, facts: dict[str, Any], losses: Tensor) -> None:
        """Go on where `state` was taken."""
        count, values = int(facts["start"]), losses.tolist()
        self.start, self.losses = values[:count], deque(values[count:], maxlen=WINDOW)
        self.bad = deque((mark == "x" for mark in facts["bad"]), maxlen=PATIENCE)


def _median(values: Iterable[float]) -> float:
    """The upper median, an element of the list; 0 for none."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
