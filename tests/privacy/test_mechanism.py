"""The private release: accounting, sensitivity for any images, exact sums, and noise that nobody can switch off."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from typing import Any

import hypothesis.strategies as st
import mpmath
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import Tensor

from glem_augment.errors import DataError, GLEMError
from glem_augment.privacy import Privacy, delta_of, epsilon_of, mechanism, sums, total
from glem_augment.privacy.record import describe, promise, promised
from glem_augment.privacy.sums import PrivateSums, fixed_point

FALSE_ALARM = 1e-10
CLIP, DIM = 2.5, 5


@pytest.mark.parametrize(("epsilon", "delta"), list(itertools.product((0.01, 1.0, 10.0, 50.0), (1e-12, 1e-6, 1e-3))))
def test_mu_solves_the_formula(epsilon: float, delta: float) -> None:
    """Balle & Wang's formula in 60 digits."""

    def exact(m: Any, e: Any) -> Any:
        with mpmath.workdps(60):
            m, e = mpmath.mpf(m), mpmath.mpf(e)
            return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)

    mu = Privacy(epsilon, delta, images=1).mu
    assert exact(mu * (1 - 1e-10), epsilon) < delta < exact(mu * (1 + 1e-10), epsilon)
    assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-9)
    assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-9)


def test_releases_add_up_and_promises_out_of_range_are_refused() -> None:
    one, five = Privacy(1, 1e-6), Privacy(1, 1e-6, images_per_person=5)
    assert total([]) == (0, 0) and total([one]) == pytest.approx((one.mu, 1))
    assert total([one, five])[0] == pytest.approx(math.hypot(5, 1) * one.mu)
    assert five.mu_per_image == five.mu / 5 and five.unit == "5 images of one person"
    for wrong in ((51,), (math.nan,), (1, 0), (1, 0.01, 1, 10), (1, 1e-5), (1, 1e-5, 1, 200_000), (1, 1e-6, 0)):
        with pytest.raises(ValueError):
            Privacy(*wrong)  # type: ignore[arg-type]
    for privacy, part in ((one, 0), (one, 1.5), (Privacy(0.01, images_per_person=1000), 1)):
        with pytest.raises(ValueError):
            mechanism.deviation(privacy, part)


NUMBERS = (0.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 2.5, -2.5, 2.5 * (1 - 2**-53))
HOSTILE = st.one_of(st.sampled_from(NUMBERS), st.floats(-10, 10), st.floats(width=64, allow_nan=True))
ROW = st.lists(HOSTILE, min_size=DIM, max_size=DIM)


def added(statistic: Any, u: Tensor, y: Tensor, slots: int = 3) -> PrivateSums:
    found = PrivateSums(statistic, slots, u.shape[1], CLIP, Privacy(10), 1.0)
    found.add(u, y)
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, max_size=6), ROW, st.integers(0, 6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_one_image_changes_a_statistic_by_at_most_one(
    rows: list[list[float]], image: list[float], place: int, chunk: int, chance: Any
) -> None:
    """In integers: counts by 1, sums by 2^20, scatter by 2^40 in L2, in one slot; order and batches leave no trace."""
    place = min(place, len(rows))
    data = torch.tensor([*rows[:place], image, *rows[place:]], dtype=torch.float64)
    y = torch.arange(len(data)) % 2
    others = torch.arange(len(data)) != place
    order = torch.tensor(chance.sample(range(len(data)), len(data)))
    for statistic, most in (("counts", 1), ("sums", 2**20), ("scatter", 2**40)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums, "_CHUNK", chunk)
            having, without = added(statistic, data, y)._secret(), added(statistic, data[others], y[others])._secret()
        assert torch.equal(having, added(statistic, data[order], y[order])._secret())
        change = (having - without).view(3, -1).tolist()
        moved = [sum(v * v for v in row) for row in change]
        assert sum(moved) == moved[int(y[place])] <= most**2
        if not all(map(math.isfinite, image)):
            assert sum(moved) == (statistic == "counts")


def test_clipping_keeps_directions_and_short_latents() -> None:
    u = torch.tensor([[0.3, -0.4], [3e30, -4e30], [1.5, -2]])
    want = torch.tensor([[0.3, -0.4], [1.5, -2.0], [1.5, -2.0]]).double()
    torch.testing.assert_close(fixed_point(u, CLIP).double() / 2**20 * CLIP, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("statistic", ["counts", "sums", "scatter"])
def test_the_noise_has_the_stated_deviation(statistic: Any) -> None:
    """By a chi-square test of 3,000 numbers or more, about the sums of the statistic of each image."""
    slots, privacy, part = 50, Privacy(3, images_per_person=3), 0.25
    u, y = torch.randn(200, DIM), torch.arange(200) % slots
    v = fixed_point(u, CLIP).double() / 2**20 * CLIP
    each = {"counts": v.new_ones(200), "sums": v, "scatter": v[:, :, None] * v[:, None]}[statistic]
    truth = each.new_zeros(slots, *each.shape[1:]).index_add_(0, y, each)
    sd = 3 / privacy.mu / math.sqrt(part) * {"counts": 1, "sums": CLIP, "scatter": CLIP**2}[statistic]
    noise = []
    for _ in range(60):
        found = PrivateSums(statistic, slots, DIM, CLIP, privacy, part)
        found.add(u, y)
        assert found.sd == pytest.approx(sd)
        noise.append((found.release() - truth) / sd)
    every = torch.stack(noise)
    if statistic == "scatter":
        assert torch.equal(every, every.mT)
        low = torch.tril_indices(DIM, DIM, -1)
        every = torch.cat([every[..., low[0], low[1]] * math.sqrt(2), every.diagonal(dim1=-2, dim2=-1)], -1)
    least, most = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], every.numel())
    assert least < float(every.square().sum()) < most
    assert stats.kstest(every.flatten().numpy(), "norm").pvalue > FALSE_ALARM


