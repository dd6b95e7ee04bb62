"""exp(S) v against torch.matrix_exp, its gradients, and what it costs."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from glem_augment.flows.coupling import MatExpCoupling, _norm_bound
from glem_augment.flows.matexp import expm_apply, expm_apply_low_rank, taylor_plan

BOUNDS = (0.5, 1.0, 2.0, 4.0)


def exact(s: Tensor, v: Tensor, sign: float = 1.0) -> Tensor:
    """exp(sign S) v per pixel in float64: s [B,n,n,H,W], v [B,n,H,W]."""
    matrices = torch.matrix_exp((sign * s.double()).permute(0, 3, 4, 1, 2).contiguous())
    return (matrices @ v.double().permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest over the pixels of |got - want| / |want|."""
    error = torch.linalg.vector_norm(got.double() - want, dim=1) / torch.linalg.vector_norm(want, dim=1)
    return float(error.max())


def error_against_norm(got: Tensor, want: Tensor, s: Tensor, v: Tensor, sign: float) -> float:
    """Largest over the pixels of |got - want| / (|exp(S)|_2 |v|)."""
    norms = torch.linalg.matrix_norm(torch.matrix_exp((sign * s.double()).permute(0, 3, 4, 1, 2).contiguous()), 2)
    error = torch.linalg.vector_norm(got.double() - want, dim=1)
    return float((error / (norms * torch.linalg.vector_norm(v.double(), dim=1))).max())


def with_row_sums(s: Tensor, bound: float) -> Tensor:
    """Scale every row to an absolute sum of exactly ``bound``: the edge of what is promised."""
    return s * (bound / s.abs().sum(2, keepdim=True))


