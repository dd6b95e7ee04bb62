"""Differential privacy by Gaussian noise.

The sum of statistics of which one image changes at most 1 in L2, plus N(0, (m / mu)^2) in every element, is mu-GDP with
respect to the m images of one person (Dong, Roth & Su 2022). It is (epsilon, delta)-DP exactly when
delta >= Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) (Balle & Wang 2018). Releases of the same images are
together sqrt(sum mu^2)-GDP. `privacy.sums` has the statistics, the whole proof, and the references.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glem_augment.checks import check_number, check_whole

__all__ = ["Privacy", "delta_of", "deviation", "epsilon_of", "noisy", "total"]

_LARGEST_SD = 2.0**17  # in images: 17 + 40 bits, times a quantile of at most 2^4, stay below 2^62
_MOST_UNSTATED = 10**6  # images; for so many the default delta is enough


# ---- accounting ------------------------------------------------------------------------------------------------------


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta for which a mu-GDP mechanism is (epsilon, delta)-DP (Balle & Wang 2018, Theorem 8).

    mu > 0 and epsilon >= 0. Logarithms keep it accurate where both terms are tiny or nearly cancel.
    """
    points = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    a, b = torch.special.log_ndtr(points).tolist()
    return -math.exp(a) * math.expm1(min(epsilon + b - a, 0.0))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon for which a mu-GDP mechanism is (epsilon, delta)-DP. mu > 0; delta in (0, 1)."""
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    # There the first term alone is below delta.
    largest = mu * (mu / 2 + math.sqrt(2 * math.log(1 / delta)))
    return _bisect(lambda epsilon: delta_of(mu, epsilon) > delta, 0.0, largest)[1]


def _bisect(below: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Neighbouring floats around the point from which on `below` is false."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


@dataclass(frozen=True)
class Privacy:
    """A promise: (epsilon, delta)-differential privacy with respect to adding or removing the images of one person.

    Args:
        epsilon: from 0.01 to 50. The probability of any outcome changes by at most a factor e^epsilon ...
        delta: ... plus at most this; from 1e-12 to 1e-3, and far below one over the number of images.
        images_per_person: m, the most images that one person has in the set. The noise is m times as large.
        images: a public number, the most images that the set may have; None: a million. A delta above one over it could
            show one of them.

    ValueError: a value is out of range. TypeError: it is not a number.
    """

    epsilon: float
    delta: float = 1e-6
    images_per_person: int = 1
    images: int | None = None

    def __post_init__(self) -> None:
        # As Python's numbers: 16-bit floats would round mu.
        object.__setattr__(self, "epsilon", check_number("epsilon", self.epsilon, 0.01, 50))
        object.__setattr__(self, "delta", check_number("delta", self.delta, 1e-12, 1e-3))
        object.__setattr__(self, "images_per_person", check_whole("images_per_person", self.images_per_person, 1))
        most = _MOST_UNSTATED if self.images is None else check_whole("images", self.images, 1)
        if self.delta * most > 1 + 1e-9:
            raise ValueError(
                f"delta={self.delta:g} is above one over {most:,} images: give at most {1 / most:.0e}, or state "
                "how many images there are at most (images=, --images)"
            )

    @cached_property
    def mu(self) -> float:
        """The largest mu whose Gaussian mechanism keeps the promise, accurate to about 1e-12."""
        return _bisect(lambda mu: delta_of(mu, self.epsilon) <= self.delta, 0.0, 100.0)[0]

    @property
    def mu_per_image(self) -> float:
        """mu / m, what one image may spend: the noise on a statistic with sensitivity 1 has sd m / mu."""
        return self.mu / self.images_per_person

    @property
    def unit(self) -> str:
        """Whose presence is hidden: "one image" or "m images of one person"."""
        return "one image" if self.images_per_person == 1 else f"{self.images_per_person} images of one person"


def total(privacies: Iterable[Privacy], delta: float = 1e-6) -> tuple[float, float]:
    """mu, and epsilon at `delta`, of several releases of the same images: mu^2 adds up (Dong, Roth & Su 2022).

    The unit is the largest one: the most images of one person that any of the releases protects.
    """
    privacies = list(privacies)
    if not privacies:
        return 0.0, 0.0
    largest = max(privacy.images_per_person for privacy in privacies)
    mu = largest * math.hypot(*(privacy.mu_per_image for privacy in privacies))
    return mu, epsilon_of(mu, check_number("delta", delta, 0, 0.1, open_low=True))


# ---- noise -----------------------------------------------------------------------------------------------------------


def _gaussian(count: int) -> Tensor:
    """Standard normal numbers float64 [count] from the operating system's entropy, by the inverse of the normal CDF.

    A random sign and a 106-bit uniform number below 1/2 give both tails the full relative precision of float64.
    """
    words = torch.frombuffer(bytearray(os.urandom(16 * max(count, 1))), dtype=torch.int64).view(2, -1)[:, :count]
    high, low = (words & (2**53 - 1)).double()
    tail = torch.special.ndtri((high + (low + 0.5) * 2.0**-53) * 2.0**-54)
    return torch.where(words[0] < 0, tail, -tail)


def noisy(exact: Tensor, bits: int, sd: float) -> Tensor:
    """`exact` int64 in units of 2^-bits plus noise of deviation `sd`, rounded to steps of sd/256 to sd/128, float64."""
    units = sd * 2.0**bits
    noise = (_gaussian(exact.numel()).view_as(exact) * units).round().long()
    drop = max(0, math.floor(math.log2(units)) - 7)
    return ((exact + noise + (1 << drop >> 1)) >> drop).double() * 2.0 ** (drop - bits)


def deviation(privacy: Privacy, part: float) -> float:
    """The noise's deviation on a statistic with sensitivity 1, whose release spends `part` of the promise's mu^2."""
    sd = 1 / (privacy.mu_per_image * math.sqrt(check_number("part", part, 0, 1, open_low=True)))
    if sd > _LARGEST_SD:
        raise ValueError(f"the noise would exceed {_LARGEST_SD:,.0f} images: raise epsilon, or lower images_per_person")
    return sd
