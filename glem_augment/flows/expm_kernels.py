"""How the matrix-exponential coupling applies exp(S) to the vectors of all pixels, undoes it and differentiates it.

Three kernels with one interface, chosen by n alone: a closed form for 2 x 2 matrices, the Taylor series over planes of
pixels for small n, and the series as batched products for the rest. All apply exp(S) in equal segments whose norm is at
most 1 (see ``matexp.taylor_plan``) and run without autograd.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from glem_augment.flows.matexp import Pixels, layout, taylor_plan


class Kernel(Protocol):
    """Made from S once per pass; ``segments`` applications make exp(S), or exp(-S)."""

    segments: int

    def apply(self, v: Tensor, inverse: bool) -> Tensor:
        """One segment: exp(S / segments) v, or its inverse."""
        ...

    def adjoint(self, start: Tensor, g: Tensor, inverse: bool) -> Tensor:
        """dL/dstart of ``y = apply(start, inverse)`` from g = dL/dy; dL/dS is collected."""
        ...

    def grad_s(self) -> Tensor:
        """dL/dS of all ``adjoint`` calls, which were all in one direction."""
        ...


def make_kernel(s: Tensor, n: int, bound: float) -> Kernel:
    """The kernel for S in the layout that serves n x n matrices: [n, n, P] planes, or [P, n, n]."""
    segments, terms = taylor_plan(bound, s.dtype)
    if layout(n) is Pixels:
        return _BatchedSeries(s, segments, terms)
    return _TwoByTwo(s, segments) if n == 2 else _PlaneSeries(s, segments, terms)


class _BatchedSeries:
    """S [P, n, n], row vectors [P, 1, n]: ``matexp.Pixels``."""

    def __init__(self, s: Tensor, segments: int, terms: int) -> None:
        self.s, self.segments, self.terms = s, segments, terms
        self._grad: Tensor | None = None

    def apply(self, v: Tensor, inverse: bool) -> Tensor:
        return Pixels.apply(self.s, v, self._scale(inverse), self.terms)

    def adjoint(self, start: Tensor, g: Tensor, inverse: bool) -> Tensor:
        self._grad, g = Pixels.adjoint(self.s, start, g, self._scale(inverse), self.terms, self._grad)
        return g

    def grad_s(self) -> Tensor:
        assert self._grad is not None
        return self._grad

    def _scale(self, inverse: bool) -> float:
        return (-1.0 if inverse else 1.0) / self.segments


class _PlaneSeries:
    """S [n, n, P], vectors [n, P], as ``matexp.Planes`` has it, but into two buffers whose rows are taken apart once:

    for planes of a few thousand pixels, making views costs as much as the arithmetic.
    """

    def __init__(self, s: Tensor, segments: int, terms: int) -> None:
        self.s, self.segments, self.terms = s, segments, terms
        self._columns = s.unbind(1)
        self._grad: Tensor | None = None

    def apply(self, v: Tensor, inverse: bool) -> Tensor:
        return self._horner(self._columns, v, (-1.0 if inverse else 1.0) / self.segments)

    def _horner(self, columns: tuple[Tensor, ...], v: Tensor, scale: float) -> Tensor:
        """v + S (v + S/2 (v + S/3 (...))), S given by its columns."""
        out, rows = v, v.split(1)
        spare = [(buffer, buffer.split(1)) for buffer in (torch.empty_like(v), torch.empty_like(v))]
        for k in range(self.terms, 0, -1):
            out, next_rows = spare[k % 2]
            _add_product(out, v, columns, rows, scale / k)
            rows = next_rows
        return out

    def adjoint(self, start: Tensor, g: Tensor, inverse: bool) -> Tensor:
        # As in Planes.adjoint: the terms t_k are made anew, then a_k = g + S^T a_(k+1) / (k+1).
        scale = (-1.0 if inverse else 1.0) / self.segments
        series = start.new_empty((self.terms, *start.shape))
        series[0] = start
        zero = torch.zeros((), dtype=start.dtype, device=start.device)
        terms = series.unbind(0)
        for k in range(1, self.terms):
            _add_product(terms[k], zero, self._columns, terms[k - 1].split(1), scale / k)
        rows, a = self.s.unbind(0), g
        spare = [torch.empty_like(g), torch.empty_like(g)]
        right = series.unsqueeze(1).unbind(0)
        for k in range(self.terms, 0, -1):
            left = a.unsqueeze(1)
            if self._grad is None:
                self._grad = (left * (scale / k)) * right[k - 1]
            else:
                self._grad.addcmul_(left, right[k - 1], value=scale / k)
            out = spare[k % 2]
            _add_product(out, g, rows, a.split(1), scale / k)
            a = out
        return a

    def grad_s(self) -> Tensor:
        assert self._grad is not None
        return self._grad


def _add_product(
    out: Tensor, base: Tensor, columns: tuple[Tensor, ...], rows: tuple[Tensor, ...], value: float
) -> None:
    """out = base + value * sum_j columns_j rows_j; ``out`` must not be one of ``rows``."""
    torch.addcmul(base, columns[0], rows[0], value=value, out=out)
    for column, row in zip(columns[1:], rows[1:], strict=True):
        out.addcmul_(column, row, value=value)


class _TwoByTwo:
    """S [2, 2, P]: with h S = m I + B (h = 1/segments, B traceless) and x = -det B, B^2 is x I and therefore

        exp(h S) = e^m (C(x) I + Q(x) B),  C(x) = sum_k x^k / (2k)!,  Q(x) = sum_k x^k / (2k+1)!

    (cosh and sinh of sqrt(x), or cos and sin of sqrt(-x), without the root). |x| is at most 1, since the eigenvalues of
    S lie within its row sums; so a few terms do, and no sign of x is told apart.
    """

    def __init__(self, s: Tensor, segments: int) -> None:
        self.s, self.segments = s, segments
        (s00, s01), (s10, s11) = (row.unbind(0) for row in s.unbind(0))
        h = 1 / segments
        half = (s00 - s11).mul_(h / 2)  # B is [[half, h s01], [h s10, -half]]
        x = torch.addcmul(half * half, s01, s10, value=h * h)
        first, *others = _coefficients(s.dtype, s.device, False).unbind(0)
        series = first.expand(2, x.shape[0])  # C and Q, by Horner's rule
        for coefficient in others:
            series = torch.addcmul(coefficient, series, x)
        self._mean, self._half, self._x, self._series = (s00 + s11).mul_(h / 2), half, x, series
        self._matrices: dict[bool, tuple[Tensor, Tensor]] = {}
        self._outer: Tensor | None = None
        self._inverse = False

    def _columns(self, inverse: bool) -> tuple[Tensor, Tensor]:
        """The two columns [2, P] of one segment's matrix; the inverse's are e^-m (C I - Q B)."""
        if inverse not in self._matrices:
            c, q = (self._series * (-self._mean if inverse else self._mean).exp()).unbind(0)
            if inverse:
                q = -q
            matrix = torch.empty_like(self.s)
            (m00, m01), (m10, m11) = (row.unbind(0) for row in matrix.unbind(0))
            diagonal = q * self._half
            torch.add(c, diagonal, out=m00)
            torch.sub(c, diagonal, out=m11)
            q = q / self.segments
            torch.mul(q, self.s[0, 1], out=m01)
            torch.mul(q, self.s[1, 0], out=m10)
            first, second = matrix.unbind(1)
            self._matrices[inverse] = first, second
        return self._matrices[inverse]

    def apply(self, v: Tensor, inverse: bool) -> Tensor:
        first, second = self._columns(inverse)
        return (first * v[:1]).addcmul_(second, v[1:])

    def adjoint(self, start: Tensor, g: Tensor, inverse: bool) -> Tensor:
        self._inverse = inverse
        # S only enters through the matrix M: dL/dM is collected, and taken to S once, in grad_s.
        left, right = g.unsqueeze(1), start.unsqueeze(0)
        self._outer = left * right if self._outer is None else self._outer.addcmul_(left, right)
        (m00, m10), (m01, m11) = (column.unbind(0) for column in self._columns(inverse))
        out = torch.empty_like(g)
        torch.mul(m00, g[0], out=out[0]).addcmul_(m10, g[1])
        torch.mul(m01, g[0], out=out[1]).addcmul_(m11, g[1])
        return out

    def grad_s(self) -> Tensor:
        assert self._outer is not None
        sign, h = (-1.0 if self._inverse else 1.0), 1 / self.segments
        s01, s10 = self.s[0, 1], self.s[1, 0]
        first, second = self._columns(self._inverse)
        # M = e^m F(B) with m and B negated for the inverse; d e^m = e^m dm, and the rest is F's share.
        g_mean = (self._outer[:, 0] * first).addcmul_(self._outer[:, 1], second).sum(0)
        exp = (self._mean * sign).exp()
        (f00, f01), (f10, f11) = (row.unbind(0) for row in (self._outer * exp).unbind(0))
        q = self._series[1]
        across = f00 - f11
        # <F, B> and <F, I>, which reach C and Q; B is sign * [[half, h s01], [h s10, -half]].
        inner = (f01 * s01).addcmul_(f10, s10).mul_(h * sign).addcmul_(across, self._half, value=sign)
        first, *others = _coefficients(self.s.dtype, self.s.device, True).unbind(0)
        slope = first.expand_as(q)
        for coefficient in others:
            slope = torch.addcmul(coefficient, slope, self._x)
        g_x = ((f00 + f11) * q).mul_(0.5).addcmul_(inner, slope)  # C' = Q / 2, Q' = slope
        # x = half^2 + h^2 s01 s10.
        g_half = (across * q).mul_(sign).addcmul_(g_x, self._half, value=2).mul_(h / 2)
        g_mean = g_mean.mul_(sign * h / 2)
        out = torch.empty_like(self.s)
        torch.add(g_mean, g_half, out=out[0, 0])
        torch.sub(g_mean, g_half, out=out[1, 1])
        torch.mul(f01, q, out=out[0, 1]).mul_(sign * h).addcmul_(g_x, s10, value=h * h)
        torch.mul(f10, q, out=out[1, 0]).mul_(sign * h).addcmul_(g_x, s01, value=h * h)
        return out


def _terms(dtype: torch.dtype) -> int:
    """Of the series of C and Q, for |x| <= 1."""
    tolerance = torch.finfo(dtype).eps / 4
    return next(k for k in range(1, 40) if 1 / math.factorial(2 * k) < tolerance)


def cosh_and_sinhc(x: Tensor) -> tuple[Tensor, Tensor]:
    """C(x) and Q(x) of ``_TwoByTwo``, for |x| <= 1, in operations that autograd and a compiler see through."""
    even = odd = torch.zeros_like(x)
    for k in range(_terms(x.dtype) - 1, -1, -1):
        even = even * x + 1 / math.factorial(2 * k)
        odd = odd * x + 1 / math.factorial(2 * k + 1)
    return even, odd


@cache
def _coefficients(dtype: torch.dtype, device: torch.device, slope: bool) -> Tensor:
    """Those of C and Q as [terms, 2, 1], or of Q' as [terms, 1], the highest power first, for |x| <= 1."""
    terms = _terms(dtype)
    if slope:
        rows: list = [[k / math.factorial(2 * k + 1)] for k in range(terms - 1, 0, -1)]
    else:
        rows = [[[1 / math.factorial(2 * k)], [1 / math.factorial(2 * k + 1)]] for k in range(terms - 1, -1, -1)]
    # A tensor made under inference_mode could not be used in later passes that are differentiated.
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=dtype, device=device)
