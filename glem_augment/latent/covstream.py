"""Mean, thin covariance factor and variances of one class from a stream of its latents.

Two sets of centred rows merge exactly (Chan, Golub & LeVeque 1979; for thin factors Ross et al., "Incremental learning
for robust visual tracking", 2008): the scatter of the union is the sum of the two plus
``n m / (n + m) (mean_1 - mean_2)(mean_1 - mean_2)^T``, one more row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glem_augment.errors import DataError
from glem_augment.latent.modes import modes_of_rows


@dataclass
class ClassMoments:
    """What a class's latents come to; float64 on the CPU.

    Attributes:
        count: n images. mean: [d].
        factor: F [r, d], F^T F = the (n - 1) covariance, less what was cut off.
        variance: [d], all of the covariance's diagonal; rest: [d] >= 0, what F leaves of it.
    """

    count: int
    mean: Tensor
    factor: Tensor
    variance: Tensor
    rest: Tensor

    @property
    def dim(self) -> int:
        return len(self.mean)

    def trace_of_square(self) -> float:
        """tr (F^T F + diag rest)^2."""
        rows = self.factor
        gram = rows @ rows.T if len(rows) <= self.dim else rows.T @ rows
        cross = 2 * float((rows.square().sum(0) * self.rest).sum())
        return float(gram.square().sum()) + cross + float(self.rest.square().sum())

    def truncated(self, rank: int) -> ClassMoments:
        """With the ``rank`` strongest modes as factor; the variance of the others goes to ``rest``."""
        if len(self.factor) <= rank:
            return self
        factor = strongest_rows(self.factor, rank)
        return replace(self, factor=factor, rest=(self.variance - factor.square().sum(0)).clamp_min(0))


def not_finite(name: str) -> DataError:
    """The error for latents of a class that are NaN or infinite."""
    return DataError(f"{name} has latents that are not finite: check the flow with model.check_invertibility")


def strongest_rows(rows: Tensor, keep: int) -> Tensor:
    """The ``keep`` strongest modes of rows [n, d] times their singular values: [<= keep, d] float64."""
    if keep >= rows.shape[1]:
        return torch.linalg.qr(rows, mode="r").R  # the same F^T F, exactly, in d rows
    directions, scales = modes_of_rows(rows[None], keep)
    real = scales[0] > 0
    return directions[0][real] * scales[0][real, None]


class ClassStream:
    """Takes in latents of one class in chunks.

    Args:
        dim: d.
        max_rows: rows of the factor to keep; None: min(n, d), which is exact.
        name: for error messages.
    """

    def __init__(self, dim: int, max_rows: int | None = None, name: str = "the class") -> None:
        self.dim, self.max_rows, self.name = dim, max_rows, name
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.square = torch.zeros(dim, dtype=torch.float64)  # diagonal of the scatter
        self.factor = torch.zeros(0, dim, dtype=torch.float64)
        self.lossy = False
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    def add(self, z: Tensor) -> None:
        """Take in latents [n, d], which nobody may write to afterwards.

        Raises:
            ValueError: of another shape; DataError: not finite.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"latents of {self.name} must be [n, {self.dim}], got {tuple(z.shape)}")
        if not bool(torch.isfinite(z).all()):
            raise not_finite(self.name)
        if len(z):
            self._waiting.append(z)
            self._waiting_rows += len(z)
        keep = self._keep
        # As many rows wait as are kept, which spreads the cost of an eigendecomposition over them.
        if self._waiting_rows + len(self.factor) > 2 * keep:
            self._fold()

    @property
    def images(self) -> int:
        """How many have been taken in."""
        return self.count + self._waiting_rows

    @property
    def _keep(self) -> int:
        return self.dim if self.max_rows is None else min(self.max_rows, self.dim)

    def _fold(self) -> None:
        if not self._waiting_rows:
            return
        rows = torch.cat(self._waiting).to(torch.float64)
        self._waiting, self._waiting_rows = [], 0
        n, mean = len(rows), rows.mean(0)
        rows = rows - mean
        self.square += rows.square().sum(0)
        if self.count:
            shift = (mean - self.mean) * math.sqrt(self.count * n / (self.count + n))
            self.square += shift.square()
            rows = torch.cat([self.factor, rows, shift[None]])
        self.mean += (mean - self.mean) * (n / (self.count + n))
        self.count += n
        if len(rows) > self._keep:
            self.lossy = self.lossy or self._keep < self.dim
            rows = strongest_rows(rows, self._keep)
        self.factor = rows

    def check_enough(self) -> None:
        """DataError for fewer than 2 images."""
        if self.images < 2:
            raise DataError(
                f"{self.name} has {self.images} images; its covariance needs at least 2: add images or leave it out"
            )

    def moments(self) -> ClassMoments:
        """The moments so far, unbiased (n - 1).

        Raises:
            DataError: fewer than 2 images.
        """
        self.check_enough()
        self._fold()
        factor = self.factor / math.sqrt(self.count - 1)
        variance = self.square / (self.count - 1)
        rest = (variance - factor.square().sum(0)).clamp_min(0) if self.lossy else torch.zeros_like(variance)
        return ClassMoments(self.count, self.mean, factor, variance, rest)
