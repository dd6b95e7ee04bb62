"""Class Gaussians and their divergences, against torch.distributions and explicit loops."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.latent.kld import kld_class_sums, kld_matrix, kld_pair_sum

PSIS = [(0.5, 0.2, 0.05), (5.0, 0.2, 0.05), None]


def random_gaussians(k: int, d: int, psi=PSIS[0], dtype: torch.dtype = torch.float64) -> ClassGaussians:
    gaussians = ClassGaussians(k, d, psi).to(dtype)
    with torch.no_grad():
        gaussians.mu.copy_(torch.randn(k, d))
        gaussians.s.copy_(torch.randn(k, d) * 4 if psi is not None else 0.05 + torch.rand(k, d))
    return gaussians


def reference(gaussians: ClassGaussians) -> list[Independent]:
    var = gaussians.variance()
    return [Independent(Normal(m, v.sqrt()), 1) for m, v in zip(gaussians.mu, var, strict=True)]


@pytest.mark.parametrize("psi", PSIS)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (2, 7), (5, 40)])
def test_log_prob_equals_torch_distributions(k: int, d: int, psi) -> None:
    gaussians, z = random_gaussians(k, d, psi), torch.randn(9, d, dtype=torch.float64)
    want = torch.stack([n.log_prob(z) for n in reference(gaussians)], 1)
    torch.testing.assert_close(gaussians.log_prob(z), want, rtol=1e-12, atol=1e-10)
    y = torch.arange(9) % k
    torch.testing.assert_close(gaussians.log_prob_of(z, y), want[torch.arange(9), y], rtol=1e-12, atol=1e-10)


def test_log_prob_in_float32_at_a_real_size() -> None:
    """d = 3072: the two products cancel large numbers; what is left must stay far below a nat."""
    gaussians = random_gaussians(10, 3072, dtype=torch.float32)
    y = torch.arange(20) % 10
    z = gaussians.sample(y, 1.0, torch.Generator().manual_seed(1))
    want = copy.deepcopy(gaussians).double().log_prob(z.double())
    assert (gaussians.log_prob(z) - want).abs().max() < 1e-6 * want.abs().max()
    own = want[torch.arange(20), y]
    assert (gaussians.log_prob_of(z, y) - own).abs().max() < 1e-2
    assert (gaussians.log_prob(z)[torch.arange(20), y] - own).abs().max() < 2e-2
    assert torch.equal(gaussians.log_prob(z).argmax(1), y)


def test_log_prob_gradients() -> None:
    gaussians, z = random_gaussians(3, 4), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs = (z, gaussians.mu, gaussians.s)
    got = torch.autograd.grad(gaussians.log_prob(z).square().sum(), inputs)
    stacked = torch.stack([n.log_prob(z) for n in reference(gaussians)], 1)
    for a, b in zip(got, torch.autograd.grad(stacked.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-8)


def test_ambient_autocast_and_tf32_change_nothing() -> None:
    gaussians = random_gaussians(4, 300, dtype=torch.float32)
    z = torch.randn(6, 300)
    # Once with constants that are made on the way, and once with those that are kept.
    other = copy.deepcopy(gaussians)
    want = [gaussians.log_prob(z) for _ in range(2)]
    drawn = gaussians.sample(torch.arange(4), 1.0, torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(other.log_prob(z), w) for w in want)
            assert torch.equal(gaussians.sample(torch.arange(4), 1.0, torch.Generator().manual_seed(0)), drawn)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- parametrisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", PSIS[:2])
def test_psi_keeps_variances_in_range_and_has_the_gradient_of_eq_6(psi: tuple[float, float, float]) -> None:
    a, b, c = psi
    gaussians = ClassGaussians(1, 9, psi).double()
    torch.testing.assert_close(gaussians.variance(), torch.full((1, 9), a / 2 + c, dtype=torch.float64))
    s = torch.tensor([[-1e6, -300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0, 1e6]], dtype=torch.float64)
    with torch.no_grad():
        gaussians.s.copy_(s)
    var = gaussians.variance()
    assert var.min() >= c and var.max() <= a + c and (var[0, 1:] >= var[0, :-1]).all()
    (grad,) = torch.autograd.grad(var.sum(), gaussians.s)
    sigmoid = 1 / (1 + torch.exp(-b * s))
    torch.testing.assert_close(grad, a * b * sigmoid * (1 - sigmoid), rtol=1e-9, atol=1e-20)


def test_without_psi_variances_stay_above_a_tenth_of_their_start() -> None:
    gaussians = ClassGaussians(2, 3, None, initial_variance=0.4)
    torch.testing.assert_close(gaussians.variance(), torch.full((2, 3), 0.4))
    with torch.no_grad():
        gaussians.s.copy_(torch.tensor([[-1.0, 0.039, 0.041], [0.0, 3.0, 100.0]]))
    assert gaussians.variance().min().item() == pytest.approx(0.04)
    assert torch.isfinite(gaussians.log_prob(torch.zeros(1, 3))).all()
    gaussians.project()
    torch.testing.assert_close(gaussians.s.data, torch.tensor([[0.04, 0.04, 0.041], [0.04, 3.0, 100.0]]))
    assert float(gaussians.saturated_share()) == pytest.approx(0.5)


def test_project_leaves_psi_parameters_alone() -> None:
    gaussians = random_gaussians(2, 3)
    before = gaussians.s.clone()
    gaussians.project()
    assert torch.equal(gaussians.s, before)


@pytest.mark.parametrize("psi", PSIS)
def test_set_variance_hits_what_is_allowed_and_clamps_the_rest(psi) -> None:
    gaussians = ClassGaussians(3, 4, psi)
    low, high = (0.05, 0.55) if psi == PSIS[0] else (0.05, 5.05) if psi else (0.03, math.inf)
    wanted = torch.tensor([0.07, 0.2, 0.3, 0.5]).repeat(3, 1)
    if psi == PSIS[1]:
        wanted = wanted * 9
    gaussians.set_variance(wanted)
    torch.testing.assert_close(gaussians.variance().detach(), wanted, rtol=1e-4, atol=0)
    gaussians.set_variance(torch.tensor([1e-9, 0.2, 1e9, 0.3]), slice(1, 2))
    row = gaussians.variance().detach()[1]
    assert low <= row[0] and row[2] <= high and row.isfinite().all()
    if psi:  # a hundredth from either end, where s does not run off
        ends = torch.tensor([low + 0.01 * (high - low), high - 0.01 * (high - low)])
        torch.testing.assert_close(row[[0, 2]], ends, rtol=1e-4, atol=0)
    torch.testing.assert_close(gaussians.variance().detach()[[0, 2]], wanted[[0, 2]], rtol=1e-4, atol=0)


def test_saturated_share_counts_both_ends() -> None:
    gaussians = ClassGaussians(1, 4)
    with torch.no_grad():
        gaussians.s.copy_(torch.tensor([[-30.0, -10.0, 10.0, 30.0]]))  # sigmoid(0.2 s): 0.0025, 0.12, 0.88, 0.9975
    assert gaussians.saturated_share().item() == 0.5


@pytest.mark.parametrize("bad", [(0, 3), (3, 0)])
def test_refuses_empty_sizes(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        ClassGaussians(*bad)


@pytest.mark.parametrize("psi", [(0.5, 0.2), (0.5, -0.2, 0.05), (0.5, 0.2, 0.0), (math.nan, 1, 1), (math.inf, 1, 1)])
def test_refuses_a_bad_psi(psi) -> None:
    with pytest.raises(ValueError, match="three positive numbers"):
        ClassGaussians(2, 2, psi)


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_have_the_class_mean_and_the_scaled_standard_deviation(temperature: float) -> None:
    gaussians = random_gaussians(2, 5, dtype=torch.float32)
    n = 40_000
    z = gaussians.sample(torch.arange(2).repeat_interleave(n), temperature, torch.Generator().manual_seed(0))
    for y in range(2):
        part, std = z[y * n : (y + 1) * n], gaussians.variance()[y].sqrt() * temperature
        assert ((part.mean(0) - gaussians.mu[y]).abs() < 5 * std / n**0.5).all()
        torch.testing.assert_close(part.std(0), std.detach(), rtol=0.02, atol=0)
        assert torch.corrcoef(part.T).fill_diagonal_(0).abs().max() < 0.03


def test_sampling_is_deterministic_and_temperature_zero_gives_the_means() -> None:
    gaussians, y = random_gaussians(3, 4, dtype=torch.float32), torch.tensor([2, 0, 2])
    draws = [gaussians.sample(y, 0.7, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad
    assert torch.equal(gaussians.sample(y, 0.0), gaussians.mu[y])
    assert gaussians.sample(y[:0]).shape == (0, 4)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            gaussians.sample(y, bad)


# ---- divergences -----------------------------------------------------------------------------------------------------


def double_loop(mu: Tensor, var: Tensor) -> Tensor:
    parts = [Independent(Normal(m, v.sqrt()), 1) for m, v in zip(mu, var, strict=True)]
    return torch.stack([torch.stack([kl_divergence(p, q) for q in parts]) for p in parts])


@pytest.mark.parametrize(("k", "d"), [(1, 3), (2, 1), (2, 5), (6, 600), (5, 1100)])
def test_divergences_equal_the_double_loop(k: int, d: int) -> None:
    """600 and 1100 dimensions: more than one slice, and an incomplete one."""
    mu, var = torch.randn(k, d, dtype=torch.float64) + 3, 0.05 + torch.rand(k, d, dtype=torch.float64)
    want = double_loop(mu, var)
    torch.testing.assert_close(kld_matrix(mu, var), want, rtol=1e-11, atol=1e-10)
    assert torch.equal(kld_matrix(mu, var).diagonal(), torch.zeros(k, dtype=torch.float64))
    torch.testing.assert_close(kld_class_sums(mu, var), want.sum(1), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(kld_pair_sum(mu, var), want.sum(), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pair_sum_gradients_equal_autograd_through_the_matrix(k: int) -> None:
    mu = torch.randn(k, 700, dtype=torch.float64, requires_grad=True)
    s = torch.randn(k, 700, dtype=torch.float64, requires_grad=True)
    var = 0.5 * torch.sigmoid(s) + 0.05
    got = torch.autograd.grad(3 * kld_pair_sum(mu, var), (mu, s), retain_graph=True)
    for other in (3 * kld_matrix(mu, var).sum(), 3 * double_loop(mu, var).sum()):
        want = torch.autograd.grad(other, (mu, s), retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pair_sum_gradcheck() -> None:
    mu = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    var = (0.1 + torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(kld_pair_sum, (mu, var))
    assert torch.autograd.gradcheck(kld_matrix, (mu, var))


def test_methods_agree_with_the_functions() -> None:
    gaussians = random_gaussians(4, 6)
    want = double_loop(gaussians.mu, gaussians.variance())
    torch.testing.assert_close(gaussians.kld_matrix(), want)
    torch.testing.assert_close(gaussians.kld_sum(), want.sum())
    torch.testing.assert_close(gaussians.kld_class_means(), want.sum(1) / 3)
    assert ClassGaussians(1, 6).kld_sum().item() == 0 and float(ClassGaussians(1, 6).kld_class_means()) == 0


@pytest.mark.parametrize("mean", [0.0, 0.1, -7.3])
def test_identical_gaussians_have_no_divergence_and_no_pull(mean: float) -> None:
    gaussians = ClassGaussians(7, 30)
    with torch.no_grad():
        gaussians.mu.fill_(mean)
    loss = gaussians.kld_sum()
    loss.backward()
    assert abs(loss.item()) < 1e-9
    assert torch.equal(gaussians.mu.grad, torch.zeros(7, 30))
    assert gaussians.s.grad.abs().max() < 1e-12  # 1/s summed K times, rounded
    assert gaussians.kld_matrix().abs().max() < 1e-9


def test_nearly_equal_gaussians_keep_their_digits() -> None:
    """The divergences are differences of large numbers; float32 sums would lose all of these."""
    gaussians = ClassGaussians(3, 1000)
    with torch.no_grad():
        gaussians.mu.copy_(5 + torch.randn(3, 1000) * 1e-4)
    want = double_loop(gaussians.mu.double(), gaussians.variance().double()).sum()
    assert gaussians.kld_sum().item() == pytest.approx(want.item(), rel=1e-5)


MEASURE = """
import resource, time, torch
from glem_augment.latent.kld import kld_pair_sum
torch.set_num_threads(2)
mu = torch.randn(1000, 12288, requires_grad=True)
var = (0.05 + 0.5 * torch.rand(1000, 12288)).requires_grad_()
kld_pair_sum(mu[:, :600], var[:, :600]).backward()
mu.grad = var.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for _ in range(3):
    mu.grad = var.grad = None
    began = time.perf_counter()
    kld_pair_sum(mu, var).backward()
    times.append(time.perf_counter() - began)
