"""The loss of the E-step, for the paper's objective and those that it is compared with, and how images come to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.data.pixels import to_levels
from glem_augment.devices import move
from glem_augment.latent.gaussians import ClassGaussians, log_densities
from glem_augment.model.glem import GLEM
from glem_augment.training.config import TrainConfig
from glem_augment.training.image_ops import augment_batch


def augmented(x: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """``x`` uint8 [B,C,H,W] under ``config.augment``; a class code in its lowest ``code_rows`` rows stays as it is."""
    if not config.code_rows:
        return augment_batch(x, config.augment, generator)
    image, code = x[:, :, : -config.code_rows], x[:, :, -config.code_rows :]
    return torch.cat([augment_batch(image, config.augment, generator), code], 2)


def encode(model: GLEM, x: Tensor, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``model.encode`` with the run's dequantisation: uniform, or Gaussian of ``noise_std`` levels (IB-INN)."""
    if not config.noise_std:
        return model.encode(x, generator)
    h = to_levels(x, config.bits, model.gaussians.mu.dtype)
    noise = move(torch.randn(h.shape, generator=generator, dtype=h.dtype), h.device)
    z, logdet = model.flow(h + noise * (config.noise_std * 2.0**-config.bits))
    return z, logdet - model.dim * config.bits * math.log(2)


def e_step_loss(
    gaussians: ClassGaussians, z: Tensor, logdet: Tensor, y: Tensor, config: TrainConfig, beta: float
) -> Tensor:
    """``mean NLL / d + beta * cross-entropy``, see ``TrainConfig``; nats per dimension.

    The Gaussians are constants of the step unless ``config.joint``.
    """
    scores = None
    if config.joint:
        scores = gaussians.log_prob(z)
    elif config.beta or config.likelihood == "marginal":
        scores = log_densities(z, gaussians.mu.detach(), gaussians.variance().detach())
    if config.likelihood == "marginal":
        own = torch.logsumexp(scores, 1) - math.log(gaussians.num_classes)
    elif scores is not None:
        own = scores.gather(1, y[:, None])[:, 0]
    else:
        mu, var = gaussians.mu.detach()[y], gaussians.variance().detach()[y]
        own = -0.5 * ((z - mu).square() / var + var.log() + math.log(2 * math.pi)).sum(1)
    loss = -(own + logdet).mean() / gaussians.dim
    if config.beta:
        loss = loss + beta * F.cross_entropy(config.ce_scale * scores, y, label_smoothing=config.label_smoothing)
    return loss
