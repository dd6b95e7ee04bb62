"""Matrix exponentials exp(S), applied to vectors pixel by pixel without being formed.

`exp(S) v = sum_k S^k v / k!` costs n^2 operations per term and pixel, and exp(-S) undoes it exactly. The series needs a
known bound of `||S||_inf`. The couplings guarantee one, so the number of terms is known before any value is looked at.

Source: Xiao & Liu, "Generative Flows with Matrix Exponential", ICML 2020, Sec. 3. They form exp(S) by scaling and
squaring; applying it to vectors is this library's choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Relative truncation error that is left to the series. Beyond it, rounding dominates.
_TOLERANCE = {torch.float32: 2.5e-7, torch.float64: 2e-16}
# Up to this size n multiply-adds over planes of pixels are faster than one batched product of tiny matrices.
PLANES_UP_TO = 6


@cache
def taylor_plan(bound: float, dtype: torch.dtype) -> tuple[int, int]:
    """How to apply exp(S) when `||S||_inf <= bound`.

    Returns:
        `(segments, terms)`: `segments` applications of exp(S / segments) with `terms` Taylor terms each. The normwise
        relative error is below 1e-6 in float32, and about 1e-15 in float64. Segments keep the norm at or below 1:
        beyond it the alternating terms of exp(-S) cancel, and float32 rounding grows like e^(2 bound).
    """
    segments = max(1, math.ceil(bound - 1e-9))
    rho = bound / segments
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) / segments
    terms = 1
    # e^rho turns an error relative to v into one relative to exp(S) v, which can be smaller by that factor.
    while math.exp(rho) * sum(rho**k / math.factorial(k) for k in range(terms + 1, terms + 30)) > tolerance:
        terms += 1
    return segments, terms


class _Planes:
    """The layout for small n: matrices [n, n, ...] and vectors [n, ...], each entry a plane of all pixels."""

    rows_and_columns = 0, 1

    @staticmethod
    def multiply_add(base: Tensor, s: Tensor, v: Tensor, factor: float) -> Tensor:
        """`base + factor * S v`, one fused multiply-add per column of S."""
        out = torch.addcmul(base, s[:, 0], v[0], value=factor)
        for j in range(1, len(v)):
            out.addcmul_(s[:, j], v[j], value=factor)
        return out

    @staticmethod
    def sum_of_outer_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """`sum_k left_k right_k^T`."""
        total = left[0].unsqueeze(1) * right[0]
        for a, b in zip(left[1:], right[1:], strict=True):
            total.addcmul_(a.unsqueeze(1), b)
        return total


class _Pixels:
    """The layout for larger n: matrices [P, n, n] and row vectors [P, 1, n], for batched products. See `_Planes`."""

    rows_and_columns = 1, 2

    @staticmethod
    def multiply_add(base: Tensor, s: Tensor, v: Tensor, factor: float) -> Tensor:
        return torch.baddbmm(base, v, s.transpose(1, 2), alpha=factor)

    @staticmethod
    def sum_of_outer_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        return torch.bmm(torch.cat(tuple(left), 1).transpose(1, 2), torch.cat(tuple(right), 1))


Layout = type[_Planes] | type[_Pixels]


class _ExpmApply(torch.autograd.Function):
    """exp(sign S) v in segments. Keeps S and one vector per segment, and computes the terms again in the backward.

    A segment is `y = sum_k t_k` with `t_0 = v`, `t_k = h S t_(k-1) / k` and `h = sign / segments`. With g = dL/dy its
    adjoints are `a_m = g`, `a_k = g + h S^T a_(k+1) / (k+1)`, and
    `dL/dS = sum_k h a_k t_(k-1)^T / k`, `dL/dv = a_0`.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, layout: Layout, sign: float, segments: int, terms: int) -> Tensor:
        starts, step = [], sign / segments
        for _ in range(segments):
            starts.append(v)
            out = v
            for k in range(terms, 0, -1):  # Horner's rule: v + S (v + S/2 (v + S/3 (...)))
                out = layout.multiply_add(v, s, out, step / k)
            v = out
        ctx.save_for_backward(s, *starts)
        ctx.plan = layout, step, terms
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        s, *starts = ctx.saved_tensors
        layout, step, terms = ctx.plan
        left, right = [], []
        with torch.autocast(g.device.type, enabled=False):  # under which a backward pass may be called
            g = g.contiguous()  # Batched products of rows with a stride run one by one.
            transposed, zero = s.transpose(*layout.rows_and_columns), g.new_zeros((1,) * g.ndim)
            for start in reversed(starts):
                series = [start]
                for k in range(1, terms):
                    series.append(layout.multiply_add(zero, s, series[-1], step / k))
                a = g
                for k in range(terms, 0, -1):
                    left.append(a * (step / k))
                    right.append(series[k - 1])
                    a = layout.multiply_add(g, transposed, a, step / k)
                g = a
            return layout.sum_of_outer_products(left, right), g, None, None, None, None


def expm_apply(s: Tensor, v: Tensor, bound: float = 1.0, inverse: bool = False) -> Tensor:
    """exp(S) v [B, n, H, W] for every pixel, or exp(-S) v with `inverse`. Can be differentiated once.

    log|det| is trace S. In float32 the normwise error per pixel is under 1e-6 of the result for bounds up to 2. Beyond,
    it is under 1e-6 of `|exp(S)| |v|`, since rounding v alone may cost more.

    Args:
        s: [B, n, n, H, W], matrices with `||S||_inf <= bound`. A larger norm silently loses accuracy.
        v: [B, n, H, W], vectors.
    """
    batch, n, height, width = v.shape
    plan = (-1.0 if inverse else 1.0, *taylor_plan(float(bound), v.dtype))
    if n <= PLANES_UP_TO:
        return _ExpmApply.apply(s.permute(1, 2, 0, 3, 4), v.transpose(0, 1), _Planes, *plan).transpose(0, 1)
    matrices = s.permute(0, 3, 4, 1, 2).reshape(-1, n, n)
    rows = v.permute(0, 2, 3, 1).reshape(-1, 1, n).contiguous()
    out = _ExpmApply.apply(matrices, rows, _Pixels, *plan)
    return out.reshape(batch, height, width, n).permute(0, 3, 1, 2)


def expm_apply_low_rank(u: Tensor, w: Tensor, v: Tensor, bound: float = 1.0, inverse: bool = False) -> Tensor:
    """`expm_apply` for S = U W, through q x q matrices only: `exp(UW) v = v + U phi(WU) W v`.

    `phi(M) = sum_k M^k / (k+1)!`. u is [B, n, q, H, W] and w [B, q, n, H, W], with `||U||_inf ||W||_inf <= bound`.
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
