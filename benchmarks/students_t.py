"""Student's t distribution, for the intervals and tests of the benchmarks."""

from __future__ import annotations

import math


def beyond(t: float, freedom: int) -> float:
    """Probability of being farther from 0 than t, with so many degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    inside = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))


def quantile(freedom: int, level: float = 0.05) -> float:
    """The t that is exceeded, to both sides together, with probability ``level``."""
    low, high = 0.0, 1.0
    while beyond(high, freedom) > level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle, freedom) > level else (low, middle)
    return high
