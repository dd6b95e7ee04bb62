"""What arguments may be: names, limits and checks, for the help of the command line as well; torch is never imported.

Each error names the argument, its value and the allowed values.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Preset = Literal[
    "mef_tiny", "mef_small", "mef_cifar", "mef_glem", "glow_tiny", "glow_fast", "latent", "identity", "stationary"
]
DrawSource = Literal["gaussian", "rfcm", "mixup"]  # the source of a SyntheticDataset's latents
Format = Literal["imagefolder", "webdataset"]  # of an export
PolicyName = Literal["mixup", "noise", "adversarial"]  # how GLEMAugment moves latents
Memory = Literal["stored", "recomputed"]  # how training keeps a flow's activations

PRESET_NAMES, SOURCES, FORMATS = (get_args(kind) for kind in (Preset, DrawSource, Format))
DEFAULT_MODES = 64  # principal modes per class
# Without psi the class variances start at the first number and stay above the second, a share of the first.
INITIAL_VARIANCE, LOWEST_SHARE = 0.3, 0.1
HIGHEST_TEMPERATURE = 1e4  # of a posterior; the lowest is 1
MAX_PARTS = 256  # of a class


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
