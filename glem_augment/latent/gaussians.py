"""One diagonal Gaussian per class in the latent space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glem_augment.flows.precision import full_precision
from glem_augment.latent.densities import LogProb, Parametrisation, Psi, density_terms, two_products
from glem_augment.latent.kld import kld_class_sums, kld_matrix, kld_pair_sum

# About how many elements of a parameter are looked at to see whether an optimizer has made a step.
_PROBED = 1024

# Without psi: of the variances at the start, and their lower bound relative to it.
INITIAL_VARIANCE, LOWEST_SHARE = 0.3, 0.1


def _probe(parameter: Tensor) -> Tensor:
    """Some of its elements, at least one of every class.

    Fused optimizers write to parameters without bumping their version; but an optimizer's step changes these too.
    """
    step = max(1, min(parameter.shape[1], parameter.numel() // _PROBED))
    return parameter.detach().flatten()[::step]


def _same(now: list[tuple[Tensor, int, int]], probes: list[Tensor], cache: dict) -> bool:
    """Whether what is kept was made from parameters in this state."""
    before = cache.get("state", ())
    if len(before) != len(now) or len(cache["probes"]) != len(probes):
        return False
    kept = all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(now, before, strict=True))
    return kept and all(torch.equal(a, b) for a, b in zip(probes, cache["probes"], strict=True))


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
        initial_variance: float = INITIAL_VARIANCE,
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
        self._seen: dict = {}

    @property
    def num_classes(self) -> int:
        return self.mu.shape[0]

    @property
    def dim(self) -> int:
        return self.mu.shape[1]

    @property
    def _lowest(self) -> float:
        """Lower bound of the variances without psi."""
        return LOWEST_SHARE * self.initial_variance

    @property
    def _how(self) -> Parametrisation:
        return Parametrisation(self.psi, self._lowest)

    def variance(self) -> Tensor:
        """sigma^2 [K, d]; differentiable with respect to ``s``."""
        return self._variance(self.s)

    def variance_of(self, y: Tensor) -> Tensor:
        """``variance()[y]`` [B, d] for classes y, int64 [B], without those of all classes where these are more.

        Up to the last bit: which of its ways a vectorised sigmoid goes depends on where a number stands.
        """
        if len(y) >= self.num_classes:
            return self.variance()[y]
        return self._variance(self.s[y])

    def _variance(self, s: Tensor) -> Tensor:
        return s.clamp_min(self._lowest) if self.psi is None else Psi.apply(s, *self.psi)

    @torch.no_grad()
    def set_variance(self, variance: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Set ``rows`` so that ``variance()`` comes as close to ``variance`` [.., d] as psi allows."""
        if self.psi is None:
            self.s[rows] = variance.to(self.s).clamp_min(self._lowest)
            return
        a, b, c = self.psi
        share = ((variance.to(self.s) - c) / a).clamp(0.01, 0.99)
        self.s[rows] = torch.logit(share) / b

    @torch.no_grad()
    def project(self) -> None:
        """Without psi, round variances up to their lower bound, as the paper does after each step."""
        if self.psi is None:
            self.s.clamp_(min=self._lowest)

    @torch.no_grad()
    def randomise(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the means from N(0, std^2): random initialisation of the paper's ablation."""
        self.mu.copy_(torch.randn(self.mu.shape, generator=generator).to(self.mu) * std)

    def _learns(self) -> bool:
        """Whether a gradient is to reach the parameters."""
        return torch.is_grad_enabled() and (self.mu.requires_grad or self.s.requires_grad)

    def _state(self) -> dict | None:
        """What tells whether the parameters have changed since; None where nothing does."""
        parameters = (self.mu, self.s)
        on_cpu = self.mu.device.type == "cpu"
        if any(p.is_inference() or (p.requires_grad and not on_cpu) for p in parameters):
            return None
        # The storages are held too: an address that may be given to a new tensor says nothing.
        return {
            "state": [(p, p.data_ptr(), p._version) for p in parameters],
            "probes": [_probe(p) for p in parameters if on_cpu],
            "storages": [p.untyped_storage() for p in parameters],
        }

    def _terms_while_learning(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Those of ``_density_terms``, if the parameters are as they were the last time and no gradient has gone to
        them since: when they change from call to call, keeping anything would be a waste."""
        state, seen = self._state(), self._seen
        if state is not None and seen and _same(state["state"], state["probes"], seen):
            return self._density_terms()
        self._forget()
        if state is not None:
            self._seen = {**state, "probes": [p.clone() for p in state["probes"]]}
        return None

    def _forget(self) -> None:
        self._cache, self._seen = {}, {}

    def _density_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """1/sigma^2 [K,d], mu/sigma^2 [K,d], constants [K]; no gradient reaches the parameters through them.

        They are kept until a parameter is replaced, moved or written to; on an accelerator only those of frozen
        parameters.
        """
        state = self._state()
        if state is None:
            self._cache = {}
            return self._computed_terms()
        cache = self._cache  # another thread may put a new one in its place at any time
        if not _same(state["state"], state["probes"], cache):
            # A tensor made under inference_mode could never again take part in a graph.
            with torch.inference_mode(False), torch.no_grad():
                kept = {"probes": [p.clone() for p in state["probes"]], "terms": self._computed_terms()}
            cache = self._cache = {**state, **kept}
        return cache["terms"]

    @torch.no_grad()
    def _computed_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        return density_terms(self.mu, self.s, self._how)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["_cache"], state["_seen"] = {}, {}
        return state

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of every latent under every class, by two matrix products.

        The constants of the products are kept between calls until a parameter changes; writes through ``.data`` or
        NumPy may go unseen, all others are noticed. Where a gradient may reach the parameters they are kept from the
        second call on, until one does; the result can be differentiated once. On an accelerator only those of frozen
        parameters are kept, and none of parameters made under inference_mode, whose writes torch does not count.

        Args:
            z: [B, d].

        Returns:
            [B, K] nats.
        """
        # Sums of thousands of terms that nearly cancel: neither bf16 (autocast) nor TF32 will do.
        with full_precision(z.device.type):
            if self._learns():
                return LogProb.apply(z, self.mu, self.s, self._how, self._terms_while_learning(), self._forget)
            return two_products(z, self._density_terms())

    def log_prob_of(self, z: Tensor, y: Tensor) -> Tensor:
        """Log-density of latent i under its own class ``y[i]``: [B] nats, O(B d)."""
        var = self.variance_of(y)
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
            return self.mu[y] + temperature * self.variance_of(y).sqrt() * noise

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
            return (self.s <= self._lowest).float().mean()
        share = torch.sigmoid(self.psi[1] * self.s)
        return ((share < 0.01) | (share > 0.99)).float().mean()
