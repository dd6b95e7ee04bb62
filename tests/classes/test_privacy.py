"""The private release: accounting, sensitivity for any images, exact sums, and noise that nobody can switch off."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pickle
import random
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import mpmath
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import Tensor

from benchmarks.proof import private_audit
from glem_augment.classes import privacy as mechanism
from glem_augment.classes.privacy import (
    Privacy,
    PrivateSums,
    delta_of,
    describe,
    epsilon_of,
    promised,
    round_of,
    total,
)
from glem_augment.classes.private import private_classes
from glem_augment.errors import DataError, GLEMError

EPSILONS = (0.01, 0.05, 0.2, 1.0, 3.0, 10.0, 25.0, 50.0)
DELTAS = (1e-12, 1e-9, 1e-6, 1e-5, 1e-3)
FALSE_ALARM = 1e-10


# ---- accounting ------------------------------------------------------------------------------------------------------


def by_mpmath(mu: float, epsilon: float) -> Any:
    """The formula of Balle & Wang in 60 digits."""
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


@pytest.mark.parametrize(("epsilon", "delta"), list(itertools.product(EPSILONS, DELTAS)))
def test_mu_solves_the_formula(epsilon: float, delta: float) -> None:
    mu = Privacy(epsilon, delta, images=1).mu
    assert by_mpmath(mu * (1 - 1e-10), epsilon) < delta < by_mpmath(mu * (1 + 1e-10), epsilon)
    assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-9)
    assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(("epsilon", "delta"), list(itertools.product(EPSILONS, DELTAS)))
def test_mu_is_that_of_dp_accounting(epsilon: float, delta: float) -> None:
    """Its delta is below ours slightly under our mu, and above slightly over it: mu agrees to 1e-6."""
    losses = pytest.importorskip("dp_accounting.pld.privacy_loss_mechanism")
    mu = Privacy(epsilon, delta, images=1).mu
    low, high = (
        losses.GaussianPrivacyLoss(standard_deviation=1 / scaled).get_delta_for_epsilon(epsilon)
        for scaled in (mu * (1 - 1e-6), mu * (1 + 1e-6))
    )
    assert low < delta < high


def test_releases_add_up() -> None:
    one, five = Privacy(1, 1e-6), Privacy(1, 1e-6, images_per_person=5)
    assert total([]) == (0, 0) and total([one]) == pytest.approx((one.mu, 1))
    mu, epsilon = total([one, one])
    assert mu == pytest.approx(math.sqrt(2) * one.mu) and 1.4 < epsilon < 1.6
    # To five images, a release for one image tells five times as much.
    assert total([one, five])[0] == pytest.approx(math.hypot(5, 1) * one.mu)
    assert five.mu_per_image == five.mu / 5 and five.unit == "5 images of one person" and one.unit == "one image"
    assert epsilon_of(1e-9, 1e-6) == 0


def test_promises_out_of_range_are_refused() -> None:
    above_a_million, above_stated = (1, 1e-5), (1, 1e-5, 1, 200_000)
    for wrong in ((51,), (math.nan,), (1, 0), (1, 0.1), above_a_million, above_stated, (1, 1e-6, 0)):
        with pytest.raises(ValueError):
            Privacy(*wrong)  # type: ignore[arg-type]
    assert Privacy(1, 1e-5, images=60_000).delta == 1e-5


# ---- sensitivity -----------------------------------------------------------------------------------------------------

CLIP, DIM = 2.5, 5
NUMBERS = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 3e38, 5e-324, 1e-40, 2.5, -2.5, 2.5 * (1 - 2**-53))
HOSTILE = st.one_of(st.sampled_from(NUMBERS), st.floats(-10, 10), st.floats(width=64, allow_nan=True))
ROWS = st.lists(st.lists(HOSTILE, min_size=DIM, max_size=DIM), max_size=7)


def sums_of(u: Tensor, y: Tensor, leading: int, parts: int = 1) -> PrivateSums:
    sums = PrivateSums(3, DIM, CLIP, Privacy(1), leading)
    for rows, labels in zip(u.tensor_split(parts), y.tensor_split(parts), strict=True):
        sums.add(rows, labels)
    return sums


def exact(sums: PrivateSums) -> list[Tensor]:
    return [tensor.clone() for tensor in sums._secret()]


def tensors(release: mechanism.Release) -> list[Tensor]:
    return [release.counts, release.sums, release.seconds, release.squares]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.lists(HOSTILE, min_size=DIM, max_size=DIM), st.integers(0, DIM), st.integers(0, 7), st.integers(1, 3))
def test_one_image_changes_the_statistic_by_at_most_one(
    rows: list[list[float]], image: list[float], leading: int, place: int, chunk: int
) -> None:
    """In integers: the count by 1, sums by 2^20 in L2, second moments (svec) and squares by 2^40, in one class.

    The weights a0, a1, a2 of the parts have the norm 1, so this bounds the whole statistic. Chunks of 1 to 3 images put
    all the images after the new one into other chunks.
    """
    place = min(place, len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism, "_CHUNK", chunk)
        data = torch.tensor([*rows[:place], image, *rows[place:]], dtype=torch.float64)
        y = torch.arange(len(data)) % 2  # class 2 is empty
        others = torch.arange(len(data)) != place
        having, without = exact(sums_of(data, y, leading)), exact(sums_of(data[others], y[others], leading))
    changes = [[a.tolist() for a in (one - other).flatten(1)] for one, other in zip(
        [t.view(3, -1) for t in having], [t.view(3, -1) for t in without], strict=True)]  # fmt: skip
    counts, sums, seconds, squares = ([sum(v * v for v in row) for row in part] for part in changes)
    own = int(y[place])
    assert counts == [int(k == own) for k in range(3)]
    assert sum(sums) == sums[own] <= 2**40
    assert sum(seconds) + sum(squares) == seconds[own] + squares[own] <= 2**80
    if not all(map(math.isfinite, image)):
        assert sums[own] == seconds[own] == squares[own] == 0


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 5), st.integers(0, DIM))
def test_order_and_batches_do_not_change_the_sums(
    rows: list[list[float]], chance: Any, parts: int, leading: int
) -> None:
    data = torch.tensor(rows, dtype=torch.float64).view(-1, DIM)
    y = torch.arange(len(data)) % 3
    order = torch.tensor(chance.sample(range(len(data)), len(data)), dtype=torch.int64)
    whole, mixed = exact(sums_of(data, y, leading)), exact(sums_of(data[order], y[order], leading, parts))
    assert all(torch.equal(a, b) for a, b in zip(whole, mixed, strict=True))


def test_the_sums_of_many_images_are_exact() -> None:
    """Products in int64 give the same sums as products in float64, at the largest numbers that occur."""
    u = torch.stack([CLIP * (0.99 + 0.009 * torch.rand(20_000)), 0.1 * torch.randn(20_000)], 1)
    fixed = mechanism._fixed_point(u, CLIP)
    counts, sums, seconds, squares = exact(_added(u))
    wanted = fixed.T @ fixed
    assert int(fixed.square().sum(1).max()) <= 2**40 and int(wanted[0, 0]) > 2**54  # above what float64 can add up
    assert counts.tolist() == [20_000] and torch.equal(sums[0], fixed.sum(0)) and squares.shape == (1, 0)
    assert torch.equal(seconds[0], wanted)


def _added(u: Tensor) -> PrivateSums:
    sums = PrivateSums(1, u.shape[1], CLIP, Privacy(1))
    sums.add(u, torch.zeros(len(u), dtype=torch.int64))
    return sums


def test_clipping_keeps_directions_and_short_latents() -> None:
    u = torch.tensor([[0.3, -0.4, 0, 0, 0], [3e30, -4e30, 0, 0, 0], [1.5, -2, 0, 0, 0]], dtype=torch.float32)
    found = mechanism._fixed_point(u, CLIP).double() / 2**20 * CLIP
    want = torch.tensor([[0.3, -0.4], [1.5, -2.0], [1.5, -2.0]]).double()
    torch.testing.assert_close(found[:, :2], want, rtol=0, atol=1e-5)


# ---- noise -----------------------------------------------------------------------------------------------------------


def assert_variance_is_one(x: Tensor) -> None:
    """The chi-square test of known mean and variance."""
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], x.numel())
    assert low < float(x.square().sum()) < high


@pytest.mark.parametrize(
    ("privacy", "shares", "part"),
    [(Privacy(1), mechanism.SHARES, 1.0), (Privacy(3, images_per_person=3), (1, 1, 2), 0.25)],
)
def test_the_noise_has_the_stated_deviation(privacy: Privacy, shares: tuple[float, ...], part: float) -> None:
    """By part, from 50 releases of 50 classes: chi-square bounds catch 9 % in the deviation of the least numerous."""
    classes, dim, leading = 50, 10, 7
    off = torch.tril_indices(leading, leading, -1)
    u, y = torch.randn(200, dim), torch.arange(200) % classes
    mu = privacy.mu / privacy.images_per_person * math.sqrt(part)
    sd = [1 / mu / math.sqrt(share / sum(shares)) for share in shares]
    found: dict[str, list[Tensor]] = {}
    for _ in range(50):
        sums = PrivateSums(classes, dim, CLIP, privacy, leading, shares, part)
        sums.add(u, y)
        units = (1, 2**-20 * CLIP, 2**-40 * CLIP**2, 2**-40 * CLIP**2)
        truth = [t.double() * unit for t, unit in zip(exact(sums), units, strict=True)]
        out = sums.release()
        counts, first, seconds, squares = (a - b for a, b in zip(tensors(out), truth, strict=True))
        assert torch.equal(seconds, seconds.mT)
        for name, noise in {
            "counts": counts / sd[0],
            "sums": first / sd[1] / CLIP,
            "diagonals": seconds.diagonal(dim1=1, dim2=2) / sd[2] / CLIP**2,
            "off diagonals": seconds[:, off[0], off[1]] / sd[2] * math.sqrt(2) / CLIP**2,
            "squares": squares / sd[2] / CLIP**2,
        }.items():
            found.setdefault(name, []).append(noise.flatten())
    for noises in found.values():
        assert_variance_is_one(torch.cat(noises))
    every = torch.stack([torch.cat(parts) for parts in zip(*found.values(), strict=True)])  # [50, numbers of a release]
    assert stats.kstest(every.flatten().numpy(), "norm").pvalue > FALSE_ALARM
    # Numbers of one release are independent: no two of the first classes' sums go together.
    assert torch.corrcoef(every[:, :150].T).fill_diagonal_(0).abs().max() < 0.95
    assert (out.sd_count, out.sd_sum, out.sd_second) == pytest.approx((sd[0], sd[1] * CLIP, sd[2] * CLIP**2))


def test_normal_numbers_are_normal_in_the_tails() -> None:
    x = mechanism._gaussian(400_000)
    assert x.dtype == torch.float64 and len(x.unique()) == len(x)
    assert_variance_is_one(x)
    assert stats.kstest(x.numpy(), "norm").pvalue > FALSE_ALARM
    for edge in (-4.0, -2.0, 0.0, 2.0, 4.0):
        beyond = int((x > edge).sum())
        assert stats.binomtest(beyond, len(x), stats.norm.sf(edge)).pvalue > FALSE_ALARM
    assert len(mechanism._gaussian(0)) == 0


def test_both_tails_of_the_noise_reach_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """106 bits below 1/2: zeros are the least probability, 2^-108, on the positive side."""
    monkeypatch.setattr(mechanism.os, "urandom", bytes)
    assert float(mechanism._gaussian(1)) == pytest.approx(stats.norm.isf(2.0**-108), rel=1e-12)


def test_the_normal_quantile_is_accurate() -> None:
    """To 3e-15 down to the least probability that occurs: the docstring's step 6 relies on it."""
    for p in [0.75 * 2.0**-e for e in range(1, 107, 3)] + [2.0**-108, math.exp(-2), 0.5 - 1e-9]:
        found = float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))
        with mpmath.workdps(50):
            z = mpmath.mpf(found)
            error = (mpmath.ncdf(z) - mpmath.mpf(p)) / mpmath.npdf(z)
        assert abs(error) < 3e-15


