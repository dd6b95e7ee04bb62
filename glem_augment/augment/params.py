"""The random parameters of one call of GLEMAugment, and small helpers to draw and use them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from glem_augment.devices import move

# Where a partner comes from (AugmentParams.source).
FROM_BATCH, FROM_RFCM, FROM_GAUSSIAN, FROM_BANK = 0, 1, 2, 3


@dataclass
class AugmentParams:
    """The random choices of one call, for n selected rows of a batch of B; tensors on the device of the
    labels.

    Attributes:
        rows: int64 [n], the rows to change.
        cls: int64 [n], flow class of each row, whose modes are used; -1: not in the flow, the row is passed
            through.
        partner: int64 [n], the partner's row in the batch; -1: a draw, made from `eps`.
        partner_cls: int64 [n], flow class of the partner; -1 for a batch row that is not in the flow.
        source: int64 [n], 0 = batch row, 1 = draw from a class's RFCM, 2 = draw from a class's Gaussian, 3 = a latent
            of an earlier image.
        l: float32 [n] in [1/2, 1], the share of the own image along the modes.
        eps: float32 [n, m] standard normal: coefficients of the modes (policy "noise"), or what a drawn
            partner is made from.
        stored: float32 [n, d] latents of earlier images for the rows whose source is 3; empty without a bank.

    partner, partner_cls, source and l are empty for policy "noise".
    """

    rows: Tensor
    cls: Tensor
    partner: Tensor
    partner_cls: Tensor
    source: Tensor
    l: Tensor  # noqa: E741  (the paper's letter)
    eps: Tensor
    stored: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))

    def to(self, device: torch.device | str) -> AugmentParams:
        """The same parameters with every tensor on `device`."""
        return AugmentParams(**{f.name: move(getattr(self, f.name), device) for f in fields(self)})

    def where(self, mask: Tensor) -> AugmentParams:
        """The parameters of the selected rows for which `mask`, bool [n], holds."""
        if bool(mask.all()):
            return self
        n, values = len(self.rows), {f.name: getattr(self, f.name) for f in fields(self)}
        return AugmentParams(**{name: v[mask] if len(v) == n else v for name, v in values.items()})


def chosen_rows(batch: int, p: float, generator: torch.Generator) -> Tensor:
    """Rows to change, int64 [n], rising: each with probability p, and n is p * batch, rounded up or down at random.

    Not a coin for every row: n would differ from batch to batch, and whatever prepares itself for the shapes it meets
    (oneDNN, cuDNN's benchmark mode, torch.compile) would do so again and again, which takes time and memory.
    """
    n = math.floor(p * batch + float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu")))
    return torch.randperm(batch, generator=generator, device="cpu")[:n].sort().values


def folded_beta(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """max(l, 1 - l) for l ~ Beta(alpha, alpha): float32 [n] in [1/2, 1].

    Beta is g / (g + g') of two gammas, taken in logarithms with g(alpha) = g(alpha + 1) u^(1/alpha): for a
    small alpha both gammas underflow. (torch.distributions.Beta takes no generator.)
    """
    gammas = torch._standard_gamma(torch.full((n, 2), alpha + 1.0, dtype=torch.float64, device="cpu"), generator)
    uniform = torch.rand(n, 2, generator=generator, dtype=torch.float64, device="cpu").clamp(min=1e-300)
    logs = gammas.log() + uniform.log() / alpha
    return (logs[:, 0] - logs[:, 1]).abs().sigmoid().to(torch.float32)
