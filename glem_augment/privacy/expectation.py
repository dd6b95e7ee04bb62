"""What a recipient can expect of a private fit, from public numbers alone, before anything is spent."""

from __future__ import annotations


def temperature(size: float) -> float:
    return 1.0
