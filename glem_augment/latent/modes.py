"""Full class covariances of the latents as thin factors (RFCM), and the principal modes they give.

A class with n images in d dimensions has a covariance of rank at most n - 1, and n < d as a rule. So no d x d
matrix is kept: a class is its mean, its k strongest modes with their standard deviations, and a diagonal for
what they leave,

    Cov_y  =  V_y^T diag(s_y^2) V_y + diag(rest_y),        V_y [k, d] with orthonormal rows.

Source: Enescu & Sahbi, ACCV 2024, "re-estimated full covariance matrix" (RFCM) and principal-mode mixup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from glem_augment.checks import check_number
from glem_augment.errors import DataError

# Variance of a dimension that the modes explain completely; it keeps densities finite and is far below one
# uint8 step (4e-3 squared is 1.5e-5), so it can't be seen in a decoded image.
REST_FLOOR = 1e-8
# Eigenvalues below this share of the largest are rounding, not variation: their directions would be noise.
RELATIVE_TOLERANCE = 1e-10
# Up to this size an eigendecomposition takes seconds; above it, subspace iteration finds the leading modes.
MAX_EIGH = 4096
# Floats gathered at a time when every image of a batch brings its own [k, d] modes (256 MiB in float32).
GATHER_FLOATS = 64 * 1024 * 1024


def row_chunks(rows: int, floats_per_row: int) -> Iterator[slice]:
    """Slices over `rows` such that each holds at most `GATHER_FLOATS` floats (at least one row)."""
    step = max(1, GATHER_FLOATS // max(1, floats_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def per_class(function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """``function(rows, modes)`` with each row's own class's modes: [n, d].

    On the CPU one product for each class that is present, on views of the modes. An accelerator would have to
    wait to learn which these are: there every row gathers its modes, a bounded number of rows at a time.

    Args:
        function: takes rows [m, *] and modes [k, d], or rows [m, 1, *] and modes [m, k, d], by broadcasting.
        rows: [n, *]; y: int64 [n], the class of each; directions: [K, k, d].
    """
    out = rows.new_empty(len(y), directions.shape[-1])
    if y.device.type == "cpu":
        order = y.argsort(stable=True)
        classes, counts = torch.unique_consecutive(y[order], return_counts=True)
        for c, members in zip(classes.tolist(), order.split(counts.tolist()), strict=True):
            out[members] = function(rows[members], directions[c])
        return out
    return _gathered(function, rows, y, directions, out)


def _gathered(
    function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, y: Tensor, directions: Tensor, out: Tensor
) -> Tensor:
    for part in row_chunks(len(y), directions[0].numel()):
        out[part] = function(rows[part, None], directions[y[part]])[:, 0]
    return out


def _row_by_row(rows: Tensor, modes: Tensor) -> Tensor:
    """``rows @ modes`` by one product per row: a matrix product's last bits would depend on the other rows."""
    single = rows if rows.ndim == 3 else rows[:, None]
    out = torch.bmm(single, modes.expand(len(rows), -1, -1))
    return out if rows.ndim == 3 else out[:, 0]


def nearest_classes(kld_matrix: Tensor, neighbours: int = 3, allowed: Tensor | None = None) -> Tensor:
    """Indices of every class's closest other classes by the symmetrised KLD.

    Args:
        kld_matrix: [K, K] nats, KL(row || column).
        neighbours: how many; at most K - 1 are given back.
        allowed: optional bool [K], the classes that may be neighbours.

    Returns:
        int64 [K, m], nearest first. m is the number of neighbours that every class can have, 0 for a single
        class.
    """
    num_classes = kld_matrix.shape[0]
    distance = kld_matrix.to(torch.float64)
    distance = distance + distance.T
    distance.fill_diagonal_(float("inf"))
    count = num_classes - 1
    if allowed is not None:
        distance = distance.masked_fill(~allowed.to(distance.device)[None, :], float("inf"))
        count = int(allowed.sum()) - 1
    return distance.argsort(dim=1, stable=True)[:, : max(0, min(neighbours, count))]