def kinds(n: int, bound: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices [B,n,n,4,4] with ||S||_inf <= bound, random and built to be hard."""
    shape = (3, n, n, 4, 4)
    eye = torch.eye(n, dtype=dtype)[None, :, :, None, None].expand(shape)
    dense = torch.randn(shape, dtype=dtype)
    upper = torch.randn(shape, dtype=dtype).abs() + 0.1
    upper = upper * torch.triu(torch.ones(n, n, dtype=dtype), 1)[None, :, :, None, None]
    skew = dense - dense.transpose(1, 2)
    out = {
        "random inside": with_row_sums(dense, bound) * torch.rand(3, 1, 1, 4, 4, dtype=dtype),
        "row sums exactly r": with_row_sums(dense, bound),
        "all negative": -with_row_sums(dense.abs(), bound),
        "-r on the diagonal": -bound * eye,
        "+r on the diagonal": bound * eye,
        "alternating diagonal": bound * eye * (-1.0) ** torch.arange(n, dtype=dtype)[None, :, None, None, None],
        "nilpotent": upper * (bound / upper.abs().sum(2).amax().clamp_min(1e-9)),
        "rotation": skew * (bound / skew.abs().sum(2).amax(1)[:, None, None].clamp_min(1e-9)),
        "zero": torch.zeros(shape, dtype=dtype),
    }
    return {name: value.contiguous() for name, value in out.items()}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [*range(1, 13), 24])
def test_float32_error_stays_below_one_in_a_million(n: int, bound: float) -> None:
    for name, s in kinds(n, bound, torch.float32).items():
        for v in (torch.randn(3, n, 4, 4), torch.ones(3, n, 4, 4)):
            for inverse in (False, True):
                want = exact(s, v, -1.0 if inverse else 1.0)
                error = relative_error(expm_apply(s, v, bound, inverse), want)
                if bound > 2:
                    # Some vectors shrink by e^-4 where others grow: rounding v alone then costs several millionths, so
                    # what can be asked for is an error that is small against |exp(S)| |v|.
                    error = error_against_norm(expm_apply(s, v, bound, inverse), want, s, v, -1.0 if inverse else 1.0)
                assert error < 1e-6, (name, inverse, error)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 12])
def test_float64_error_is_rounding(n: int, bound: float) -> None:
    for name, s in kinds(n, bound, torch.float64).items():
        v = torch.randn(3, n, 4, 4, dtype=torch.float64)
        for inverse in (False, True):
            want = exact(s, v, -1.0 if inverse else 1.0)
            error = relative_error(expm_apply(s, v, bound, inverse), want)
            assert error < 1e-14 * math.exp(bound), (name, inverse, error)  # matrix_exp itself loses e^r


def test_the_plan_grows_with_the_bound_and_refuses_nonsense() -> None:
    assert taylor_plan(1.0, torch.float32)[0] == 1
    for bound in BOUNDS:
        segments, terms = taylor_plan(bound, torch.float32)
        assert bound / segments <= 1 + 1e-6 and terms <= 14
        assert taylor_plan(bound, torch.float64)[1] > terms
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            taylor_plan(bad, torch.float32)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [1, 6, 12])
def test_inverse_undoes(n: int, bound: float) -> None:
    s = with_row_sums(torch.randn(2, n, n, 3, 5), bound)
    v = torch.randn(2, n, 3, 5)
    back = expm_apply(s, expm_apply(s, v, bound), bound, inverse=True)
    # exp(-S) may magnify the rounding of exp(S) v by up to e^(2r).
    assert relative_error(back, v.double()) < 3e-7 * math.exp(2 * bound)
    s, v = s.double(), v.double()
    back = expm_apply(s, expm_apply(s, v, bound), bound, inverse=True)
    assert relative_error(back, v) < 1e-15 * math.exp(2 * bound) * 10


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("n", "bound"), [(1, 0.5), (3, 1.0), (3, 2.0), (2, 3.0), (9, 2.0)])
def test_derivatives(n: int, bound: float, inverse: bool) -> None:
    """Several segments (bound > 1) and both code paths (n <= 8 and beyond)."""
    pixels = (1, 2) if n < 9 else (1, 1)
    s = (with_row_sums(torch.randn(1, n, n, *pixels, dtype=torch.float64), bound) * 0.9).requires_grad_()
    v = torch.randn(1, n, *pixels, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s, v: expm_apply(s, v, bound, inverse), (s, v))


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_gradient_equals_the_one_through_matrix_exp(bound: float) -> None:
    s = with_row_sums(torch.randn(2, 6, 6, 3, 3, dtype=torch.float64), bound).requires_grad_()
    v = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    got = torch.autograd.grad((expm_apply(s, v, bound) * weight).sum(), (s, v))
    want = torch.autograd.grad((exact(s, v) * weight).sum(), (s, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    single = torch.autograd.grad((expm_apply(s.float(), v.float(), bound) * weight.float()).sum(), (s, v))
    for a, b in zip(single, want, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-6


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("n", "q"), [(4, 1), (7, 3), (30, 3)])
def test_low_rank_equals_full(n: int, q: int, bound: float) -> None:
    side = bound**0.5
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14 * math.exp(bound))):
        u = with_row_sums(torch.randn(2, n, q, 2, 3, dtype=dtype), side)
        w = with_row_sums(torch.randn(2, q, n, 2, 3, dtype=dtype), side)
        v = torch.randn(2, n, 2, 3, dtype=dtype)
        full = torch.einsum("bnqhw,bqmhw->bnmhw", u.double(), w.double())
        for inverse in (False, True):
            got = expm_apply_low_rank(u, w, v, bound, inverse)
            assert relative_error(got, exact(full, v, -1.0 if inverse else 1.0)) < limit


@pytest.mark.parametrize("inverse", [False, True])
def test_low_rank_derivatives(inverse: bool) -> None:
    u = (torch.randn(1, 4, 2, 1, 2, dtype=torch.float64) * 0.3).requires_grad_()
    w = (torch.randn(1, 2, 4, 1, 2, dtype=torch.float64) * 0.3).requires_grad_()
    v = torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    for bound in (1.0, 2.0):
        assert gradcheck(lambda u, w, v, b=bound: expm_apply_low_rank(u, w, v, b, inverse), (u, w, v))


@pytest.mark.parametrize("n", [3, 10])
def test_noncontiguous_inputs_give_the_same_and_are_not_written_to(n: int) -> None:
    s = with_row_sums(torch.randn(2, n, n, 4, 6), 2.0)
    v = torch.randn(2, n, 4, 6)
    want = expm_apply(s, v, 2.0)
    s_odd = s.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2).requires_grad_()
    v_odd = torch.cat([v, v], 1)[:, :n].contiguous(memory_format=torch.channels_last).requires_grad_()
    before = s_odd.detach().clone(), v_odd.detach().clone()
    got = expm_apply(s_odd, v_odd, 2.0)
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(s_odd, before[0]) and torch.equal(v_odd, before[1])
    expanded = expm_apply(torch.zeros(1, n, n, 1, 1).expand(2, n, n, 4, 6), v, 1.0)
    assert torch.equal(expanded, v)


def test_an_empty_batch_passes() -> None:
    assert expm_apply(torch.zeros(0, 3, 3, 2, 2), torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


def test_only_its_own_pixel_matters() -> None:
    s, v = torch.randn(1, 3, 3, 2, 2) * 0.2, torch.randn(1, 3, 2, 2)
    want = expm_apply(s, v)
    s[..., 0, 0], v[..., 0, 0] = 0.1, 7.0
    changed = expm_apply(s, v) != want
    assert changed[..., 0, 0].all() and changed.sum() == 3


@pytest.mark.slow
def test_at_least_eight_times_faster_than_matrix_exp() -> None:
    """Forward + backward at n = 6, 16x16, batch 32, as the couplings call it."""
    s = (with_row_sums(torch.randn(32, 6, 6, 16, 16), 1.0) * 0.9).requires_grad_()
    v = torch.randn(32, 6, 16, 16, requires_grad=True)

    def naive() -> Tensor:
        matrices = torch.matrix_exp(s.permute(0, 3, 4, 1, 2).contiguous())
        return (matrices @ v.permute(0, 2, 3, 1)[..., None])[..., 0]

    def seconds(run, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            torch.autograd.grad(run().square().sum(), (s, v))
            times.append(time.perf_counter() - began)
        return min(times)

    seconds(lambda: expm_apply(s, v), 2)
    assert seconds(naive, 3) > 8 * seconds(lambda: expm_apply(s, v), 8)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bound", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
# Where S is small, fewer terms of the series are added.
@pytest.mark.parametrize("size", [3, 0.3, 0.01, 1e-5, 0])
def test_the_coupling_of_every_kernel_against_dense_exponentials(
    n: int, bound: float, inverse: bool, size: float
) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, 4, 5, generator=g, dtype=torch.float64).requires_grad_()
    raw = size * torch.randn(3, n * n + n, 4, 5, generator=g, dtype=torch.float64)
    if (
        n == 2 and size == 3
    ):  # rotations, real eigenvalues, and nothing: what the closed form has to tell apart without telling apart
        raw[0, :4] = torch.tensor([0.0, 9, -9, 0])[:, None, None]
        raw[1, :4] = torch.tensor([9.0, 0, 0, -9])[:, None, None]
        raw[2, :4, :2] = 0
    raw.requires_grad_()
    s = raw[:, : n * n].unflatten(1, (n, n))
    s = bound * s / (1 + s.abs().sum(2, keepdim=True))
    shift, sign = raw[:, n * n :].transpose(0, 1), -1.0 if inverse else 1.0
    matrix = torch.matrix_exp((sign * s).permute(0, 3, 4, 1, 2).contiguous())
    start = x - shift if inverse else x
    y = torch.einsum("bhwij,jbhw->ibhw", matrix, start) + (0 if inverse else shift)
    logdet = sign * s.diagonal(dim1=1, dim2=2).sum((1, 2, 3))
    upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, logdet)]
    expected = [y, logdet, *torch.autograd.grad([y, logdet], [x, raw], upstream)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        own = [t.detach().to(dtype).requires_grad_() for t in (x, raw)]
        got = MatExpCoupling(2 * n, lambda a, b: torch.nn.Identity(), bound).transform(*own, inverse)
        grads = torch.autograd.grad(got, own, [u.to(dtype) for u in upstream])
        for result, want in zip([*got, *grads], expected, strict=True):
            # Traces may cancel: an absolute bound then.
            assert (result.double() - want).norm() <= tolerance * want.norm().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.7, 1.0, 5.0])
def test_the_norm_of_a_batch_is_bounded(bound: float, dtype: torch.dtype) -> None:
    """Never below the true norm, and within a factor of two of it while that is above a thousandth of the bound."""
    for size in [10.0**k for k in range(-9, 9)]:
        raw = size * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
        below = 1 + raw.abs().sum(2, keepdim=True)
        norm, found = float((raw.double() * bound / below.double()).abs().sum(2).max()), _norm_bound(below, bound)
        assert norm <= found * (1 + 1e-6) and found <= bound
        assert found <= max(2 * norm + 1e-5, bound / 1024)
    for lost in (torch.full((3, 4, 1), float("nan")), torch.empty(0, 4, 1)):
        assert _norm_bound(lost, bound) == bound
