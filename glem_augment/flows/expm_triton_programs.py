"""The Triton kernels of ``expm_triton``. Importing this needs Triton.

A program has BLOCK pixels: matrices [BLOCK, PADDED, PADDED] and vectors [BLOCK, PADDED], of which N rows and columns
are there and the rest zeros, in registers from the beginning to the end. ROOM is TERMS, padded likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _times(s, v):
    """S v."""
    return tl.sum(s * v[:, None, :], axis=2)


@triton.jit
def _transposed_times(s, v):
    """S^T v."""
    return tl.sum(s * v[:, :, None], axis=1)


@triton.jit
def _segment(s, v, scale, TERMS: tl.constexpr):
    """exp(scale S) v by Horner's rule, as ``matexp.Planes.apply``."""
    out = v
    for i in range(TERMS):
        out = v + _times(s, out) * (scale / (TERMS - i))
    return out


@triton.jit
def _at(pixels, N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Number of each pixel, whether it exists, and where the entries of its matrix and vectors are."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = pixel < pixels
    i = tl.arange(0, PADDED)
    row, column = i[None, :, None], i[None, None, :]
    entries = pixel[:, None, None] * (N * N + N) + row * N + column
    is_entry = there[:, None, None] & (row < N) & (column < N)
    shifts = pixel[:, None] * (N * N + N) + N * N + i[None, :]
    planes = i[None, :].to(tl.int64) * pixels + pixel[:, None]
    is_number = there[:, None] & (i[None, :] < N)
    return pixel, there, entries, is_entry, shifts, planes, is_number, row == column


@triton.jit
def _bounded(params, entries, is_entry, bound):
    """S = bound * raw / (1 + sum_j |raw_ij|), and the factor of each row."""
    raw = tl.load(params + entries, mask=is_entry, other=0.0)
    factor = bound / (1.0 + tl.sum(tl.abs(raw), axis=2))
    return raw * factor[:, :, None], factor


@triton.jit
def forward(
    x2, params, y2, trace, pixels, bound,
    N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, TERMS: tl.constexpr,
    ROOM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """x2, y2 [N, pixels], params [pixels, N * N + N], trace [pixels]."""
    pixel, there, entries, is_entry, shifts, planes, is_number, diagonal = _at(pixels, N, PADDED, BLOCK)
    s, _ = _bounded(params, entries, is_entry, bound)
    shift = tl.load(params + shifts, mask=is_number, other=0.0)
    v = tl.load(x2 + planes, mask=is_number, other=0.0)
    sign = -1.0 if INVERSE else 1.0
    if INVERSE:
        v -= shift
    for _ in range(SEGMENTS):
        v = _segment(s, v, sign / SEGMENTS, TERMS)
    if not INVERSE:
        v += shift
    tl.store(y2 + planes, v, mask=is_number)
    tl.store(trace + pixel, sign * tl.sum(tl.sum(tl.where(diagonal, s, 0.0), axis=2), axis=1), mask=there)


@triton.jit
def backward(
    g, g_logdet, x2, params, g_x2, g_params, pixels, area, bound,
    N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, TERMS: tl.constexpr,
    ROOM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """g, x2, g_x2 [N, pixels]; g_logdet [pixels / area]; params, g_params [pixels, N * N + N]. See
    ``matexp.Planes.adjoint``."""
    pixel, there, entries, is_entry, shifts, planes, is_number, diagonal = _at(pixels, N, PADDED, BLOCK)
    s, factor = _bounded(params, entries, is_entry, bound)
    first = tl.load(x2 + planes, mask=is_number, other=0.0)
    a = tl.load(g + planes, mask=is_number, other=0.0)
    if INVERSE:
        first -= tl.load(params + shifts, mask=is_number, other=0.0)
    else:
        tl.store(g_params + shifts, a, mask=is_number)
    sign = -1.0 if INVERSE else 1.0
    scale = sign / SEGMENTS
    place = tl.arange(0, ROOM)[None, :, None]
    g_s = tl.zeros_like(s)
    for later in range(SEGMENTS):
        term = first
        for _ in range(SEGMENTS - 1 - later):
            term = _segment(s, term, scale, TERMS)
        # The terms t_k of the segment's series, made once more, and from the last to the first what they are to be
        # multiplied with.
        series = tl.zeros([BLOCK, ROOM, PADDED], dtype=tl.float32)
        for k in range(TERMS):
            series = tl.where(place == k, term[:, None, :], series)
            term = _times(s, term) * (scale / (k + 1))
        g_segment = a
        for i in range(TERMS):
            k = TERMS - i
            before = tl.sum(tl.where(place == k - 1, series, 0.0), axis=1)
            g_s += (a * (scale / k))[:, :, None] * before[:, None, :]
            a = g_segment + _transposed_times(s, a) * (scale / k)
    tl.store(g_x2 + planes, a, mask=is_number)
    if INVERSE:
        tl.store(g_params + shifts, -a, mask=is_number)
    g_trace = sign * tl.load(g_logdet + pixel // area, mask=there, other=0.0)
    g_s += tl.where(diagonal, g_trace[:, None, None], 0.0)
    # Of raw, whose row reaches all of S's.
    row = tl.sum(g_s * s, axis=2) * factor * (-1.0 / bound)
    toward = tl.where(s > 0.0, 1.0, tl.where(s < 0.0, -1.0, 0.0))
    tl.store(g_params + entries, toward * row[:, :, None] + g_s * factor[:, :, None], mask=is_entry)
