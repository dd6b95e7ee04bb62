"""Checks of arguments.

Each error names the argument, its value and the allowed values.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}{closest(value, allowed)}"
        )


def closest(word: object, known: Iterable[str]) -> str:
    """`; did you mean X?` with the known word closest to `word`, or nothing if none is close."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_number(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """`value`, a number of Python or NumPy, as a float. TypeError: no number. ValueError: out of range.

    It must be finite and in [low, high], or in (low, high] with `open_low`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if (low < value if open_low else low <= value) and value <= high and math.isfinite(value):
        return value
    allowed = f"finite and {'above' if open_low else 'at least'} {low:g}"
    if high < math.inf:
        allowed = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_whole(name: str, value: object, low: int, high: float = math.inf) -> int:
    """`value`, an integer of Python or NumPy, as an int. TypeError: no int. ValueError: below `low`, over `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if int(value) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    return int(value)