def test_released_numbers_lie_on_a_grid_of_the_noise() -> None:
    """The steps are powers of two from sd/256 to sd/128, so that low bits tell nothing."""
    for sd in (0.9, 4.0, 31.0, 1e5):
        step = 2.0 ** (math.floor(math.log2(sd)) - 7)
        found = mechanism._noisy(torch.full((200,), 12345, dtype=torch.int64), 40, sd) / step
        assert sd / 256 <= step <= sd / 128 and torch.equal(found, found.round()) and len(found.unique()) > 50


def test_noise_comes_from_the_operating_system_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "os", os)  # without the seed that other tests have
    text = Path(mechanism.__file__).read_text(encoding="utf-8")
    assert not re.search(r"manual_seed|Generator|generator|randn|randint|default_rng|np\.|numpy|import random", text)
    assert not re.search(r"[\"'(, ]seed\b\s*[=:,)]", text) and "os.urandom" in text
    torch.manual_seed(0)
    random.seed(0)
    one = _added(torch.ones(3, 2)).release()
    torch.manual_seed(0)
    random.seed(0)
    other = _added(torch.ones(3, 2)).release()
    assert not torch.equal(one.seconds, other.seconds) and not torch.equal(one.sums, other.sums)


def test_the_audit_catches_halved_noise_and_accepts_ours() -> None:
    """At epsilon 10, 150 releases: our mu is 1.85, the mistake's 3.7, and a false alarm has the chance 1e-6."""
    clip, images = 4.0, torch.randn(50, private_audit.DIM, dtype=torch.float64)
    far = {"far": private_audit.canaries(images, clip)["far"]}
    privacy = Privacy(10)
    for halved in (False, True):
        scores = private_audit.private_scores(images, far, privacy, clip, 150, halved)["far"]
        bound = private_audit.bound_of_mu(*scores, error=1e-6)
        assert (bound > privacy.mu) == halved and bound > 0


