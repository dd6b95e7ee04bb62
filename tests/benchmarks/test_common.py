"""Intervals and corrections that every table uses."""

from __future__ import annotations

import math

import pytest

from benchmarks.common import holm, interval


def test_an_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.seeds, found.clear) == (2.0, 3, False)
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert found.text() == "2.0 ± 2.5" and found.text(0, sign=True) == "+2 ± 2"
    assert found.chance == pytest.approx(0.0742, abs=1e-4)
    assert interval([1.0]).text() == "1.0 (one seed)" and not interval([1.0]).clear


def test_holm_multiplies_by_the_number_of_rows_that_are_left() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
