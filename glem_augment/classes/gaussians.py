"""One diagonal Gaussian per class in the latent space: class-conditional densities (Eq. 2) and divergences (Eq. 4).

For a diagonal covariance the log-density is linear in z and z^2,

    log N(z; mu_y, sigma_y^2)  =  z . (mu_y / sigma_y^2)  -  1/2 z^2 . (1 / sigma_y^2)  +  c_y,

so the densities of a batch under all classes are two matrix products. The Kullback-Leibler divergence

    KL(y || y')  =  1/2 sum_i [ log s_y'i / s_yi  +  (s_yi + (mu_yi - mu_y'i)^2) / s_y'i  -  1 ],      s a variance,

summed over y', needs only sums over the classes in each dimension. So the sum over all pairs and its gradient cost
O(K d). Divergences run in float64: for nearly equal Gaussians the result is a small difference of large numbers.
Equation numbers refer to GLEM (Enescu & Sahbi, ACCV 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glem_augment.checks import check_number
from glem_augment.names import INITIAL_VARIANCE, LOWEST_SHARE
from glem_augment.parts import register
from glem_augment.precision import full_precision
from glem_augment.tensors import send

# Between these shares of its range psi represents variances well; nearer to the ends s runs away.
INNER = (0.01, 0.99)
_LOG_2PI = math.log(2 * math.pi)
# Dimensions that a divergence works on at a time: float64 temporaries then stay near K * 256 * 8 bytes each.
_SLICE = 256


class ClassSampler(nn.Module):
    """Draws latents of classes, each from `noise_size` standard normal numbers."""

    noise_size: int

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Latents [B, d] of the classes y, int64 [B], from standard normal noise [B, noise_size].

        y is best on the CPU: for the modes of a y on a GPU the host would wait, or copy.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, d] of the classes y, int64 [B].

        The temperature, >= 0, multiplies the standard deviation, as in Glow (Kingma & Dhariwal 2018, Sec. 6). The
        generator is on the CPU, so that one seed gives the same latents on every device.
        """
        check_number("temperature", temperature, 0.0, math.inf)
        some = next(chain(self.parameters(), self.buffers()))
        noise = torch.randn(len(y), self.noise_size, generator=generator, dtype=some.dtype).to(some.device)
        with full_precision(some.device.type):
            return self.sample_from_noise(y, noise, temperature)


