"""Principal modes of every class's latents, along which images are moved (principal-mode mixup, RFCM).

The covariance of a class of n images in d dimensions has at most rank n - 1. As a rule n < d. No d x d matrix is
needed: a class is its mean, its k strongest modes with their standard deviations, and the remaining variance per
dimension,

    Cov_y  =  V_y^T diag(s_y^2) V_y + diag(rest_y),        V_y [k, d] with orthonormal rows.

A class may have several such parts, of groups of its images: a mixture of Gaussians. Tied parts differ in their means
alone.

Source: Enescu & Sahbi, ACCV 2024, "Reestimated Full Covariance Matrix" (RFCM, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glem_augment.classes.gaussians import ClassSampler
from glem_augment.precision import full_precision
from glem_augment.tensors import send, weights_key

# How far a class's covariance is shrunk to the pooled one (docs/what_was_tried.md; 0.9 is a tie).
SHRUNK = 0.8


# ---- moves along the modes -------------------------------------------------------------------------------------------


def combine_modes(coefficients: Tensor, y: Tensor, directions: Tensor, alone: bool = False) -> Tensor:
    """sum_m c_m v_m [n, d] for coefficients c [n, k] and the modes v_m of each row's class; see `project_on_modes`."""
    return _by_class(torch.matmul, coefficients, y, directions, alone)


def project_on_modes(delta: Tensor, y: Tensor, directions: Tensor, alone: bool = False) -> Tensor:
    """P delta = V^T V delta, the part of delta [n, d] that lies along the modes V of each row's class y, int64 [n].

    Args:
        y: on the CPU where the host knows it, otherwise on the device of `delta`.
        directions: [K, k, d] with orthonormal rows V.
        alone: a row of the result depends on no other row, to the last bit.
    """
    return _by_class(lambda rows, modes: (rows @ modes.mT) @ modes, delta, y, directions, alone)


def _by_class(
    function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, y: Tensor, directions: Tensor, alone: bool
) -> Tensor:
    """Apply `function` to the rows [1, m, *] and the modes [1, k, d] of every class, without a copy of the modes.

    The last bits of a product depend on m, so `alone` makes one product per row. The host would wait for a y on a GPU.
    There each row has its copy of the modes.
    """
    if not len(rows):
        return rows.new_empty(0, directions.shape[2])
    order, sizes = None, 1
    if y.device.type != "cpu":
        sets = y.split(1)
    else:
        if not alone and len(y) > 1:
            order = y.argsort(stable=True)
            y, counts = y[order].unique_consecutive(return_counts=True)
            rows, sizes = rows.index_select(0, send(order, rows.device)), counts.tolist()
        sets = [slice(c, c + 1) for c in y.tolist()]
    with torch.autocast(rows.device.type, enabled=False):
        pairs = zip(rows.split(sizes), sets, strict=True)
        out = torch.cat([function(part[None], directions[c])[0] for part, c in pairs])
    return out if order is None else out.index_select(0, send(order.argsort(), rows.device))


# ---- modes and samples of all classes --------------------------------------------------------------------------------


