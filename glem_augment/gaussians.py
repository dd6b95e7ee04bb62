"""One diagonal Gaussian per class in the latent space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glem_augment.flows.bijection import full_precision
from glem_augment.kld import kld_class_sums, kld_matrix, kld_pair_sum


class _Psi(torch.autograd.Function):
    """``a * sigmoid(b * s) + c``, keeping nothing but its result: K x d is the large tensor here."""

    @staticmethod
    def forward(ctx, s: Tensor, a: float, b: float, c: float) -> Tensor:
        variance = (b * s).sigmoid_().mul_(a).add_(c)
        ctx.save_for_backward(variance)
        ctx.psi = (a, b, c)
        return variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (variance,) = ctx.saved_tensors
        a, b, c = ctx.psi
        result = torch.empty_like(variance)
        # psi' = b (psi - c) (1 - (psi - c) / a); in blocks of rows, so that no second K x d temporary is made.
        for out, value, upstream in zip(*(t.split(64) for t in (result, variance, grad)), strict=True):
            above = value - c
            torch.addcmul(above, above, above, value=-1 / a, out=out)
            out.mul_(b).mul_(upstream)
        return result, None, None, None


class ClassGaussians(nn.Module):
    """``N(mu_y, diag(sigma_y^2))`` for K classes in d dimensions.

    With ``psi = (a, b, c)`` the variances are ``psi(s) = a * sigmoid(b * s) + c`` for free parameters s, so they stay
    in (c, a + c) whatever the gradient does (GLEM, Eq. 6). With ``psi = None`` the parameters are the variances
    themselves, kept above a tenth of their initial value by ``project`` after every step, which is the paper's
    ablation without reparametrisation.

    Args:
        num_classes: K.
        dim: d.
        psi: (a, b, c), all positive; the paper's (0.5, 0.2, 0.05) is the default, (5, 0.2, 0.05) its ablation's.
        initial_variance: used with ``psi=None`` only; with psi the start is s = 0, variance a/2 + c.

    Raises:
        ValueError: K or d below 1, or a psi that is not three positive numbers.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        psi: tuple[float, float, float] | None = (0.5, 0.2, 0.05),
        initial_variance: float = 0.3,
    ) -> None:
        super().__init__()
        if num_classes < 1 or dim < 1:
            raise ValueError(f"need at least one class and one dimension, got K={num_classes}, d={dim}")
        if psi is not None:
            psi = tuple(float(v) for v in psi)
            if len(psi) != 3 or not all(math.isfinite(v) and v > 0 for v in psi):
                raise ValueError(f"psi must be three positive numbers (a, b, c), got {psi}")
        if not initial_variance > 0:
            raise ValueError(f"initial_variance must be positive, got {initial_variance}")
        self.psi = psi
        self.initial_variance = float(initial_variance)
        self.mu = nn.Parameter(torch.zeros(num_classes, dim))
        start = 0.0 if psi is not None else float(initial_variance)
        self.s = nn.Parameter(torch.full((num_classes, dim), start))
        self._cache: dict = {}

    @property
    def num_classes(self) -> int:
        return self.mu.shape[0]

    @property
    def dim(self) -> int:
        return self.mu.shape[1]

    def variance(self) -> Tensor:
        """sigma^2 [K, d]; differentiable with respect to ``s``."""
        if self.psi is None:
            return self.s.clamp_min(0.1 * self.initial_variance)
        return _Psi.apply(self.s, *self.psi)

    @torch.no_grad()
    def set_variance(self, variance: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Set ``rows`` so that ``variance()`` comes as close to ``variance`` [.., d] as psi allows."""
        if self.psi is None:
            self.s[rows] = variance.to(self.s).clamp_min(0.1 * self.initial_variance)
            return
        a, b, c = self.psi
        share = ((variance.to(self.s) - c) / a).clamp(0.01, 0.99)
        self.s[rows] = torch.logit(share) / b

    @torch.no_grad()
    def project(self) -> None:
        """Without psi, round variances up to their lower bound, as the paper does after each step."""
        if self.psi is None:
            self.s.clamp_(min=0.1 * self.initial_variance)

    @torch.no_grad()
    def randomise(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the means from N(0, std^2): random initialisation of the paper's ablation."""
        self.mu.copy_(torch.randn(self.mu.shape, generator=generator).to(self.mu) * std)

    def _density_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """1/sigma^2 [K,d], mu/sigma^2 [K,d], constants [K]."""
        # Fused optimizers change a parameter without bumping its version, and parameters made under inference_mode have
        # none, so only frozen ones are cached.
        if any(p.requires_grad or p.is_inference() for p in (self.mu, self.s)):
            self._cache = {}
            return self._compute_terms()
        state = (
            self.mu._version,
            self.mu.data_ptr(),
            self.s._version,
            self.s.data_ptr(),
            self.mu.device,
            self.mu.dtype,
        )
        if self._cache.get("state") != state:
            # A tensor made under inference_mode could never again take part in a graph.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = {"state": state, "terms": self._compute_terms()}
        return self._cache["terms"]

    def _compute_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        var = self.variance()
        inverse = 1 / var
        scaled = self.mu * inverse
        constant = -0.5 * (
            (self.mu * scaled).sum(1, dtype=torch.float64)
            + var.log().sum(1, dtype=torch.float64)
            + self.dim * math.log(2 * math.pi)
        ).to(self.mu.dtype)
        return inverse, scaled, constant

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["_cache"] = {}
        return state

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of every latent under every class, by two matrix products.

        Args:
            z: [B, d].

        Returns:
            [B, K] nats.
        """
        # Sums of thousands of terms that nearly cancel: neither bf16 (autocast) nor TF32 will do.
        with full_precision(z.device.type):
            inverse, scaled, constant = self._density_terms()
            return torch.addmm(constant + z @ scaled.T, z * z, inverse.T, alpha=-0.5)

    def log_prob_of(self, z: Tensor, y: Tensor) -> Tensor:
        """Log-density of latent i under its own class ``y[i]``: [B] nats, O(B d)."""
        var = self.variance()[y]
        return -0.5 * ((z - self.mu[y]).square() / var + var.log()).sum(1) - 0.5 * self.dim * math.log(2 * math.pi)

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """``z = mu_y + temperature * sigma_y * eps``.

        The temperature multiplies the standard deviation, as in Glow (Kingma & Dhariwal 2018, Sec. 6).

        Args:
            y: int64 [B] class indices.
            temperature: >= 0; 0 gives the means.
            generator: on the CPU, so that the same seed gives the same latents on every device.

        Returns:
            [B, d].
        """
        if not temperature >= 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be a number >= 0, got {temperature}")
        noise = torch.randn(y.shape[0], self.dim, generator=generator, dtype=self.mu.dtype).to(self.mu.device)
        y = y.to(self.mu.device)
        with torch.no_grad():
            return self.mu[y] + temperature * self.variance()[y].sqrt() * noise

    def kld_matrix(self) -> Tensor:
        """[K, K] float64, nats: entry (y, y') is KL(y || y') (Eq. 4)."""
        return kld_matrix(self.mu, self.variance())

    def kld_sum(self) -> Tensor:
        """Sum of KL(y || y') over all ordered pairs, in O(K d)."""
        return kld_pair_sum(self.mu, self.variance())

    def kld_class_means(self) -> Tensor:
        """[K] float64: mean divergence of each class to the others, no gradient."""
        return kld_class_sums(self.mu, self.variance()) / max(1, self.num_classes - 1)

    @torch.no_grad()
    def saturated_share(self) -> Tensor:
        """Share of variances within 1 % of psi's range of either end (or at the lower bound without psi)."""
        if self.psi is None:
            return (self.s <= 0.1 * self.initial_variance).float().mean()
        share = torch.sigmoid(self.psi[1] * self.s)
        return ((share < 0.01) | (share > 0.99)).float().mean()
