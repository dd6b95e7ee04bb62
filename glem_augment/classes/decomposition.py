"""The leading modes of centred latents, by the fastest decomposition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
# Up to this size an eigendecomposition takes seconds; above it, randomised subspace iteration finds the leading modes.
MAX_EIGH = 4096


def leading_modes(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors [r, d] and values [r], descending, of rows [n, d] float64.

    r <= min(rank, n, d): values that are numerically zero are left out. The largest entry of a vector is positive, so
    that fits can be compared.
    """
    rows = rows[rows.abs().amax(1) > 0]
    values, directions = _decomposed(rows, min(rank, *rows.shape))
    real = values > math.sqrt(RELATIVE_TOLERANCE) * values[:1]
    values, directions = values[real], directions[real]
    # Vectors from a Gram matrix are orthogonal up to rounding relative to the largest singular value. So weak vectors
    # are not quite orthogonal to strong ones. A QR decomposition (Gram-Schmidt in the order of strength) mends that.
    directions = torch.linalg.qr(directions.T).Q.T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), values


def _decomposed(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values [rank] and right singular vectors [rank, d], not quite orthonormal, by the fastest method."""
    n, dim = rows.shape
    if not n:
        return rows.new_zeros(0), rows
    if min(n, dim) > MAX_EIGH:
        with torch.random.fork_rng(devices=[]):  # a fit is repeatable
            torch.manual_seed(0)
            _, values, right = torch.svd_lowrank(rows, q=min(n, dim, 2 * rank + 16), niter=12)
        return values[:rank], right[:, :rank].T
    try:
        # The eigenvectors of the smaller of the two Gram matrices take a fraction of the time of an SVD.
        values, vectors = torch.linalg.eigh(rows @ rows.T if n <= dim else rows.T @ rows)
    except torch.linalg.LinAlgError:  # repeated eigenvalues can keep it from converging
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        return values[:rank], right[:rank]
    values = values.flip(0)[:rank].clamp_min(0).sqrt()
    vectors = vectors.flip(1)[:, :rank].T
    if n <= dim:
        vectors = vectors @ rows
    return values, vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