class ClassModel(ClassSampler):
    """Densities and samples of K classes of latents in place of the Gaussians'. `register_class_model` makes it a part.

    A model builds it as `Kind(num_classes, shape, **options)`, with (C, H, W) of the numbers that the flow takes, and
    loads its parameters and buffers. All of these must exist then, in their final shapes.
    """

    def fit(self, latents: Callable[[int], Tensor]) -> None:
        """Learn from latents [n_y, d] of each class y, for `GLEM.fit(class_model=)`. Each call encodes them anew."""
        raise NotImplementedError(f"{type(self).__name__} has no fit(latents), so GLEM.fit can't make it")

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z | y) of latents z [B, d] under every class, [B, K] nats."""
        raise NotImplementedError


register_class_model = partial(register, "class model", base=ClassModel)


class ClassGaussians(ClassSampler):
    """N(mu_y, diag(sigma_y^2)) for K classes in d dimensions.

    With `psi = (a, b, c)` the variances are psi(s) = a sigmoid(b s) + c for free parameters s (Eq. 6): every real s
    gives a variance in (c, a + c). With `psi = None`, the paper's ablation, the parameters are the variances, and
    `project` keeps them above a tenth of their initial value after every step.

    Args:
        num_classes, dim: K and d.
        psi: (a, b, c), all positive. The paper uses (0.5, 0.2, 0.05), and (5, 0.2, 0.05) in its ablation.
        initial_variance: used with `psi=None` only; with psi the start is s = 0, a variance of a/2 + c.

    Raises:
        ValueError: psi is not three positive numbers.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        psi: tuple[float, float, float] | None = (0.5, 0.2, 0.05),
        initial_variance: float = INITIAL_VARIANCE,
    ) -> None:
        super().__init__()
        if psi is not None and (len(psi) != 3 or not all(math.isfinite(v) and v > 0 for v in psi)):
            raise ValueError(f"psi must be three positive numbers (a, b, c), got {psi}")
        self.psi = None if psi is None else (float(psi[0]), float(psi[1]), float(psi[2]))
        self.num_classes, self.dim, self.noise_size = num_classes, dim, dim
        # The lower bound of the variances.
        self.lowest_variance = LOWEST_SHARE * initial_variance if self.psi is None else self.psi[2]
        self.mu = nn.Parameter(torch.zeros(num_classes, dim))
        self.s = nn.Parameter(torch.full((num_classes, dim), 0.0 if psi is not None else initial_variance))

    # ---- parameters ----------------------------------------------------------------------------------------------

    def variance(self) -> Tensor:
        """sigma^2 [K, d], differentiable in `s`."""
        if self.psi is None:
            return self.s.clamp_min(self.lowest_variance)
        a, b, c = self.psi
        return a * torch.sigmoid(b * self.s) + c

    @torch.no_grad()
    def set_variance(self, variance: Tensor, inner: tuple[float, float] = INNER) -> None:
        """Set the variances [K, d]. They are clamped: with psi between the shares `inner` of its range."""
        if self.psi is None:
            self.s.copy_(variance.to(self.s).clamp_min(self.lowest_variance))
        else:
            a, b, c = self.psi
            self.s.copy_(torch.logit(((variance.double() - c) / a).clamp(*inner)) / b)

    @torch.no_grad()
    def project(self) -> None:
        """Without psi, round the variances up to their lower bound, as the paper does after each step."""
        if self.psi is None:
            self.s.clamp_(min=self.lowest_variance)

    # ---- densities and samples -----------------------------------------------------------------------------------

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density of every latent z [B, d] under every class, the first factor of Eq. 2: [B, K] nats."""
        # The sums have thousands of terms that nearly cancel, so neither TF32 nor bf16 (autocast) is enough.
        with full_precision(z.device.type):
            mu, variance = self.mu, self.variance()
            inverse = 1 / variance
            scaled = mu * inverse
            constants = -0.5 * ((variance.log() + mu * scaled).sum(1) + self.dim * _LOG_2PI)
            return torch.addmm(torch.addmm(constants, z, scaled.T), z * z, inverse.T, alpha=-0.5)

    def log_prob_of(self, z: Tensor, y: Tensor) -> Tensor:
        """The log-density of each latent z [B, d] under its class y, int64 [B]: [B] nats."""
        variance = self.variance()[y]
        return -0.5 * ((z - self.mu[y]).square() / variance + variance.log() + _LOG_2PI).sum(1)

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """z = mu_y + temperature * sigma_y * noise [B, d], of the classes y, int64 [B]."""
        y = send(y, noise.device)
        return self.mu[y] + temperature * self.variance()[y].sqrt() * noise

    # ---- divergences between the classes (Eq. 4) -----------------------------------------------------------------

    def kld_matrix(self) -> Tensor:
        """[K, K] float64, nats: entry (y, y') is KL(y || y'). Differentiable."""
        m, s = self.mu.double(), self.variance().double()
        m = m - m.mean(0)  # the divergences do not depend on the origin, and near it fewer digits cancel
        inverse, log_det = 1 / s, s.log().sum(1)
        scaled = m * inverse
        quadratic = (s + m * m) @ inverse.T - 2 * m @ scaled.T + (m * scaled).sum(1)
        kld = 0.5 * (log_det[None, :] - log_det[:, None] + quadratic - self.dim)
        # The diagonal is zero up to rounding; this makes it exact without breaking the graph.
        return kld - torch.diag_embed(kld.diagonal())

    def kld_class_sums(self) -> Tensor:
        """[K] float64, nats: the sum of KL(y || y') over y', in O(K d). Differentiable; the sum is minus Eq. 4."""
        slices = zip(self.mu.split(_SLICE, 1), self.variance().split(_SLICE, 1), strict=True)
        # The backward pass computes a slice's temporaries again instead of keeping all slices' temporaries.
        return torch.stack([checkpoint(_class_sums, m, s, use_reentrant=False) for m, s in slices]).sum(0)


def _class_sums(mu: Tensor, var: Tensor) -> Tensor:
    """`kld_class_sums` of a few dimensions [K, n].

    With S = sum_y' 1/s_y', M = sum_y' mu_y'/s_y' and Q = sum_y' mu_y'^2/s_y' per dimension,
    sum_y' KL(y || y') = 1/2 sum_i [ sum_y' log s_y' - K log s_y + (s_y + mu_y^2) S - 2 mu_y M + Q - K ].
    """
    s, m = var.double(), mu.double()
    m = m - m.mean(0)
    inverse, log_s = 1 / s, s.log()
    scaled = m * inverse
    total, first, second = inverse.sum(0), scaled.sum(0), (m * scaled).sum(0)
    k = len(mu)
    return 0.5 * (log_s.sum(0) - k * log_s + (s + m * m) * total - 2 * m * first + second - k).sum(1)
