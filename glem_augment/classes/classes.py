"""The classes of a model as one object, which is replaced as a whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glem_augment.checks import check_choice
from glem_augment.classes.gaussians import ClassGaussians, ClassModel, ClassSampler
from glem_augment.classes.modes import ClassModes


class Classes(nn.Module):
    """Densities and samples of K classes of latents in d dimensions. A model replaces them as a whole.

    Attributes:
        gaussians: a diagonal Gaussian per class.
        modes: means, principal modes and remaining variances, or None.
        full: whether densities have the full covariances of `modes` in place of the Gaussians' variances.
        fitted: the class model that was fitted to images, whose densities and samples come first; or None.
        temperature: T >= 1 of the posterior, softmax of log p(z|y) / T.
    """

    def __init__(
        self,
        gaussians: ClassGaussians,
        modes: ClassModes | None = None,
        full: bool = False,
        temperature: float = 1.0,
        fitted: ClassModel | None = None,
    ) -> None:
        super().__init__()
        self.fitted = fitted
        self.gaussians, self.modes, self.full, self.temperature = gaussians, modes, full, temperature

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z | y) of latents z [B, d] under every class, [B, K] nats."""
        if self.fitted is not None:
            return self.fitted.log_prob(z)
        return self.modes.log_prob(z) if self.full and self.modes is not None else self.gaussians.log_prob(z)

    def log_prob_of(self, z: Tensor, y: Tensor) -> Tensor:
        """log p(z | y) of each latent z [B, d] under its class y, int64 [B]: [B] nats."""
        if self.full or self.fitted is not None:
            return self.log_prob(z).gather(1, y[:, None])[:, 0]
        return self.gaussians.log_prob_of(z, y)

    def posterior(self, z: Tensor) -> Tensor:
        """p(y | z) [B, K], proportional to p(z | y)^(1/T): all classes equally likely beforehand."""
        return torch.softmax(self.log_prob(z) / self.temperature, 1)

    def sampler(self, source: str) -> ClassSampler:
        """What draws latents: "gaussian", the Gaussians, or "rfcm", the class model, or means and modes, from images.

        ValueError: another source, or no modes.
        """
        check_choice("source", source, ("gaussian", "rfcm"))
        if source == "gaussian":
            return self.gaussians
        found = self.modes if self.fitted is None else self.fitted
        if found is None:
            raise ValueError("source='rfcm' needs class modes; call model.fit_modes(data) first")
        return found
