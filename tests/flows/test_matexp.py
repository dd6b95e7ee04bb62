"""exp(S) v and exp(A) against torch.matrix_exp in float64, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from glem_augment.flows.matexp import expm_apply, taylor_plan
from glem_augment.flows.matexp_coupling import MatExpCoupling

BOUNDS = (0.5, 2.0, 4.0)


def exact(s: Tensor, v: Tensor, sign: float = 1.0) -> Tensor:
    """exp(sign S) v per pixel in float64: s [B,n,n,H,W], v [B,n,H,W]."""
    matrices = torch.matrix_exp((sign * s.double()).permute(0, 3, 4, 1, 2).contiguous())
    return (matrices @ v.double().permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)


def with_row_sums(s: Tensor, bound: float) -> Tensor:
    """Scale every row to an absolute sum of exactly `bound`: the edge of the promise."""
    return s * (bound / s.abs().sum(2, keepdim=True))


def kinds(n: int, bound: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices [B,n,n,4,4] with ||S||_inf <= bound, random and built to be hard."""
    shape = (3, n, n, 4, 4)
    eye = torch.eye(n, dtype=dtype)[None, :, :, None, None].expand(shape)
    dense = torch.randn(shape, dtype=dtype)
    upper = (dense.abs() + 0.1) * torch.triu(torch.ones(n, n, dtype=dtype), 1)[None, :, :, None, None]
    skew = dense - dense.transpose(1, 2)
    return {
        "random inside": with_row_sums(dense, bound) * torch.rand(3, 1, 1, 4, 4, dtype=dtype),
        "row sums exactly r": with_row_sums(dense, bound),
        "all negative": -with_row_sums(dense.abs(), bound),
        "-r on the diagonal": -bound * eye,
        "alternating diagonal": bound * eye * (-1.0) ** torch.arange(n, dtype=dtype)[None, :, None, None, None],
        "nilpotent": upper * (bound / upper.abs().sum(2).amax().clamp_min(1e-9)),
        "rotation": skew * (bound / skew.abs().sum(2).amax(1)[:, None, None].clamp_min(1e-9)),
        "zero": torch.zeros(shape, dtype=dtype),
    }


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [1, 6, 7, 24])
def test_the_error_is_below_one_in_a_million_in_float32_and_rounding_in_float64(n: int, bound: float) -> None:
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14 * math.exp(bound))):  # matrix_exp loses e^r
        for name, s in kinds(n, bound, dtype).items():
            v = torch.randn(3, n, 4, 4, dtype=dtype)
            for sign in (1.0, -1.0):
                # Beyond r = 2 some vectors shrink by e^-4 where others grow, and rounding v alone then costs several
                # millionths. So the error has to be small against |exp(S)| |v| there.
                matrices = torch.matrix_exp((sign * s.double()).permute(0, 3, 4, 1, 2).contiguous())
                norms = torch.linalg.matrix_norm(matrices, 2) * torch.linalg.vector_norm(v.double(), dim=1)
                want = exact(s, v, sign)
                scale = torch.linalg.vector_norm(want, dim=1).clamp_min(norms if bound > 2 else 0.0)
                got = expm_apply(s, v, bound, inverse=sign < 0).double()
                error = float((torch.linalg.vector_norm(got - want, dim=1) / scale).max())
                assert error < limit, (name, dtype, sign, error)


def test_the_plan_grows_with_the_bound() -> None:
    assert taylor_plan(1.0, torch.float32) == (1, 10)
    for bound in BOUNDS:
        segments, terms = taylor_plan(bound, torch.float32)
        assert segments == math.ceil(bound) and terms <= 11
        assert taylor_plan(bound, torch.float64)[1] > terms


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("n", "bound"), [(1, 1.0), (3, 5.0), (7, 2.0), (25, 2.0)])
@pytest.mark.parametrize("size", [3, 0])
def test_the_coupling_against_dense_exponentials(n: int, bound: float, inverse: bool, size: float) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, 4, 5, generator=g, dtype=torch.float64).requires_grad_()
    layer = MatExpCoupling(2 * n, lambda a, b: nn.Identity(), bound)  # of thin factors for n > 24, q = 3
    count = 6 * n if layer.low_rank else n * n
    raw = (size * torch.randn(3, count + n, 4, 5, generator=g, dtype=torch.float64)).requires_grad_()
    if layer.low_rank:
        u, w = (part.unflatten(1, shape) for part, shape in zip(raw[:, :-n].chunk(2, 1), ((n, 3), (3, n)), strict=True))
        w = w + layer.factor_offset.detach()
        u, w = (bound**0.5 * f / (1 + f.abs().sum(2, keepdim=True)) for f in (u, w))
        s = torch.einsum("bnqhw,bqmhw->bnmhw", u, w)
    else:
        s = raw[:, :-n].unflatten(1, (n, n))
        s = bound * s / (1 + s.abs().sum(2, keepdim=True))
    shift, sign = raw[:, -n:], -1.0 if inverse else 1.0
    images = x.transpose(0, 1)
    y = (exact(s, images - shift, sign) if inverse else exact(s, images) + shift).transpose(0, 1)
    logdet = sign * s.diagonal(dim1=1, dim2=2).sum((1, 2, 3))
    upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, logdet)]
    expected = [y, logdet, *torch.autograd.grad([y, logdet], [x, raw], upstream)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        own = [t.detach().to(dtype).requires_grad_() for t in (x, raw)]
        got = layer.to(dtype).transform(*own, inverse)
        grads = torch.autograd.grad(got, own, [u.to(dtype) for u in upstream])
        for result, want in zip([*got, *grads], expected, strict=True):
            # Traces may cancel, so the bound is absolute for small ones.
            assert (result.double() - want).norm() <= tolerance * want.norm().clamp_min(1)
