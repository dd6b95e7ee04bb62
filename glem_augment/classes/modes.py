"""Principal modes of every class's latents, along which images are moved (principal-mode mixup, RFCM).

The covariance of a class of n images in d dimensions has at most rank n - 1. As a rule n < d. No d x d matrix is
needed: a class is its mean, its k strongest modes with their standard deviations, and the remaining variance per
dimension,

    Cov_y  =  V_y^T diag(s_y^2) V_y + diag(rest_y),        V_y [k, d] with orthonormal rows.

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

    Buffers, for K classes:
        mean: [K, d].
        directions: [K, k, d], orthonormal rows; zero rows where a class has fewer than k modes. [1, k, d] if `common`,
            where all classes have the same modes.
        scales: [K, k], the standard deviation along each mode, descending; [1, k] if common.
        rest: [K, d], the variance per dimension outside the modes; [1, d] if common.
        counts: int64 [K], images seen.
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
        self, num_classes: int, rank: int, dim: int, shared_rank: int | None = None, common: bool = False
    ) -> None:
        super().__init__()
        shared, rows = shared_rank or rank, 1 if common else num_classes
        self.common = common  # to all classes
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("directions", torch.zeros(rows, rank, dim))
        self.register_buffer("scales", torch.zeros(rows, rank))
        self.register_buffer("rest", torch.zeros(rows, dim))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("shared_directions", torch.zeros(shared, dim))
        self.register_buffer("shared_scales", torch.zeros(shared))
        self.num_classes, self.rank, self.dim = num_classes, rank, dim
        self.noise_size = rank + dim
        self._classifier: tuple[object, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """The smallest and the largest number of modes (of any length) that a class has."""
        present = (self.scales > 0).sum(1)
        if bool(self.counts.any()) and not self.common:
            present = present[self.counts > 0]
        return int(present.min()), int(present.max())

    def rows(self, y: Tensor) -> Tensor:
        """The rows of `directions`, `scales` and `rest` of classes y, int64 of any shape."""
        return torch.zeros_like(y) if self.common else y

    # ---- classes as a whole ------------------------------------------------------------------------------------------

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; m_y, C_y) of latents z [B, d] under every class, [B, K] nats: a regularised discriminant analysis.

        C_y = (1 - a) S_y + a W with the covariance S_y of the class, the pooled one W, whose modes must span the space,
        and a = `SHRUNK` (Friedman 1989).
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
                whiteners, logdets = [], []
                for scales, directions, rest in zip(self.scales, self.directions, self.rest, strict=True):
                    own = _outer(scales, directions) + rest.double().diag()
                    covariance = SHRUNK * pooled + (1 - SHRUNK) * own
                    factor = torch.linalg.cholesky(covariance)
                    logdets.append(2 * factor.diagonal().log().sum())
                    whiteners.append(torch.linalg.inv(factor).T)
                found = tuple(t.to(self.mean) for t in (self.mean, torch.stack(whiteners), torch.stack(logdets)))
            self._classifier = key, found  # type: ignore[assignment]
        return self._classifier[1]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_classifier": None}

    # ---- samples -----------------------------------------------------------------------------------------------------

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Samples [B, d] of the classes y, int64 [B]: mean + T (sum_m s_m e_m v_m + sqrt(rest) e').

        A sample depends on no other sample, to the last bit. `noise` [B, noise_size] is standard normal: the k
        coefficients e and the d numbers e'.
        """
        along, outside = noise[:, : self.rank], noise[:, self.rank :]
        modes, cls = self.rows(y), send(y, noise.device)
        rows = self.rows(cls)
        along = combine_modes(along * self.scales[rows], modes, self.directions, alone=True)
        return self.mean[cls] + temperature * (along + outside * self.rest[rows].sqrt())


def _outer(scales: Tensor, directions: Tensor) -> Tensor:
    """V^T diag(s^2) V [d, d] float64."""
    rows = scales[:, None].double() * directions.double()
    return rows.T @ rows