print(min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (mu.numel() * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_pair_sum_of_a_thousand_classes_is_quick_and_lean() -> None:
    """K = 1000, d = 12,288, with gradients: below 0.5 s on 2 cores, below 4 times the size of mu."""
    output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    seconds, share = map(float, output.split())
    assert seconds < 1.0  # 0.3 s on an idle machine; a busy one is no failure
    assert share < 4


def test_pair_sum_is_linear_in_the_classes() -> None:
    """No K x K x d tensor: this one would take 80 GB."""
    mu, var = torch.randn(10_000, 100, requires_grad=True), 0.1 + torch.rand(10_000, 100)
    began = time.perf_counter()
    kld_pair_sum(mu, var).backward()
    assert time.perf_counter() - began < 10


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cached_density_terms_follow_changes_in_place() -> None:
    gaussians, z = random_gaussians(3, 5).requires_grad_(False), torch.randn(4, 5, dtype=torch.float64)

    def check() -> None:
        want = torch.stack([n.log_prob(z) for n in reference(gaussians)], 1)
        for _ in range(2):
            torch.testing.assert_close(gaussians.log_prob(z), want, rtol=1e-10, atol=1e-9)

    check()
    gaussians.mu += 1
    check()
    gaussians.s[0] = -3
    check()
    gaussians.set_variance(torch.full((3, 5), 0.3))
    check()
    gaussians.load_state_dict(random_gaussians(3, 5).state_dict())
    check()
    gaussians.randomise(2.0)
    check()
    twin = copy.deepcopy(gaussians)
    twin.mu.zero_()
    check()
    gaussians.requires_grad_(True)
    optimizer = torch.optim.Adam(gaussians.parameters(), lr=0.1, fused=True)  # leaves the versions as they were
    gaussians.log_prob(z).sum().backward()
    optimizer.step()
    gaussians.requires_grad_(False)
    check()
    gaussians.requires_grad_(True)  # a step whose gradients came from elsewhere
    for p in gaussians.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    gaussians.requires_grad_(False)
    check()


def test_a_fused_step_that_moves_one_class_among_many_is_noticed() -> None:
    gaussians, z = random_gaussians(5000, 2).requires_grad_(True), torch.zeros(1, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(gaussians.parameters(), lr=1.0, fused=True)  # leaves the versions as they were
    with torch.no_grad():
        before = gaussians.log_prob(z)
    for row in (1, 2222, 4999):
        gaussians.mu.grad = torch.zeros_like(gaussians.mu)
        gaussians.mu.grad[row] = 1.0
        optimizer.step()
        with torch.no_grad():
            after = gaussians.log_prob(z)
        assert (after != before).nonzero().tolist() == [[0, row]]
        before = after


def test_terms_of_trainable_parameters_are_kept_where_no_gradient_is_wanted() -> None:
    gaussians, z = random_gaussians(40, 30).requires_grad_(True), torch.randn(4, 30, dtype=torch.float64)
    optimizer = torch.optim.Adam(gaussians.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        want = torch.stack([n.log_prob(z) for n in reference(gaussians)], 1)
        for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with context():
                torch.testing.assert_close(gaussians.log_prob(z), want, rtol=1e-10, atol=1e-9)
                assert gaussians._density_terms()[0] is gaussians._density_terms()[0]
        kept = gaussians._density_terms()[0]
        gaussians.log_prob(z).sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert gaussians._density_terms()[0] is not kept


def test_terms_of_trainable_parameters_are_kept_between_passes_that_change_nothing() -> None:
    gaussians, z = random_gaussians(40, 30).requires_grad_(True), torch.randn(4, 30, dtype=torch.float64)
    optimizer = torch.optim.Adam(gaussians.parameters(), lr=0.1, fused=True)  # leaves the versions as they were

    def check(kept: bool) -> Tensor:
        found = gaussians.log_prob(z)
        want = torch.stack([n.log_prob(z) for n in reference(gaussians)], 1)
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-9)
        assert bool(gaussians._cache) == kept
        return found

    for _ in range(2):
        check(False)
        check(True)
        found = check(True)
        gradients = torch.autograd.grad(found.sum(), [*gaussians.parameters()], retain_graph=True)
        check(False)  # a gradient has gone to the parameters
        check(True)
        with torch.no_grad():
            gaussians.mu += 1
        check(False)
        found = check(True)
        found.sum().backward()
        want = torch.autograd.grad(sum(n.log_prob(z).sum() for n in reference(gaussians)), [*gaussians.parameters()])
        for p, w, before in zip(gaussians.parameters(), want, gradients, strict=True):
            torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-9)
            assert not torch.equal(before, w)
        optimizer.step()
        optimizer.zero_grad()


def test_terms_cached_under_inference_mode_do_not_break_later_gradients() -> None:
    gaussians = random_gaussians(3, 5).requires_grad_(False)
    with torch.inference_mode():
        gaussians.log_prob(torch.zeros(1, 5, dtype=torch.float64))
    z = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    gaussians.log_prob(z).sum().backward()
    assert z.grad.abs().max() > 0
    with torch.inference_mode():
        made_inside = ClassGaussians(2, 3)
        first = made_inside.log_prob(torch.zeros(1, 3))
        assert first.shape == (1, 2)
        made_inside.mu[1, 2] = 3.0  # a write that torch does not count
        second = made_inside.log_prob(torch.zeros(1, 3))
        assert first[0, 0] == second[0, 0] and first[0, 1] != second[0, 1]
    transposed = ClassGaussians(8, 5)
    transposed.mu = torch.nn.Parameter(torch.randn(5, 8).T)
    with torch.no_grad():
        transposed.log_prob(torch.zeros(1, 5))


@pytest.mark.parametrize("psi", [None, (0.5, 0.2, 0.05)])
@pytest.mark.parametrize("batch", [2, 9])
def test_variances_of_a_few_classes_are_those_of_all(psi: tuple[float, float, float] | None, batch: int) -> None:
    gaussians = ClassGaussians(5, 7, psi=psi).double()
    with torch.no_grad():
        gaussians.s.normal_(std=2.0)
    y = torch.randint(5, (batch,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gaussians.variance_of(y), gaussians.variance()[y], rtol=1e-14, atol=0)
    weights = torch.randn(batch, 7, dtype=torch.float64)
    got, want = (torch.autograd.grad((v * weights).sum(), gaussians.s)[0] for v in (
        gaussians.variance_of(y), gaussians.variance()[y]))  # fmt: skip
    torch.testing.assert_close(got, want)
