"""The matrix-exponential coupling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.flows.coupling import Coupling, SubnetFactory, check_bound, register_coupling
from glem_augment.flows.matexp import PLANES_UP_TO, expm_apply, expm_apply_low_rank

# Above this size S is the product of two thin factors: a full S would need n^2 outputs per pixel.
FULL_MATRIX_UP_TO = 24
_LARGEST_RANK = 64


def row_bounded(raw: Tensor, bound: float, dim: int) -> Tensor:
    """`S = bound * raw / (1 + sum |raw|)` with the sum along `dim`: row sums of |S| are below the bound.

    A single entry may use the whole budget of its row. So a diagonal S can scale by e^(+-bound) for every n.
    """
    return raw * (bound / (1 + raw.abs().sum(dim, keepdim=True)))


@register_coupling("matexp")
class MatExpCoupling(Coupling):
    """`y2 = exp(S(x1)) x2 + b(x1)` per pixel, S an n x n matrix with `||S||_inf <= bound`; log|det| = trace S.

    Source: Xiao & Liu 2020, Sec. 4.2. Their S is a tanh with a free scale and shift, which bounds nothing.

    Args:
        channels: c = 2n, even.
        subnet: factory of the network n -> n^2 + n (or 2 n rank + n for n > 24).
        bound: r; the number of terms of the series grows with it, see `taylor_plan`.
        rank: of the factors S = U W used for n > 24.
    """

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        check_bound(options["bound"])
        if not 1 <= options["rank"] <= _LARGEST_RANK:
            raise ValueError(f"rank must be a whole number from 1 to {_LARGEST_RANK}, got {options['rank']}")

    def __init__(self, channels: int, subnet: SubnetFactory, bound: float = 1.0, rank: int = 3) -> None:
        super().__init__(channels)
        n = self.n
        self.bound, self.rank = float(bound), int(rank)
        self.low_rank = n > FULL_MATRIX_UP_TO
        outputs = 2 * n * self.rank if self.low_rank else n * n
        self.net = subnet(n, outputs + n)
        if self.low_rank:
            # U starts at zero, so S = 0. W must not, or the gradients of both factors would vanish for ever.
            self.factor_offset = nn.Parameter(torch.randn(self.rank, n, 1, 1) / n)

    @torch.compiler.disable  # Code fused through an unrolled series would compute its terms over and over.
    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        n, q, r = self.n, self.rank, self.bound
        if n <= PLANES_UP_TO:  # Each parameter becomes a plane of pixels.
            params = params.transpose(0, 1).contiguous().transpose(0, 1)
        raw, shift = params.split([params.shape[1] - n, n], 1)
        v = x2.transpose(0, 1)
        if inverse:
            v = v - shift
        if self.low_rank:
            raw_u, raw_w = raw.split(n * q, 1)
            # ||U|| ||W|| <= r, with the root of r for each.
            u = row_bounded(raw_u.unflatten(1, (n, q)), r**0.5, 2)
            w = row_bounded(raw_w.unflatten(1, (q, n)) + self.factor_offset, r**0.5, 2)
            v = expm_apply_low_rank(u, w, v, r, inverse)
            logdet = torch.einsum("bnqhw,bqnhw->b", u, w)
        else:
            s = row_bounded(raw.unflatten(1, (n, n)), r, 2)
            v = expm_apply(s, v, r, inverse)
            logdet = s.diagonal(dim1=1, dim2=2).sum((1, 2, 3))
        if inverse:
            return v.transpose(0, 1), -logdet
        return (v + shift).transpose(0, 1), logdet
