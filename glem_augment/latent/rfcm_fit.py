"""Estimating class covariances (RFCM): class by class, or from a stream in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from glem_augment.errors import DataError
from glem_augment.latent.covstream import ClassMoments, ClassStream, not_finite
from glem_augment.latent.rfcm import ThinCovariances, check_labels

__all__ = ["CovarianceStream", "fit_covariances", "oas_shrinkage"]

TARGETS = ("diagonal", "pooled", "identity")
STORES = {"float32": torch.float32, "float16": torch.float16}


def oas_shrinkage(moments: ClassMoments) -> float:
    """Oracle-approximating shrinkage intensity in [0, 1] towards a multiple of the identity.

    Source: Chen, Wiesel, Eldar & Hero, "Shrinkage algorithms for MMSE covariance estimation", 2010, Eq. 23. Needs only
    tr S and tr S^2, which the thin factor's Gram matrix gives.
    """
    n, p = moments.count, moments.dim
    trace, square = float(moments.variance.sum()), moments.trace_of_square()
    spread = (n + 1 - 2 / p) * (square - trace**2 / p)
    # In one dimension both are rounding errors.
    return 1.0 if spread <= 0 else min(1.0, max(0.0, ((1 - 2 / p) * square + trace**2) / spread))


def fit_covariances(
    latents_of_class: Callable[[int], Tensor | Iterable[Tensor]],
    num_classes: int,
    dim: int,
    rank: int | None = None,
    shrinkage: float | str = 0.0,
    target: str = "diagonal",
    ridge: float = 1e-4,
    store: str = "float32",
) -> ThinCovariances:
    """Estimate class by class; one class in memory at a time besides the result.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. K - 1, or an iterable of such chunks.
        num_classes, dim: K, d.
        rank: modes to keep per class, their rest as a diagonal; None for the exact factor of min(n, d) rows.
        shrinkage: g in [0, 1] of every class, or "oas".
        target: "diagonal" (the class's own variances), "pooled" (the variances within classes, pooled over all)
            or "identity" (its mean variance).
        ridge: added variance, as a share of the class's mean variance. Scoring needs ridge or shrinkage.
        store: "float32", or "float16" for half the size.

    Raises:
        DataError: a class with fewer than 2 images, or latents that are not finite.
        ValueError: settings or shapes that make no sense.
    """
    stream = CovarianceStream(num_classes, dim)
    settings = _Settings(rank, shrinkage, target, ridge, store)
    parts = []
    for y in range(num_classes):
        chunks = latents_of_class(y)
        for chunk in [chunks] if isinstance(chunks, Tensor) else chunks:
            stream.add_class(y, chunk)
        # Cut and packed now, so that only one class is ever held in float64.
        parts.append(settings.packed(stream.take(y)))
    return _assemble(parts, settings)


class CovarianceStream:
    """One pass over latents in any order, for data that do not fit in memory.

    Args:
        num_classes, dim: K, d.
        max_rows: factor rows kept per class; the variance of what is cut off stays in the diagonal, exactly, but "oas"
            shrinks by what is known of the rest. None keeps min(n, d) rows, which loses nothing. Memory: at most 2
            ``max_rows`` d floats per class.

    >>> stream = CovarianceStream(2, 6)
    >>> for _ in range(3):
    ...     stream.add(torch.randn(8, 6), torch.arange(8) % 2)
    >>> stream.finish(shrinkage="oas").counts
    tensor([12, 12])
    """

    def __init__(self, num_classes: int, dim: int, max_rows: int | None = None) -> None:
        if num_classes < 1 or dim < 1:
            raise ValueError(f"need at least one class and one dimension, got K={num_classes}, d={dim}")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1 or None, got {max_rows}")
        self.dim = dim
        self.streams = [ClassStream(dim, max_rows, f"class {y}") for y in range(num_classes)]

    def add(self, z: Tensor, y: Tensor) -> None:
        """Take in latents z [B, d] with labels y int64 [B]: all of them, or after an error none.

        Raises:
            ValueError: other shapes, or a label out of range; DataError: latents that are not finite.
        """
        labels = check_labels(y, len(self.streams))
        if z.ndim != 2 or z.shape[1] != self.dim or len(z) != len(labels):
            raise ValueError(f"need latents [B, {self.dim}] and B labels, got {list(z.shape)} and {len(labels)} labels")
        z = z.detach().cpu()
        finite = torch.isfinite(z).all(1)
        if not finite.all():
            raise not_finite(self.streams[int(labels[~finite][0])].name)
        for c in labels.unique().tolist():
            self.streams[c].add(z[labels == c])

    def add_class(self, y: int, z: Tensor) -> None:
        """Take in latents [n, d], all of class ``y``."""
        self.streams[y].add(z.detach().to("cpu", copy=True))  # the caller may fill the same memory with the next ones

    def take(self, y: int) -> ClassMoments:
        """What class ``y`` has come to; its memory is given back."""
        moments = self.streams[y].moments()
        self.streams[y] = ClassStream(self.dim, self.streams[y].max_rows, f"class {y}")
        return moments

    def finish(
        self,
        rank: int | None = None,
        shrinkage: float | str = 0.0,
        target: str = "diagonal",
        ridge: float = 1e-4,
        store: str = "float32",
    ) -> ThinCovariances:
        """The covariances of all classes; arguments as in ``fit_covariances``. The stream is empty afterwards.

        Raises:
            DataError: a class with fewer than 2 images. What has been taken in is kept, so that more can be added.
            ValueError: settings that make no sense.
        """
        settings = _Settings(rank, shrinkage, target, ridge, store)
        if not any(stream.images for stream in self.streams):
            raise DataError("no latents have been added since the stream was made, or last finished")
        for stream in self.streams:
            stream.check_enough()
        return _assemble([settings.packed(self.take(y)) for y in range(len(self.streams))], settings)


# ---- how a class's moments become factor and diagonal ------------------------------------------------------------


class _Settings:
    """Checked settings of a fit, and the packing of one class by them."""

    def __init__(self, rank: int | None, shrinkage: float | str, target: str, ridge: float, store: str) -> None:
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, or None for the exact factor, got {rank}")
        if shrinkage != "oas" and not (isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1):
            raise ValueError(f"shrinkage must lie in [0, 1] or be 'oas', got {shrinkage!r}")
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge must be a number >= 0, got {ridge}")
        if store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
        self.rank, self.shrinkage, self.target, self.ridge = rank, shrinkage, target, ridge
        self.store = STORES[store]

    def packed(self, moments: ClassMoments) -> tuple[ClassMoments, float, Tensor]:
        """Moments with the factor cut to ``rank``, times sqrt(1 - g), in the storage type; g; the row scales."""
        g = oas_shrinkage(moments) if self.shrinkage == "oas" else float(self.shrinkage)
        if self.rank is not None:
            moments = moments.truncated(self.rank)
        rows = moments.factor * math.sqrt(1 - g)
        scale = torch.ones(len(rows))
        if self.store is torch.float16:
            scale = rows.abs().amax(1).clamp_min(1e-30) if rows.numel() else scale
            rows = rows / scale[:, None]
        moments.factor = rows.to(self.store)
        return moments, g, scale.float()


def _assemble(parts: list[tuple[ClassMoments, float, Tensor]], settings: _Settings) -> ThinCovariances:
    freedom = sum(m.count - 1 for m, _, _ in parts)
    pooled = sum((m.count - 1) * m.variance for m, _, _ in parts) / freedom
    diagonals = []
    for moments, g, _ in parts:
        mean_variance = moments.variance.mean()
        target = {"diagonal": moments.variance, "pooled": pooled, "identity": mean_variance}[settings.target]
        diagonals.append((1 - g) * moments.rest + g * target + settings.ridge * mean_variance)
    return ThinCovariances(
        torch.stack([m.mean for m, _, _ in parts]),
        torch.stack(diagonals),
        [m.factor for m, _, _ in parts],
        [scale for _, _, scale in parts],
        torch.tensor([m.count for m, _, _ in parts]),
        torch.tensor([g for _, g, _ in parts]),
    )
