"""The affine coupling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glem_augment.flows.coupling import Coupling, SubnetFactory, check_bound, register_coupling


@register_coupling("affine")
class AffineCoupling(Coupling):
    """`y2 = exp(s(x1)) * x2 + b(x1)` with `s = bound * tanh(raw / bound)`; log|det| = sum of s.

    Source: Dinh et al. 2017, Sec. 3.4, here with log-scales bounded on both sides. `subnet` makes the network c/2 -> c.
    """

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        check_bound(options["bound"])

    def __init__(self, channels: int, subnet: SubnetFactory, bound: float = 2.0) -> None:
        super().__init__(channels)
        self.bound = float(bound)
        self.net = subnet(self.n, 2 * self.n)

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        raw, shift = params.transpose(0, 1).contiguous().split(self.n)
        # bound * tanh(raw / bound), by way of the sigmoid: on many processors tanh takes several times as long.
        log_scale = torch.sigmoid(raw * (2 / self.bound)).sub(0.5).mul_(2 * self.bound)
        logdet = log_scale.sum((0, 2, 3))
        if inverse:
            return (x2 - shift) * (-log_scale).exp(), -logdet
        return torch.addcmul(shift, x2, log_scale.exp()), logdet