def test_bounds_of_the_audit_hold_for_known_scores() -> None:
    """Normal scores one deviation apart are 1-GDP; certain ones are bounded by their number."""
    points = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)[torch.randperm(1000)]
    without = torch.special.ndtri(points)
    assert 0.75 < private_audit.bound_of_mu(without, without + 1, 0.0125) < 1
    assert 0.5 < private_audit.bound_of_any(without, without + 1, 1e-6, 0.0125) < epsilon_of(1, 1e-6)
    assert private_audit.bound_of_any(without, without, 1e-6, 0.0125) < 0.1
    sure = private_audit.bound_of_any(torch.zeros(1000).double(), torch.ones(1000).double(), 1e-6, 0.0125)
    assert 4 < sure < math.log(1000)


# ---- one release -----------------------------------------------------------------------------------------------------


def test_sums_are_released_once_and_never_copied() -> None:
    sums = _added(torch.ones(3, 2))
    secret = sums._secret()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(sums)
    sums.release()
    assert not any(tensor.any() for tensor in secret)
    with pytest.raises(GLEMError):
        sums.release()
    with pytest.raises(GLEMError):
        sums.add(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))


def test_a_release_that_fails_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = _added(torch.ones(3, 2))
    secret = sums._secret()
    monkeypatch.setattr(mechanism, "_MOST", 2)
    with pytest.raises(DataError, match="divide it"):
        sums.release()
    assert not any(tensor.any() for tensor in secret)
    with pytest.raises(GLEMError, match="released already"):
        sums.release()


