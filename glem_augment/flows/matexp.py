"""exp(S) applied to vectors, pixel by pixel, without ever forming exp(S).

``exp(S) v = sum_k S^k v / k!`` costs n^2 operations per term and pixel, and ``exp(-S)`` undoes it exactly. The
series needs a known bound on ``||S||_inf``; the couplings guarantee one, so the number of terms is a constant and
no value has to be read back from the device.

Source: Xiao & Liu, "Generative Flows with Matrix Exponential", ICML 2020, Sec. 3 (which forms exp(S) by scaling and
squaring; the application to vectors is this library's).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Relative truncation error that is left to the series; rounding then dominates in either precision.
_TOLERANCE = {torch.float32: 2.5e-7, torch.float64: 2e-16}
# Up to this size n multiply-adds over planes are faster than one batched product of tiny matrices per term.
PLANES_UP_TO = 6
# Up to this size a row vector times S^T, in one batched product, is several times faster on a CPU than times S, and a
# transposed copy of S pays for itself at once.
_TRANSPOSE_UP_TO = 16


def segments_of(bound: float) -> int:
    """In how many equal parts exp(S) is applied when ``||S||_inf <= bound``: their norms are at most 1."""
    return max(1, math.ceil(bound - 1e-9))


@cache
def taylor_plan(bound: float, dtype: torch.dtype) -> tuple[int, int]:
    """How to apply exp(S) when ``||S||_inf <= bound``.

    Args:
        bound: r, an upper bound of the maximum absolute row sum.
        dtype: float32 (normwise relative error below 1e-6) or float64 (about 1e-15).

    Returns:
        ``(segments, terms)``: exp(S) is applied as ``segments`` applications of exp(S / segments) with ``terms``
        Taylor terms each. Segments keep the norm at or below 1, since beyond it the alternating terms of exp(-S)
        cancel and float32 rounding grows like e^(2r).
    """
    if not bound > 0 or not math.isfinite(bound):
        raise ValueError(f"bound must be a positive number, got {bound}")
    segments = segments_of(bound)
    rho = bound / segments
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) / segments
    terms = 1
    # e^rho turns an error relative to v into one relative to exp(S) v, which can be smaller by that factor.
    while math.exp(rho) * sum(rho**k / math.factorial(k) for k in range(terms + 1, terms + 30)) > tolerance:
        terms += 1
    return segments, terms


def _affine(base: Tensor | None, s: Tensor, v: Tensor, value: float) -> Tensor:
    """base + value * S v (base 0 if None); s [n, n, ...], v and base [n, ...], one matrix per trailing position.

    One fused multiply-add per column of S, over planes of pixels: no temporary of the size of S is made.
    """
    if base is None:
        out = s[:, 0] * (v[:1] * value)
    else:
        out = torch.addcmul(base, s[:, 0], v[:1], value=value)
    for j in range(1, s.shape[0]):
        out.addcmul_(s[:, j], v[j : j + 1], value=value)
    return out


class Planes:
    """For small n: s [n, n, ...] and vectors [n, ...], so every entry of S is one long vector over all pixels."""

    @staticmethod
    def apply(s: Tensor, v: Tensor, scale: float, terms: int) -> Tensor:
        """exp(scale S) v by Horner's rule: v + S (v + S/2 (v + S/3 (...)))."""
        out = v
        for k in range(terms, 0, -1):
            out = _affine(v, s, out, scale / k)
        return out

    @staticmethod
    def adjoint(
        s: Tensor, start: Tensor, g: Tensor, scale: float, terms: int, grad_s: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Backward of ``apply``: dL/dS, added to ``grad_s`` in place where there is one, and dL/dstart.

        With t_0 = start, t_k = S t_(k-1) / k and y = sum t_k, the adjoints are a_m = g,
        a_k = g + S^T a_(k+1) / (k+1), and dL/dS = sum_k a_k t_(k-1)^T / k, dL/dstart = a_0. The terms are cheap to
        recompute and are not stored.
        """
        series = [start]
        for k in range(1, terms):
            series.append(_affine(None, s, series[-1], scale / k))
        transposed, a = s.transpose(0, 1), g
        for k in range(terms, 0, -1):
            left, right = a.unsqueeze(1), series[k - 1].unsqueeze(0)
            if grad_s is None:
                grad_s = (left * (scale / k)) * right
            else:
                grad_s.addcmul_(left, right, value=scale / k)
            a = _affine(g, transposed, a, scale / k)
        assert grad_s is not None
        return grad_s, a


class Pixels:
    """For larger n: s [P, n, n] and row vectors [P, 1, n], so that S v is v S^T, a batched matrix product."""

    @staticmethod
    def apply(s: Tensor, v: Tensor, scale: float, terms: int) -> Tensor:
        """As ``Planes.apply``."""
        transposed, out = s.transpose(1, 2), v
        for k in range(terms, 0, -1):
            out = torch.baddbmm(v, out, transposed, alpha=scale / k)
        return out

    @staticmethod
    def adjoint(
        s: Tensor, start: Tensor, g: Tensor, scale: float, terms: int, grad_s: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As ``Planes.adjoint``; the outer products of all terms are one batched product."""
        transposed, series, adjoints = s.transpose(1, 2), [start], [g]
        if s.shape[1] <= _TRANSPOSE_UP_TO:
            s = transposed.contiguous().transpose(1, 2)
        for k in range(1, terms):
            series.append(torch.bmm(series[-1], transposed) * (scale / k))
        for k in range(terms, 0, -1):
            adjoints.append(torch.baddbmm(g, adjoints[-1], s, alpha=scale / k))
        left = torch.cat([a * (scale / k) for a, k in zip(adjoints, range(terms, 0, -1), strict=False)], 1)
        right = torch.cat(series[::-1], 1)
        if grad_s is None:
            return torch.bmm(left.transpose(1, 2), right), adjoints[-1]
        return grad_s.baddbmm_(left.transpose(1, 2), right), adjoints[-1]


def layout(n: int) -> type[Planes] | type[Pixels]:
    """Which of the two serves n x n matrices."""
    return Planes if n <= PLANES_UP_TO else Pixels


class _ExpmApply(torch.autograd.Function):
    """Keeps S and one vector per segment, in either layout."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        s: Tensor, v: Tensor, kind: type[Planes] | type[Pixels], sign: float, segments: int, terms: int
    ) -> tuple[Tensor, Tensor]:
        starts = []
        for _ in range(segments):
            starts.append(v)
            v = kind.apply(s, v, sign / segments, terms)
        # The starts of later segments are intermediate results; they ride along as a second, non-differentiable
        # output because setup_context may only save inputs and outputs.
        return v, torch.stack(starts[1:]) if segments > 1 else v.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        s, v, *plan = inputs
        ctx.save_for_backward(s, v, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.plan = plan

    @staticmethod
    def backward(ctx, g: Tensor, _unused):
        s, v, later = ctx.saved_tensors
        kind, sign, segments, terms = ctx.plan
        starts = [v, *(later if segments > 1 else [])]
        if segments > 1 and torch.is_grad_enabled():
            # Under create_graph the starts have to depend on S and v, which the stored ones do not.
            starts = [v]
            for _ in range(segments - 1):
                starts.append(kind.apply(s, starts[-1], sign / segments, terms))
        grad_s = None
        for start in reversed(starts):
            grad_s, g = kind.adjoint(s, start, g, sign / segments, terms, grad_s)
        return grad_s, g, None, None, None, None


def expm_apply(s: Tensor, v: Tensor, bound: float = 1.0, inverse: bool = False) -> Tensor:
    """exp(S) v for every pixel, or exp(-S) v with ``inverse``.

    Args:
        s: [B, n, n, H, W] matrices with ``||S||_inf <= bound``; a larger norm silently loses accuracy.
        v: [B, n, H, W] vectors.
        bound: r, the guaranteed bound of the maximum absolute row sum.
        inverse: apply exp(-S).

    Returns:
        [B, n, H, W]; log|det| is the trace of S. In float32 the normwise error per pixel stays under 1e-6 of the
        result for r <= 2, and under 1e-6 of ``|exp(S)| |v|`` beyond, where exp(S) can shrink v so much that rounding
        v alone costs more.
    """
    batch, n, height, width = v.shape
    plan = (-1.0 if inverse else 1.0, *taylor_plan(float(bound), v.dtype))
    if layout(n) is Planes:
        return _ExpmApply.apply(s.permute(1, 2, 0, 3, 4), v.transpose(0, 1), Planes, *plan)[0].transpose(0, 1)
    s, v = s.permute(0, 3, 4, 1, 2).reshape(-1, n, n), v.permute(0, 2, 3, 1).reshape(-1, 1, n)
    out = _ExpmApply.apply(s, v, Pixels, *plan)[0]
    return out.reshape(batch, height, width, n).permute(0, 3, 1, 2)


def expm_apply_low_rank(u: Tensor, w: Tensor, v: Tensor, bound: float = 1.0, inverse: bool = False) -> Tensor:
    """exp(U W) v for every pixel, through q x q matrices only.

    ``exp(UW) v = v + U phi(WU) W v`` with ``phi(M) = sum_k M^k / (k+1)!``, so the series runs in the q-dimensional
    space of W.

    Args:
        u: [B, n, q, H, W] and
        w: [B, q, n, H, W] with ``||U||_inf ||W||_inf <= bound``.
        v: [B, n, H, W].
        bound: r.
        inverse: apply exp(-U W).

    Returns:
        [B, n, H, W]; log|det| is trace(W U).
    """
    segments, terms = taylor_plan(float(bound), v.dtype)
    scale = (-1.0 if inverse else 1.0) / segments
    small = torch.einsum("bpnhw,bnqhw->bpqhw", w, u)
    for _ in range(segments):
        total = term = torch.einsum("bqnhw,bnhw->bqhw", w, v)
        for k in range(1, terms):
            term = torch.einsum("bpqhw,bqhw->bphw", small, term) * (scale / (k + 1))
            total = total + term
        v = v + torch.einsum("bnqhw,bqhw->bnhw", u, total) * scale
    return v
