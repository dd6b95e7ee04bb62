"""95 % intervals of the mean of a few accuracies (Student's t)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Two-sided 97.5 % points of Student's t for 1 to 9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of 2 to 10 values."""
    return _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def difference(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The mean difference of two rows' `accuracies` over the same seeds, and half of its 95 % interval."""
    each = [a - b for a, b in zip(row["accuracies"], other["accuracies"], strict=True)]
    return statistics.mean(each), interval(each)
