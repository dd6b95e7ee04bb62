"""Coupling layers: one half of the channels sets the parameters of a linear map of the other half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glem_augment.flows.bijection import Bijection
from glem_augment.flows.matexp import expm_apply, expm_apply_low_rank

# (in_channels, out_channels) -> network
SubnetFactory = Callable[[int, int], nn.Module]
# Beyond this size S is kept in two thin factors: a full one would need n^2 outputs per pixel.
FULL_MATRIX_UP_TO = 24


def row_bounded(raw: Tensor, bound: float, dim: int) -> Tensor:
    """``bound * t / (1 + sum |t|)`` along ``dim``: absolute row sums stay below ``bound``, with slope ``bound`` at 0.

    Unlike an entrywise bound of r/n it lets a single entry use the whole budget of its row, so a diagonal S can
    scale by e^(+-r) whatever n.
    """
    return raw * (bound / (1 + raw.abs().sum(dim, keepdim=True)))


class Coupling(Bijection):
    """Splits the channels in halves x1, x2; x1 passes unchanged, x2 is mapped with parameters made from x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"a coupling needs an even number of channels, got {channels}")
        self.half = channels // 2

    def _transform(self, params: Tensor, x2: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _params(self, x1: Tensor) -> Tensor:
        return self.net(x1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x[:, : self.half], x[:, self.half :]
        y2, logdet = self._transform(self._params(x1), x2, inverse=False)
        return torch.cat([x1, y2], 1), logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = z[:, : self.half], z[:, self.half :]
        x2, logdet = self._transform(self._params(z1), z2, inverse=True)
        return torch.cat([z1, x2], 1), logdet


class AffineCoupling(Coupling):
    """``y2 = exp(s(x1)) * x2 + b(x1)`` with ``|s| <= bound`` (Dinh et al. 2017, bounded on both sides).

    Args:
        channels: c, even.
        subnet: factory of the network c/2 -> c.
        bound: largest absolute log-scale.
    """

    def __init__(self, channels: int, subnet: SubnetFactory, bound: float = 2.0) -> None:
        super().__init__(channels)
        self.bound = float(bound)
        self.net = subnet(self.half, 2 * self.half)

    def _transform(self, params: Tensor, x2: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw, shift = params[:, : self.half], params[:, self.half :]
        log_scale = self.bound * torch.tanh(raw / self.bound)
        logdet = log_scale.flatten(1).sum(1)
        if inverse:
            return (x2 - shift) * (-log_scale).exp(), -logdet
        return x2 * log_scale.exp() + shift, logdet


class MatExpCoupling(Coupling):
    """``y2 = exp(S(x1)) x2 + b(x1)`` per pixel, S an n x n matrix with ``||S||_inf <= bound``; log|det| = trace S.

    Source: Xiao & Liu 2020, Sec. 4.2; there tanh with a free scale and shift, which bounds nothing.

    Args:
        channels: c = 2n, even.
        subnet: factory of the network n -> n^2 + n (or 2 n rank + n for n > 24).
        bound: r; see ``taylor_plan`` for what it costs.
        rank: of the factors S = U W used for n > 24.
    """

    def __init__(self, channels: int, subnet: SubnetFactory, bound: float = 1.0, rank: int = 3) -> None:
        super().__init__(channels)
        n = self.half
        self.bound, self.rank = float(bound), int(rank)
        self.low_rank = n > FULL_MATRIX_UP_TO
        outputs = 2 * n * self.rank if self.low_rank else n * n
        self.net = subnet(n, outputs + n)
        if self.low_rank:
            # U starts at zero, so S = 0; W must not, or the gradients of both factors would vanish for ever.
            offset = torch.randn(self.rank, n, 1, 1) / n
            self.factor_offset = nn.Parameter(offset)

    def _transform(self, params: Tensor, x2: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        batch, n, height, width = x2.shape
        if self.low_rank:
            q = self.rank
            side = self.bound**0.5
            u = params[:, : n * q].reshape(batch, n, q, height, width)
            w = params[:, n * q : 2 * n * q].reshape(batch, q, n, height, width) + self.factor_offset
            shift = params[:, 2 * n * q :]
            u, w = row_bounded(u, side, 2), row_bounded(w, side, 2)
            logdet = torch.einsum("bnqhw,bqnhw->b", u, w)
            if inverse:
                return expm_apply_low_rank(u, w, x2 - shift, self.bound, inverse=True), -logdet
            return expm_apply_low_rank(u, w, x2, self.bound) + shift, logdet
        s = row_bounded(params[:, : n * n].reshape(batch, n, n, height, width), self.bound, 2)
        shift = params[:, n * n :]
        logdet = s.diagonal(dim1=1, dim2=2).flatten(1).sum(1)
        if inverse:
            return expm_apply(s, x2 - shift, self.bound, inverse=True), -logdet
        return expm_apply(s, x2, self.bound) + shift, logdet