def test_rank_0_alone_draws_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int) -> bytes:
        raise AssertionError("a second rank drew noise")

    theirs = _added(torch.ones(3, 2)).release()
    sent = tensors(theirs)
    sent = [sent[0], sent[1] / CLIP, sent[2] / CLIP**2, sent[3]]
    monkeypatch.setattr(mechanism.os, "urandom", refuse)
    monkeypatch.setattr(mechanism.distributed, "is_primary", lambda: False)
    monkeypatch.setattr(mechanism.distributed, "gather", lambda thing: [sent, thing])
    ours = _added(torch.ones(3, 2)).release()
    torch.testing.assert_close(ours.seconds, theirs.seconds)


def test_wrong_batches_and_settings_are_refused() -> None:
    u, y = torch.ones(3, 2), torch.zeros(3).long()
    for rows, labels in ((torch.ones(3, 4), y), (u.long(), y), (u, y[:2]), (u, y.double()), (u, y + 1), (u, y - 1)):
        with pytest.raises(ValueError):
            PrivateSums(1, 2, CLIP, Privacy(1)).add(rows, labels)
    drowned = Privacy(0.01, 1e-12, images_per_person=1000)
    for name, value in (
        *(("clip", 0), ("clip", math.inf), ("dim", 0), ("num_classes", 0), ("part", 0), ("part", 1.5)),
        *(("shares", (0.5, 0.5)), ("shares", (0, 0, 0)), ("shares", (0.5, -0.1, 1)), ("privacy", drowned)),
    ):
        with pytest.raises(ValueError):
            PrivateSums(**{"num_classes": 2, "dim": 3, "clip": 1.0, "privacy": Privacy(1), name: value})


