"""Coverage and density of generated images (Naeem et al., ICML 2020), in chunks: no N x M matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.evaluation.features import check_features

_CHUNK = 1024


# Of |a|^2 + |b|^2: what rounding can leave of a distance that is zero.
_ROUNDING = 1e-13


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [n, m] of float64 rows; equal rows have distance 0, whatever the rounding."""
    size = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(size, a, b.T, alpha=-2)
    return squared.masked_fill_(squared < _ROUNDING * size, 0.0)


def _kth_neighbour(x: Tensor, k: int) -> Tensor:
    """Squared distance of every row to its k-th nearest other row: [N]."""
    out = torch.empty(len(x), dtype=x.dtype)
    for start in range(0, len(x), _CHUNK):
        part = _squared(x[start : start + _CHUNK], x)
        # A row is its own nearest neighbour; by index, since rounding must not decide it.
        rows = torch.arange(len(part))
        part[rows, start + rows] = float("inf")
        out[start : start + _CHUNK] = part.topk(k, largest=False).values[:, -1]
    return out


def coverage(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Share of real images with a generated one nearer than their k-th real neighbour, and the density.

    ``coverage = mean_i [min_j |r_i - g_j| < NND_k(r_i)]``, ``density = 1/(k M) sum_ij [|r_i - g_j| < NND_k(r_i)]``
    (Naeem et al. 2020, Eq. 3 and 4; the ``prdc`` package). Depends on N, M and k: state them.

    Args:
        real, generated: features [N, m], [M, m].
        k: neighbours, 1 <= k < N.

    Returns:
        ``coverage`` in [0, 1], ``density`` >= 0, ``k``, ``real`` (N) and ``generated`` (M).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, generated = check_features(real, "real", k + 1), check_features(generated, "generated")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real has {real.shape[1]} features, generated {generated.shape[1]}: take one network for both"
        )
    centre = real.mean(0)  # distances do not change, the digits that cancel get fewer
    real, generated = real - centre, generated - centre
    radii = _kth_neighbour(real, k)
    covered = torch.zeros(len(real), dtype=torch.bool)
    inside = 0
    for start in range(0, len(real), _CHUNK):
        for other in generated.split(4 * _CHUNK):
            near = _squared(real[start : start + _CHUNK], other) < radii[start : start + _CHUNK, None]
            covered[start : start + _CHUNK] |= near.any(1)
            inside += int(near.sum())
    return {
        "coverage": float(covered.double().mean()),
        "density": inside / (k * len(generated)),
        "k": k,
        "real": len(real),
        "generated": len(generated),
    }


def nearest_distances(x: Tensor, others: Tensor) -> Tensor:
    """Distance of every row of ``x`` [N, m] to the nearest row of ``others`` [M, m]: [N] float64."""
    x, others = check_features(x, "x"), check_features(others, "others")
    centre = others.mean(0)
    x, others = x - centre, others - centre
    out = torch.full((len(x),), float("inf"), dtype=torch.float64)
    for start in range(0, len(x), _CHUNK):
        for part in others.split(4 * _CHUNK):
            near = _squared(x[start : start + _CHUNK], part).amin(1)
            out[start : start + _CHUNK] = torch.minimum(out[start : start + _CHUNK], near)
    return out.sqrt()