class ClassModes(nn.Module):
    """Mean, principal modes and diagonal rest of every class's latents; all buffers, float32, nothing
    trained.

    Buffers:
        mean [K, d]; directions [K, k, d], orthonormal rows, zero rows where a class has fewer than k modes;
        scales [K, k], standard deviation along each mode, descending; rest [K, d], variance per dimension
        outside the modes; counts [K] int64, images seen; shared_directions [k, d] and shared_scales [k], the
        modes of the pooled within-class covariance.

    Reference: Enescu & Sahbi, ACCV 2024 (RFCM).

    >>> latents = torch.randn(2, 10, 6)
    >>> modes = fit_class_modes(lambda y: latents[y], num_classes=2, rank=3, dim=6)
    >>> modes.directions.shape, modes.sample(torch.tensor([0, 1, 1])).shape
    (torch.Size([2, 3, 6]), torch.Size([3, 6]))
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
        mean: Tensor,
        directions: Tensor,
        scales: Tensor,
        rest: Tensor,
        counts: Tensor,
        shared_directions: Tensor,
        shared_scales: Tensor,
    ) -> None:
        super().__init__()
        if directions.ndim != 3:
            raise ValueError(f"directions must be [K, k, d], got {tuple(directions.shape)}")
        num_classes, rank, dim = directions.shape
        parts = {
            "mean": (mean, (num_classes, dim)),
            "directions": (directions, (num_classes, rank, dim)),
            "scales": (scales, (num_classes, rank)),
            "rest": (rest, (num_classes, dim)),
            "counts": (counts, (num_classes,)),
            "shared_directions": (shared_directions, (rank, dim)),
            "shared_scales": (shared_scales, (rank,)),
        }
        for name, (value, shape) in parts.items():
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            dtype = torch.int64 if name == "counts" else torch.float32
            self.register_buffer(name, value.detach().to(dtype))

    @classmethod
    def empty(cls, num_classes: int, rank: int, dim: int) -> ClassModes:
        """Zeros of the right shapes, to load a state_dict into."""
        return cls(
            mean=torch.zeros(num_classes, dim),
            directions=torch.zeros(num_classes, rank, dim),
            scales=torch.zeros(num_classes, rank),
            rest=torch.zeros(num_classes, dim),
            counts=torch.zeros(num_classes, dtype=torch.int64),
            shared_directions=torch.zeros(rank, dim),
            shared_scales=torch.zeros(rank),
        )

    @property
    def num_classes(self) -> int:
        """K."""
        return self.directions.shape[0]

    @property
    def rank(self) -> int:
        """k, the modes stored per class; where a class has fewer, the others are zero."""
        return self.directions.shape[1]

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """How many modes the classes have: those of any length."""
        present = (self.scales > 0).sum(1)
        return int(present.min()), int(present.max())

    @property
    def dim(self) -> int:
        """d, the dimension of the latent space."""
        return self.directions.shape[2]

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, rank={self.rank}, dim={self.dim}"

    def near(self, kld_matrix: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
        """Modes pooled over each class and its closest classes, so that a rare class borrows variation.

        The covariances (about each class's own mean) are weighted by their degrees of freedom, n - 1, as in
        the usual pooled estimate; what lies outside the stored modes is left out. Only k x k-sized Grams are
        decomposed.

        Args:
            kld_matrix: [K, K] nats, KL(row || column); closeness is the symmetrised value.
            neighbours: closest classes to pool with (fewer where there are fewer classes).

        Returns:
            directions [K, k, d] float32 (orthonormal rows, or zero), scales [K, k] float32 descending.

        Raises:
            ValueError: for a matrix of another size or a negative `neighbours`.
        """
        if tuple(kld_matrix.shape) != (self.num_classes, self.num_classes):
            raise ValueError(
                f"kld_matrix must be [{self.num_classes}, {self.num_classes}], got {tuple(kld_matrix.shape)}"
            )
        if neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, got {neighbours}")
        closest = nearest_classes(kld_matrix.to(self.scales.device), neighbours)
        members = torch.cat([torch.arange(self.num_classes, device=closest.device)[:, None], closest], dim=1)
        freedom = (self.counts - 1).clamp(min=0).to(torch.float64)
        directions = torch.zeros_like(self.directions)
        scales = torch.zeros_like(self.scales)
        # Twice the floats, because the stacked factors are float64.
        for part in row_chunks(self.num_classes, 2 * members.shape[1] * self.rank * self.dim):
            group = members[part]
            weight = freedom[group] / freedom[group].sum(dim=1, keepdim=True).clamp(min=1.0)
            factor = self.scales[group].to(torch.float64) * weight.sqrt()[..., None]
            rows = self.directions[group].to(torch.float64) * factor[..., None]
            pooled, deviation = modes_of_rows(rows.flatten(1, 2), self.rank)
            directions[part, : pooled.shape[1]] = pooled.to(directions.dtype)
            scales[part, : deviation.shape[1]] = deviation.to(scales.dtype)
        return directions, scales

    def along(self, y: Tensor, coefficients: Tensor) -> Tensor:
        """sum_m c_m v_m with the modes of class y.

        Args:
            y: int64 [B]; coefficients: [B, m], m <= k, in units of the latents.

        Returns:
            [B, d] float32. Row i does not depend on the other rows, to the last bit.
        """
        return per_class(_row_by_row, coefficients, y, self.directions[:, : coefficients.shape[1]])

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """RFCM samples from given standard normal noise: mean + T (sum_m s_m e_m v_m + sqrt(rest) e').

        Args:
            y: int64 [B]; noise: float32 [B, k + d], first the k coefficients, then the d of the rest;
            temperature: factor on the standard deviation.

        Returns:
            z [B, d] float32.

        Raises:
            ValueError: if the noise has another width.
        """
        if noise.shape[1] != self.rank + self.dim:
            raise ValueError(f"noise must be [B, {self.rank + self.dim}], got {tuple(noise.shape)}")
        spread = self.along(y, noise[:, : self.rank] * self.scales[y])
        spread = spread + noise[:, self.rank :] * self.rest[y].sqrt()
        return self.mean[y] + temperature * spread

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the classes y from mean and full covariance (RFCM).

        Args:
            y: int64 [B]; temperature: factor on the standard deviation, >= 0; generator: on any device.

        Returns:
            z [B, d] float32 on the device of the modes.

        Raises:
            ValueError: for a negative temperature.
        """
        check_number("temperature", temperature, 0.0, math.inf)
        device = self.mean.device
        # Noise is drawn where the generator lives, so that one seed gives one sample on every device.
        source = device if generator is None else generator.device
        shape = (len(y), self.rank + self.dim)
        noise = torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)
        return self.sample_from_noise(y.to(device), noise, temperature)


def fit_class_modes(latents_of_class: Callable[[int], Tensor], num_classes: int, rank: int, dim: int) -> ClassModes:
    """Means, principal modes and diagonal rest of every class, one class in memory at a time.

    Covariances are unbiased (n - 1) and computed in float64. A class keeps min(rank, n - 1, d) modes, fewer
    where its latents span fewer directions.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. num_classes - 1; called once for each.
        num_classes: K.
        rank: modes to keep per class; more than d become d.
        dim: d.

    Returns:
        ClassModes on the CPU.

    Raises:
        DataError: for a class with fewer than 2 images, or latents that are not finite.
        ValueError: for latents of another shape, or a rank or class count below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    rank = min(rank, dim)
    # Classes hand more modes than they keep to the pooled covariance, whose own top modes then lose little.
    handed = min(dim, max(4 * rank, 128))
    modes = ClassModes.empty(num_classes, rank, dim)
    pooled = _PooledFactor(handed, dim)
    freedom = 0
    for y in range(num_classes):
        latents = latents_of_class(y).detach()
        if latents.ndim != 2 or latents.shape[1] != dim:
            raise ValueError(f"latents of class {y} must be [n, {dim}], got {tuple(latents.shape)}")
        count = latents.shape[0]
        if count < 2:
            raise DataError(
                f"class {y} has {count} images; its covariance needs at least 2: add images or leave it out"
            )
        if latents.device.type == "mps":  # has no float64
            latents = latents.cpu()
        x = latents.to(torch.float64)
        mean = x.mean(dim=0)
        x = x - mean
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"class {y} has latents that are not finite: check the flow with model.check_invertibility")
        directions, scales = modes_of_rows(x[None] / (count - 1) ** 0.5, handed)
        directions, scales = directions[0], scales[0]
        kept_v, kept_s = directions[:rank], scales[:rank]
        explained = (kept_s[:, None] * kept_v).square().sum(dim=0)
        rest = (x.square().sum(dim=0) / (count - 1) - explained).clamp(min=REST_FLOOR)
        modes.mean[y] = mean
        modes.directions[y, : len(kept_s)] = kept_v.to(modes.directions)
        modes.scales[y, : len(kept_s)] = kept_s.to(modes.scales)
        modes.rest[y] = rest
        modes.counts[y] = count
        pooled.add((scales * (count - 1) ** 0.5)[:, None] * directions)
        freedom += count - 1
    shared_v, shared_s = pooled.modes(rank)
    modes.shared_directions[: len(shared_s)] = shared_v.to(modes.shared_directions)
    modes.shared_scales[: len(shared_s)] = (shared_s / freedom**0.5).to(modes.shared_scales)
    return modes


class _PooledFactor:
    """Rows F with F^T F = the sum of all classes' scatter, cut back to `keep` rows whenever they pile up."""

    def __init__(self, keep: int, dim: int) -> None:
        self.keep = keep
        self.dim = dim
        self.parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.parts.append(rows.cpu())
        # Cutting only at five times the size spreads the cost of a Gram over several classes.
        if sum(len(part) for part in self.parts) > 5 * self.keep:
            directions, scales = self.modes(self.keep)
            self.parts = [scales[:, None] * directions]

    def modes(self, rank: int) -> tuple[Tensor, Tensor]:
        directions, scales = modes_of_rows(torch.cat(self.parts)[None], rank)
        return directions[0], scales[0]


def modes_of_rows(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors and values of rows [G, n, d] float64, from the smaller of the two Grams.

    Returns directions [G, r, d] and scales [G, r], r = min(rank, n, d), descending; what is numerically zero
    gives zero rows. The sign of a direction is fixed (its largest entry is positive), so that fits can be
    compared.
    """
    n, dim = rows.shape[1:]
    rank = min(rank, n, dim)
    if min(n, dim) > MAX_EIGH:
        values, directions = _leading_subspace(rows, rank)
    elif n <= dim:
        values, left = torch.linalg.eigh(rows @ rows.mT)
        values, left = values[:, -rank:].flip(-1), left[:, :, -rank:].flip(-1)
        directions = left.mT @ rows
    else:
        values, right = torch.linalg.eigh(rows.mT @ rows)
        values, directions = values[:, -rank:].flip(-1), right[:, :, -rank:].flip(-1).mT
    real = values > RELATIVE_TOLERANCE * values[:, :1].clamp(min=1e-300)
    scales = values.clamp(min=0.0).sqrt() * real
    directions = _orthonormal_rows(directions, real)
    largest = directions.gather(2, directions.abs().argmax(dim=2, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0), scales


def _orthonormal_rows(directions: Tensor, real: Tensor) -> Tensor:
    """Unit rows for the real modes, zero for the others.

    U^T X has orthogonal rows only up to rounding relative to the largest singular value, so weak modes would
    lean on strong ones; a QR (Gram-Schmidt in the order of strength) removes that.
    """
    unit = directions / directions.norm(dim=2, keepdim=True).clamp(min=1e-300)
    unit = unit * real[..., None]
    q, r = torch.linalg.qr(unit.mT)
    q = q * torch.where(torch.diagonal(r, dim1=1, dim2=2) < 0, -1.0, 1.0)[:, None]
    return q.mT * real[..., None]


def _leading_subspace(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Subspace iteration for the leading modes where n and d are both large; seeded: a fit is repeatable."""
    generator = torch.Generator().manual_seed(0)
    width = min(rows.shape[2], 2 * rank + 16)
    basis = torch.randn(rows.shape[2], width, generator=generator, dtype=torch.float64).to(rows.device)
    basis = basis.expand(rows.shape[0], -1, -1)
    for _ in range(12):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q
    values, small = torch.linalg.eigh((rows @ basis).mT @ (rows @ basis))
    values, small = values[:, -rank:].flip(-1), small[:, :, -rank:].flip(-1)
    return values, (basis @ small).mT