# ---- stored numbers --------------------------------------------------------------------------------------------------


def test_a_record_must_follow_from_its_rounds() -> None:
    privacy = Privacy(2, images_per_person=2)
    rounds = [round_of("sums", privacy, 0.4), round_of("histogram", privacy, 0.6)]
    facts = json.loads(json.dumps(describe(privacy, rounds)))
    assert promised(facts) == privacy and facts["unit"] == "2 images of one person" and facts["version"]
    assert math.hypot(*(2 / each["noise"] for each in facts["rounds"])) == pytest.approx(privacy.mu)
    for wrong in ([], rounds[:1], [*rounds, rounds[0]], [{"noise": -1.0}], [{}], None):
        with pytest.raises(GLEMError):
            promised(facts | {"rounds": wrong})


def test_a_statistic_with_the_share_zero_is_not_released() -> None:
    u, y = torch.randn(20, DIM), torch.arange(20) % 3
    for shares, sizes in (((1, 2, 0), (3, 3 * DIM, 0, 0)), ((0, 0, 1), (0, 0, 3 * 9, 3 * (DIM - 3)))):
        sums = PrivateSums(3, DIM, CLIP, Privacy(5), 3, shares)
        sums.add(u, y)
        assert tuple(tensor.numel() for tensor in tensors(sums.release())) == sizes


@pytest.mark.parametrize(("images", "cells"), [(20, None), (60, None), (60, 2), (300, None), (2000, None)])
def test_every_branch_of_a_fit_spends_the_promise(images: int, cells: int | None) -> None:
    """Classes of each size have other coordinates, correlations and parts of mu^2."""
    y = torch.arange(3).repeat_interleave(images)
    prior = torch.linspace(2, 0.2, 40, dtype=torch.float64)
    z = (torch.randn(len(y), 40) * prior.sqrt() + 2 * torch.nn.functional.one_hot(y, 40)).float()
    found = private_classes(z, y, 3, prior, 10.0, Privacy(10), cells)
    assert promised(found.privacy) == Privacy(10) and found.classes.modes is not None
    drawn = found.classes.modes.sample(y, 1.0, torch.Generator().manual_seed(0))
    wide = 100 if images == 20 else 3  # most classes of 20 images are noise
    assert drawn.isfinite().all() and 1 / wide < float(drawn.square().sum() / z.square().sum()) < wide


def _needed(classes: int, images: int) -> int:
    """How many images of each class a refusal names; 0: the fit was not refused."""
    y = torch.arange(classes).repeat_interleave(images)
    try:
        private_classes(torch.randn(len(y), 40), y, classes, torch.ones(40).double(), 10.0, Privacy(1), None)
    except DataError as refused:
        return int(re.findall(r"(\d+) would be enough", str(refused))[0])
    return 0


@pytest.mark.parametrize(("classes", "images"), [(2, 20), (1, 20)])
def test_the_number_that_a_refusal_names_is_enough(classes: int, images: int) -> None:
    needed = max(_needed(classes, images) for _ in range(5))
    assert needed > images
    assert sum(_needed(classes, needed) > 0 for _ in range(40)) <= 10  # the noise refuses one or two


@pytest.mark.slow
def test_two_ranks_release_once(tmp_path: Path) -> None:
    """Both ranks get the same numbers, from the images of both, with the noise of one."""
    import subprocess

    (tmp_path / "ranks.py").write_text(
        "import sys, torch\n"
        "from glem_augment import distributed\n"
        "from glem_augment.classes.privacy import Privacy, PrivateSums\n"
        "distributed.start('cpu')\n"
        "found = []\n"
        "for _ in range(300):\n"
        "    sums = PrivateSums(1, 2, 1.0, Privacy(50))\n"
        "    sums.add(torch.full((100, 2), 0.5), torch.zeros(100, dtype=torch.int64))\n"
        "    release = sums.release()\n"
        "    found.append((release.counts[0] - 200) / release.sd_count)\n"
        "torch.save(torch.stack(found), f'{sys.argv[1]}/{distributed.rank()}.pt')\n"
    )
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    subprocess.run([*command, str(tmp_path / "ranks.py"), str(tmp_path)], check=True, timeout=250)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one, other)
    assert_variance_is_one(one)
