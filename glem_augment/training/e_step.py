"""The E-step's loss (Eq. 3), for the paper's objective and those that it is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.data.pixels import to_levels
from glem_augment.devices import move
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.model.glem import GLEM
from glem_augment.training.config import TrainConfig


def encode(model: GLEM, x: Tensor, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`model.encode` with the run's dequantisation: uniform, or Gaussian of `noise_std` levels (IB-INN)."""
    if not config.noise_std:
        return model.encode(x, generator)
    h = to_levels(x, config.bits, model.gaussians.mu.dtype)
    noise = move(torch.randn(h.shape, generator=generator, dtype=h.dtype), h.device)
    z, logdet = model.flow(h + noise * (config.noise_std * 2.0**-config.bits))
    return z, logdet - model.dim * config.bits * math.log(2)


def e_step_loss(
    gaussians: ClassGaussians, z: Tensor, logdet: Tensor, y: Tensor, config: TrainConfig, beta: float
) -> Tensor:
    """`mean NLL / d + beta * cross-entropy` in nats per dimension; see `TrainConfig`.

    Args:
        gaussians: the class Gaussians, which get a gradient only where their parameters ask for one.
        z: latents [B,d]; `logdet` [B] nats; `y` int64 [B].
        beta: weight of the cross-entropy at this step.
    """
    if config.beta or config.likelihood == "marginal":
        scores = gaussians.log_prob(z)
        own = scores.gather(1, y[:, None])[:, 0]
        if config.likelihood == "marginal":
            own = torch.logsumexp(scores, 1) - math.log(gaussians.num_classes)
    else:
        own = gaussians.log_prob_of(z, y)
    loss = -(own + logdet).mean() / gaussians.dim
    if config.beta:
        loss = loss + beta * F.cross_entropy(config.ce_scale * scores, y, label_smoothing=config.label_smoothing)
    return loss