class ClassModes(ClassSampler):
    """Mean, principal modes and remaining variance of every class's latents. All are float32 buffers; none is trained.

    Buffers, with P parts for each of K classes; row y P + j is part j of class y:
        mean: [K P, d].
        directions: [K P, k, d], orthonormal rows; zero rows where a part has fewer than k modes. [K, k, d] if tied,
            [1, k, d] if all classes share the modes.
        scales: [K P, k], the standard deviation along each mode, descending. [K, k] if tied, [1, k] if shared.
        rest: [K P, d], the variance per dimension outside the modes. [K, d] if tied, [1, d] if shared.
        counts: int64 [K P], images seen; 0 for a part that is not there.
        shared_directions, shared_scales: [j, d] and [j], the modes of the pooled within-class covariance.

    `classes.fit.fit_modes` makes one.
    """

    mean: Tensor
    directions: Tensor
    scales: Tensor
    rest: Tensor
    counts: Tensor
    shared_directions: Tensor
    shared_scales: Tensor

    def __init__(
        self,
        num_classes: int,
        rank: int,
        dim: int,
        parts: int = 1,
        shared_rank: int | None = None,
        tied: bool = False,
        common: bool = False,
    ) -> None:
        super().__init__()
        rows, shared = num_classes * parts, shared_rank or rank
        covariances = 1 if common else num_classes if tied else rows
        self.common = common  # to all classes
        self.register_buffer("mean", torch.zeros(rows, dim))
        self.register_buffer("directions", torch.zeros(covariances, rank, dim))
        self.register_buffer("scales", torch.zeros(covariances, rank))
        self.register_buffer("rest", torch.zeros(covariances, dim))
        self.register_buffer("counts", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("shared_directions", torch.zeros(shared, dim))
        self.register_buffer("shared_scales", torch.zeros(shared))
        self.num_classes, self.rank, self.dim, self.parts, self.tied = num_classes, rank, dim, parts, tied
        self.noise_size = rank + dim + (parts > 1)  # one number more chooses a part
        self._classifier: tuple[object, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """The smallest and the largest number of modes (of any length) that a class has."""
        present = (self.scales > 0).sum(1)
        if bool(self.counts.any()) and not self.tied and not self.common:
            present = present[self.counts > 0]
        return int(present.min()), int(present.max())

    def covariance_rows(self, rows: Tensor) -> Tensor:
        """The rows of `directions`, `scales` and `rest` for rows of `mean`, int64 of any shape."""
        if self.common:
            return torch.zeros_like(rows)
        return rows // self.parts if self.tied else rows

    def on_host(self, y: Tensor, at: Tensor) -> Tensor:
        """The rows `at` of `directions`, as the classes y themselves where these tell: y may be on the CPU."""
        if self.common:
            return torch.zeros_like(y)
        return y if self.parts == 1 or self.tied else at

    def rows_of(self, y: Tensor, z: Tensor) -> Tensor:
        """The row of the part of class y, int64 [n], whose mean is nearest to z [n, d]: int64 [n]."""
        if self.parts == 1:
            return y
        of_class = self.mean.unflatten(0, (-1, self.parts))[y]
        far = (z[:, None] - of_class).square().sum(2)
        missing = (self.counts == 0).unflatten(0, (-1, self.parts))[y]
        return y * self.parts + far.masked_fill(missing, math.inf).argmin(1)

    # ---- classes as a whole ------------------------------------------------------------------------------------------

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; m_y, C_y) of latents z [B, d] under every class, [B, K] nats: a regularised discriminant analysis.

        C_y = (1 - a) S_y + a W with the covariance S_y of the class (of its parts and between them), the pooled one W,
        whose modes must span the space, and a = `SHRUNK` (Friedman 1989).
        """
        means, whiteners, logdets = self._discriminant()
        with full_precision(z.device.type):
            q = [((z - m) @ w).square().sum(1) for m, w in zip(means, whiteners, strict=True)]
        return -0.5 * (torch.stack(q, 1) + logdets + self.dim * math.log(2 * math.pi))

    @torch.no_grad()
    def _discriminant(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means [K, d], U_y [K, d, d] with U_y U_y^T = C_y^-1, and log det C_y [K]; cached until the modes change."""
        key = weights_key(self)
        if self._classifier is None or self._classifier[0] != key:
            with torch.inference_mode(False):
                pooled = _outer(self.shared_scales, self.shared_directions)
                counts, means = (t.unflatten(0, (-1, self.parts)) for t in (self.counts, self.mean.double()))
                totals = counts.sum(1)
                centres = (counts[..., None] * means).sum(1) / totals[:, None]
                whiteners, logdets = [], []
                for y, centre in enumerate(centres):
                    covariance = SHRUNK * pooled
                    for row in range(y * self.parts, (y + 1) * self.parts):
                        share = (1 - SHRUNK) * float(self.counts[row]) / float(totals[y])
                        away = self.mean[row].double() - centre
                        at = row // self.parts if self.tied else row
                        own = _outer(self.scales[at], self.directions[at]) + self.rest[at].double().diag()
                        covariance = covariance + share * (own + torch.outer(away, away))
                    factor = torch.linalg.cholesky(covariance)
                    logdets.append(2 * factor.diagonal().log().sum())
                    whiteners.append(torch.linalg.inv(factor).T)
                found = tuple(t.to(self.mean) for t in (centres, torch.stack(whiteners), torch.stack(logdets)))
            self._classifier = key, found  # type: ignore[assignment]
        return self._classifier[1]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_classifier": None}

    # ---- samples -----------------------------------------------------------------------------------------------------

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Samples [B, d] of the classes y, int64 [B]: mean + T (sum_m s_m e_m v_m + sqrt(rest) e').

        A sample depends on no other sample, to the last bit. `noise` [B, noise_size] is standard normal: the k
        coefficients e, the d numbers e', and a number that chooses the part. A part comes as often as it has images.
        """
        along, outside = noise[:, : self.rank], noise[:, self.rank : self.rank + self.dim]
        row = send(y, noise.device)
        if self.parts > 1:
            upto = self.counts.unflatten(0, (-1, self.parts)).double().cumsum(1)
            share = torch.special.ndtr(noise[:, -1].double()) * upto[row, -1]
            row = row * self.parts + (share[:, None] >= upto[row]).sum(1).clamp_max(self.parts - 1)
        at = self.covariance_rows(row)
        along = combine_modes(along * self.scales[at], self.on_host(y, at), self.directions, alone=True)
        return self.mean[row] + temperature * (along + outside * self.rest[at].sqrt())


def _outer(scales: Tensor, directions: Tensor) -> Tensor:
    """V^T diag(s^2) V [d, d] float64."""
    rows = scales[:, None].double() * directions.double()
    return rows.T @ rows
