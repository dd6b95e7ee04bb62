"""Class covariances as "thin factor plus diagonal": exact or truncated, shrunk, sampled and scored (RFCM).

The paper re-estimates a mean and a *full* covariance per class from the latents of its training images (Enescu & Sahbi,
ACCV 2024, Table 5: "Re-estimated Full Covariance Matrix"). A class of n images in d dimensions has

    Cov_y  =  F_y^T F_y + diag(D_y),        F_y [r, d],  r <= min(n, d),

where F_y = X_c / sqrt(n - 1), the centred latents themselves, is exact (D_y then holds the ridge alone), and r modes
with D_y the variance they leave is the truncated form. Shrinkage towards a diagonal target T_y stays in the same form:
``(1 - g) Cov_y + g T_y + ridge``. So one class samples, ``mu + T (F^T e + sqrt(D) e')``, and scores, by Woodbury's
identity and an r x r Cholesky factor, without a d x d matrix. ``modes.ClassModes`` holds what augmentation needs of
this (a fixed number of modes, padded); here classes may have as many rows as they have images.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from glem_augment.errors import ModelFileError
from glem_augment.io import atomic_write
from glem_augment.latent.modes import ClassModes

__all__ = ["ThinCovariances"]

FILE = "rfcm.safetensors"
_ROWS = 256  # latents sampled at a time


class ThinCovariances:
    """Mean, thin factor and diagonal of every class.

    Attributes:
        mean: float32 [K, d]; diagonal: float32 [K, d], D_y.
        factors: K tensors [r_y, d], float32 or float16; row_scales: K float32 tensors [r_y]. The rows of F_y are
            ``row_scales[y][:, None] * factors[y]``: half precision keeps 11 bits of each row relative to its largest
            entry, which is far below what a sample can show.
        counts: int64 [K], images seen.
        shrinkage: float32 [K], g of each class.

    Made by ``rfcm_fit``: ``fit_covariances`` or ``CovarianceStream``, and by ``GLEM.fit_rfcm``.

    >>> from glem_augment.latent.rfcm_fit import fit_covariances
    >>> z = torch.randn(2, 10, 6)
    >>> thin = fit_covariances(lambda y: z[y], num_classes=2, dim=6)
    >>> thin.sample(torch.tensor([0, 1, 1])).shape, thin.log_prob(z[0]).shape
    (torch.Size([3, 6]), torch.Size([10, 2]))
    """

    def __init__(
        self,
        mean: Tensor,
        diagonal: Tensor,
        factors: list[Tensor],
        row_scales: list[Tensor],
        counts: Tensor,
        shrinkage: Tensor,
    ) -> None:
        num_classes, dim = mean.shape
        for name, value, shape in (
            ("diagonal", diagonal, (num_classes, dim)),
            ("counts", counts, (num_classes,)),
            ("shrinkage", shrinkage, (num_classes,)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if len(factors) != num_classes or len(row_scales) != num_classes:
            raise ValueError(f"need {num_classes} factors and row scales, got {len(factors)} and {len(row_scales)}")
        for y, (rows, scale) in enumerate(zip(factors, row_scales, strict=True)):
            if rows.ndim != 2 or rows.shape[1] != dim or tuple(scale.shape) != (rows.shape[0],):
                raise ValueError(f"factor {y} must be [r, {dim}] with r scales, got {tuple(rows.shape)}")
        self.mean, self.diagonal = mean.float(), diagonal.float()
        self.factors, self.row_scales = list(factors), [s.float() for s in row_scales]
        self.counts, self.shrinkage = counts.to(torch.int64), shrinkage.float()

    @classmethod
    def from_modes(cls, modes: ClassModes, ridge: float = 1e-4) -> ThinCovariances:
        """The truncated covariances of ``ClassModes``, with a ridge (a share of the mean variance) for scoring."""
        factors = [modes.directions[y] * modes.scales[y][:, None] for y in range(modes.num_classes)]
        factors = [rows[modes.scales[y] > 0] for y, rows in enumerate(factors)]
        variance = torch.stack([rows.square().sum(0) for rows in factors]) + modes.rest
        return cls(
            modes.mean,
            modes.rest + ridge * variance.mean(1, keepdim=True),
            factors,
            [rows.new_ones(len(rows)) for rows in factors],
            modes.counts,
            torch.zeros(modes.num_classes),
        )

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """K."""
        return self.mean.shape[0]

    @property
    def dim(self) -> int:
        """d."""
        return self.mean.shape[1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what it takes in memory and on disk."""
        tensors = [self.mean, self.diagonal, self.counts, self.shrinkage, *self.factors, *self.row_scales]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __repr__(self) -> str:
        rows = [len(f) for f in self.factors]
        return (
            f"ThinCovariances({self.num_classes} classes, d={self.dim}, {min(rows)} to {max(rows)} rows, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def factor(self, y: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """F_y [r, d]."""
        return self.factors[y].to(dtype) * self.row_scales[y].to(dtype)[:, None]

    def covariance(self, y: int) -> Tensor:
        """Cov_y as a dense [d, d] float64 matrix; for small d."""
        rows = self.factor(y, torch.float64)
        return rows.T @ rows + torch.diag(self.diagonal[y].double())

    def to(self, device: str | torch.device) -> ThinCovariances:
        """The same on ``device``."""
        return ThinCovariances(
            self.mean.to(device),
            self.diagonal.to(device),
            [f.to(device) for f in self.factors],
            [s.to(device) for s in self.row_scales],
            self.counts.to(device),
            self.shrinkage.to(device),
        )

    # ---- sampling and scoring ------------------------------------------------------------------------------------

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """``mu_y + T (F_y^T e + sqrt(D_y) e')``.

        Args:
            y: int64 [B]; temperature: factor on the standard deviation, >= 0; generator: on the CPU, so that one seed
            gives the same latents on every device.

        Returns:
            [B, d] float32.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a number >= 0, got {temperature}")
        labels = check_labels(y, self.num_classes)
        rows = max(len(f) for f in self.factors)
        out = torch.empty(len(labels), self.dim, device=self.device)
        for start in range(0, len(labels), _ROWS):
            part = labels[start : start + _ROWS]
            noise = torch.randn(len(part), rows + self.dim, generator=generator).to(self.device)
            for c in part.unique().tolist():
                members = (part == c).nonzero().flatten().to(self.device)
                e = noise[members]
                spread = e[:, : len(self.factors[c])] @ self.factor(c) + e[:, rows:] * self.diagonal[c].sqrt()
                out[start + members] = self.mean[c] + temperature * spread
        return out

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mu_y, Cov_y) of every class: [B, K] float64, nats; class by class, O(r^2 d + B r d) each.

        Woodbury: with ``G = F D^-1/2``, ``u = (z - mu) D^-1/2`` and ``L L^T = I + G G^T``, the quadratic form is
        ``|u|^2 - |L^-1 G u|^2`` and the log-determinant ``sum log D + 2 sum log L_ii``.

        Raises:
            ValueError: latents of another width, or a zero in D (fit with a ridge or shrinkage).
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"expected latents of shape [B, {self.dim}], got {list(z.shape)}")
        flat = (~(self.diagonal > 0)).any(1).nonzero()[:, 0].tolist()
        if flat:
            raise ValueError(
                f"the covariance of class {flat[0]} may be singular, without variance in its diagonal: to score, fit "
                "with ridge > 0 or shrinkage > 0 (target='pooled' also serves a class whose latents are all alike)"
            )
        wide = z.to(self.device, torch.float64)
        return torch.stack([self._log_prob_of_class(wide, y) for y in range(self.num_classes)], 1)

    def _log_prob_of_class(self, z: Tensor, y: int) -> Tensor:
        d = self.diagonal[y].double()
        inverse = d.rsqrt()
        g = self.factor(y, torch.float64) * inverse
        u = (z - self.mean[y].double()) * inverse
        gram = g @ g.T
        gram.diagonal().add_(1.0)
        low = torch.linalg.cholesky(gram)
        t = torch.linalg.solve_triangular(low, g @ u.T, upper=False)
        log_det = d.log().sum() + 2 * low.diagonal().log().sum()
        return -0.5 * (u.square().sum(1) - t.square().sum(0) + log_det + self.dim * math.log(2 * math.pi))

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, weights: str = "") -> Path:
        """Write ``rfcm.safetensors`` beside a model's files, atomically. ``weights``: name (SHA-256) of the model's."""
        tensors = {"mean": self.mean, "diagonal": self.diagonal, "counts": self.counts, "shrinkage": self.shrinkage}
        for y in range(self.num_classes):
            tensors[f"factor.{y}"], tensors[f"scale.{y}"] = self.factors[y], self.row_scales[y]
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        path = Path(folder) / FILE
        # One entry of metadata: safetensors writes several in random order.
        with atomic_write(path) as file:
            file.write(safetensors_bytes(tensors, metadata={"glem": json.dumps({"weights": weights})}))
        return path

    @classmethod
    def load(cls, folder: str | Path, weights: str | None = None) -> ThinCovariances:
        """Read what ``save`` wrote; with ``weights``, refuse the covariances of another model's latents.

        Raises:
            ModelFileError: no such file, truncated, inconsistent, or of another model.
        """
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="pt") as file:
                known = json.loads((file.metadata() or {}).get("glem", "{}")).get("weights", "")
                if weights is not None and known != weights:
                    raise ModelFileError(
                        f"{path} belongs to the weights {known[:12] or '?'}, not {weights[:12]}: refit"
                    )
                get = file.get_tensor
                mean = get("mean")
                factors = [get(f"factor.{y}") for y in range(len(mean))]
                scales = [get(f"scale.{y}") for y in range(len(mean))]
                parts = get("diagonal"), factors, scales, get("counts"), get("shrinkage")
            result = cls(mean, *parts)
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{path} can't be read: {error}; fit and save the covariances again") from None
        values = (result.mean, result.diagonal, *result.factors, *result.row_scales)
        if not all(bool(torch.isfinite(t).all()) for t in values):
            raise ModelFileError(f"{path} holds values that are not finite; fit and save the covariances again")
        return result


def check_labels(y: Tensor, num_classes: int) -> Tensor:
    labels = torch.as_tensor(y).cpu()
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers of shape [B], got {labels.dtype} {list(labels.shape)}")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return labels