def test_noise_comes_from_the_operating_system_and_lies_on_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for sd in (0.9, 31.0, 1e5):
        step = 2.0 ** (math.floor(math.log2(sd)) - 7)
        found = mechanism.noisy(torch.full((200,), 12345, dtype=torch.int64), 40, sd) / step
        assert sd / 256 <= step <= sd / 128 and torch.equal(found, found.round()) and len(found.unique()) > 50
    monkeypatch.setattr(mechanism.os, "urandom", bytes)  # zeros: the least probability, 2^-108
    assert float(mechanism._gaussian(1)) == pytest.approx(stats.norm.isf(2.0**-108), rel=1e-12)
    # The sum is rounded with its noise: a sum that is rounded alone could change by a whole step more.
    exact, noise = torch.arange(1000) * 2**33, torch.linspace(-3, 3, 1000).double()
    monkeypatch.setattr(mechanism, "_gaussian", lambda count: noise)
    assert float((mechanism.noisy(exact, 40, 31.0) - exact / 2**40 - 31 * noise).abs().max()) <= 0.125 / 2 + 1e-9


def test_numbers_stay_exact() -> None:
    square = 2 ** (2 * sums._BITS)
    assert sums._CHUNK * square <= 2**53 and (sums._MOST + 16 * mechanism._LARGEST_SD) * square < 2**63


def test_sums_are_released_once_never_copied_and_a_failure_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    found = added("sums", torch.ones(3, 2), torch.zeros(3).long())
    secret = found._secret()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(found)
    monkeypatch.setattr(sums, "_MOST", 2)
    with pytest.raises(DataError, match="divide it"):
        found.release()
    assert not secret.any()
    for again in (found.release, lambda: found.add(torch.ones(1, 2), torch.zeros(1).long())):
        with pytest.raises(GLEMError, match="released already"):
            again()


def test_rank_0_alone_draws_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int) -> bytes:
        raise AssertionError("a second rank drew noise")

    monkeypatch.setattr(mechanism.os, "urandom", refuse)
    monkeypatch.setattr(sums.distributed, "is_primary", lambda: False)
    monkeypatch.setattr(sums.distributed, "gather", lambda thing: [torch.ones(3, 2).double(), thing])
    assert bool((added("sums", torch.ones(3, 2), torch.arange(3)).release() == CLIP).all())


def test_a_record_must_follow_from_its_rounds() -> None:
    privacy = Privacy(2.25, images_per_person=2)
    rounds = [{"release": name, "noise": mechanism.deviation(privacy, part)} for name, part in (("a", 0.4), ("b", 0.6))]
    facts = json.loads(json.dumps(describe(privacy, rounds)))
    assert promised(facts) == privacy and facts["unit"] == "2 images of one person"
    assert "(2.25, 1e-06)" in promise(facts)
    for wrong in ([], rounds[:1], [*rounds, rounds[0]], [{"noise": -rounds[0]["noise"]}, rounds[1]], [{}], None):
        with pytest.raises(GLEMError):
            promised(facts | {"rounds": wrong})
    for lie in ({"epsilon": 2.24}, {"mu": 0.999 * facts["mu"]}, {"images_per_person": 1}, {"unit": "one image"}):
        with pytest.raises(GLEMError):
            promised(facts | lie)
    with pytest.raises(GLEMError):
        describe(privacy, rounds[:1])
    with pytest.raises(GLEMError, match="unknown entries: note"):
        promised(facts | {"note": "image 7 is there"})
