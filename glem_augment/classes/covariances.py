"""The covariance that all classes share, with the directions in which a class differs.

In the coordinates u = G z, a fixed linear map, the covariance W that all classes share is the identity. Class y has

    z  ~  N(m_y, W_y),        G W_y G^T  =  r_y (I - E_y^T E_y) + E_y^T diag(v_y) E_y,

with orthonormal rows E_y [k, d]. Samples and moves have other v_y and r_y than densities, with more of the class's own
variation. Densities and samples cost O(r d) for all classes, with r directions in G, and O(k d) for each class. No
d x d matrix is made. `classes.fit` estimates the numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glem_augment.classes.gaussians import ClassModel, register_class_model
from glem_augment.flows.linear import Whiten
from glem_augment.flows.public import PublicFlow
from glem_augment.precision import full_precision
from glem_augment.tensors import send

OWN, PUBLIC = "own", "public"  # targets of the shared covariance
_ROUNDS, _MORE = 3, 16  # of subspace iteration, and the directions that it adds to the wanted ones


class SharedCoordinates(nn.Module):
    """G, z [B, d] <-> u [B, d]: public coordinates, if there are any, then a `Whiten` without an offset.

    Args:
        shape: (C, H, W) of the numbers.
        rank: r, directions of the whitening.
        public: whether there are public coordinates.
    """

    def __init__(self, shape: tuple[int, int, int], rank: int, public: bool) -> None:
        super().__init__()
        self.shape, self.rank = shape, rank
        self.public = PublicFlow(shape) if public else None
        self.whiten = Whiten(math.prod(shape), rank)

    def set(self, public: PublicFlow | None, scale: Tensor | float, directions: Tensor, ratios: Tensor) -> None:
        """Let G multiply public coordinates by `scale`, a number or [d], and then along the rows of `directions` [r, d]
        by the root of `ratios` [r]."""
        self.public = public
        self.whiten.scale.copy_(torch.as_tensor(scale))
        self.whiten.directions.copy_(directions)
        self.whiten.gain.copy_(ratios.sqrt())
        self.whiten.initialised.fill_(True)

    def forward(self, z: Tensor) -> Tensor:
        return self.whiten(to_public(z, self.public))

    def inverse(self, u: Tensor) -> Tensor:
        return from_public(self.whiten.inverse(u), self.public)

    def logdet(self) -> Tensor:
        """log|det G| in nats, float64."""
        found = self.whiten.logdet().double()
        return found if self.public is None else found + self.public.logdet()

    def variances(self) -> Tensor:
        """The diagonal of (G^T G)^-1, the variances of z where u is white: [d]. With public coordinates `whiten.scale`
        is one number."""
        whiten = self.whiten
        found = whiten.scale**-2 if self.public is None else self.public.variances() * whiten.scale.mean() ** -2
        rows = from_public(whiten.directions / whiten.scale, self.public)
        return found + (whiten.gain**-2 - 1) @ rows.square()


def to_public(z: Tensor, public: PublicFlow | None) -> Tensor:
    """Latents z [B, d] in public coordinates; z itself where there are none."""
    return z if public is None else public(z.unflatten(1, public.image_shape))[0]


def from_public(v: Tensor, public: PublicFlow | None) -> Tensor:
    """Undoes `to_public`."""
    return v if public is None else public.inverse(v)[0].flatten(1)


@register_class_model("covariances")
class ClassCovariances(ClassModel):
    """Means and covariances of K classes, see above.

    Args:
        num_classes, shape: K, and (C, H, W) of the numbers.
        rank, shared_rank: k and r.
        target: PUBLIC, with public coordinates, or OWN.
        nu0, nu1, nu1_images: the strengths of the estimate, for the record: nu1 plus `nu1_images` times the images of a
            class.

    Buffers:
        mean: [K, d], of z.
        directions: [K, k, d], E; zero rows where a class has fewer.
        variances: [K, k], v along E; r where a class has fewer.
        rest: [K], r.
        drawn_variances, drawn_rest: v and r of samples and moves.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    drawn_variances: Tensor
    drawn_rest: Tensor

    def __init__(
        self,
        num_classes: int,
        shape: tuple[int, int, int],
        rank: int = 0,
        shared_rank: int = 0,
        target: str = OWN,
        nu0: float = 0.0,
        nu1: float = 0.0,
        nu1_images: float = 0.0,
    ) -> None:
        super().__init__()
        if target not in (OWN, PUBLIC):
            raise ValueError(f"target must be {OWN!r} or {PUBLIC!r}, got {target[:40]!r}")
        self.coordinates, self.rank = SharedCoordinates(shape, shared_rank, target == PUBLIC), rank
        self.dim = self.noise_size = math.prod(shape)
        self.register_buffer("mean", torch.zeros(num_classes, self.dim))
        self.register_buffer("directions", torch.zeros(num_classes, rank, self.dim))
        self.register_buffer("variances", torch.ones(num_classes, rank))
        self.register_buffer("rest", torch.ones(num_classes))
        self.register_buffer("drawn_variances", torch.ones(num_classes, rank))
        self.register_buffer("drawn_rest", torch.ones(num_classes))

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; m_y, W_y) of latents z [B, d] under every class, [B, K] nats."""
        with full_precision(z.device.type):
            centre = self.mean.mean(0)  # near zero, differences keep more digits
            u, means = self.coordinates(z - centre), self.coordinates(self.mean - centre)
            far = []
            for m, directions, v, rest in zip(means, self.directions, self.variances, self.rest, strict=True):
                away = u - m
                along = (away @ directions.T).square()
                far.append(away.square().sum(1) / rest + along @ (1 / v - 1 / rest))
        logdet = self.variances.log().sum(1) + (self.dim - self.rank) * self.rest.log()
        constant = self.dim * math.log(2 * math.pi) - 2 * self.coordinates.logdet()
        return -0.5 * (torch.stack(far, 1) + (logdet.double() + constant).to(u))

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """m_y + temperature * W_y^(1/2) noise [B, d], of the classes y, int64 [B], from noise [B, d].

        For a y on a GPU the host waits.
        """
        u = torch.empty_like(noise)
        for k in y.unique().tolist():
            rows = send((y == k).nonzero()[:, 0], noise.device)
            u[rows] = self._scaled(noise[rows], k, 0.5)
        return self.mean[send(y, noise.device)] + temperature * self.coordinates.inverse(u)

    def _scaled(self, u: Tensor, y: int, power: float) -> Tensor:
        """(G W_y G^T)^power u for rows u [m, d], with the W_y of samples."""
        directions, rest = self.directions[y], self.drawn_rest[y] ** power
        return rest * u + (u @ directions.T * (self.drawn_variances[y] ** power - rest)) @ directions

    @torch.no_grad()
    def leading(self, y: int | None, rank: int) -> tuple[Tensor, Tensor]:
        """The leading directions of samples' W_y, or of W for None, and the deviations along them: [rank, d], [rank].

        By subspace iteration (Halko, Martinsson & Tropp 2011), and exact where there are about d directions.
        """
        rows = min(rank + _MORE, self.dim)
        generator = torch.Generator().manual_seed(0)  # a fit is repeatable
        found = torch.randn(rows, self.dim, generator=generator).to(self.mean)
        for _ in range(_ROUNDS):
            found = torch.linalg.qr(self._covariance_times(found, y).T).Q.T
        values, vectors = torch.linalg.eigh((self._covariance_times(found, y) @ found.T).double())
        directions = (vectors.flip(1).T[:rank].to(found)) @ found
        positive = directions.amax(1, keepdim=True) >= -directions.amin(1, keepdim=True)
        return directions * torch.where(positive, 1, -1), values.flip(0)[:rank].clamp_min(0).sqrt().to(found)

    def _covariance_times(self, z: Tensor, y: int | None) -> Tensor:
        """W_y z, or W z, for rows z [m, d]. G is linear, so its transpose is its gradient."""
        u = torch.zeros_like(z)
        with torch.enable_grad():
            (u,) = torch.autograd.grad(self.coordinates.inverse(u.requires_grad_()), u, z)
        return self.coordinates.inverse(u if y is None else self._scaled(u, y, 1.0))

    @torch.no_grad()
    def diagonals(self) -> Tensor:
        """The variances of samples of every class in every dimension: [K, d]."""
        found = self.drawn_rest[:, None] * self.coordinates.variances()
        for k, (directions, v) in enumerate(zip(self.directions, self.drawn_variances, strict=True)):
            found[k] += (v - self.drawn_rest[k]) @ self.coordinates.inverse(directions).square()
        return found
