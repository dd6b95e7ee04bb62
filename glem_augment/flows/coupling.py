"""Coupling layers: one half of the channels sets the parameters of a linear map of the other half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glem_augment.flows import affine_native, expm_native
from glem_augment.flows.affine_coupling import affine_coupling
from glem_augment.flows.bijection import Bijection
from glem_augment.flows.expm_coupling import expm_coupling
from glem_augment.flows.expm_op import expm_coupling_op
from glem_augment.flows.matexp import expm_apply_low_rank
from glem_augment.flows.ordinary import is_ordinary
from glem_augment.flows.subnets import Subnet

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

    net: nn.Module

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"a coupling needs an even number of channels, got {channels}")
        self.half = channels // 2

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The map of the second half.

        Args:
            x2: [c/2, B, H, W], channel-major (see ``level``).
            params: [B, m, H, W], what the network made of the first half.
            inverse: undo it.

        Returns:
            [c/2, B, H, W] and log|det| [B] in nats.
        """
        raise NotImplementedError

    def has_kernel(self, x: Tensor) -> bool:
        """Whether ``transform`` is done by a kernel where it works on tensors like x."""
        return False

    def is_faster_uncompiled(self, x: Tensor) -> bool:
        """Whether ``couple(x)`` is at its fastest as it is, whatever a compiler could make of it."""
        return isinstance(self.net, Subnet) and self.net.is_faster_uncompiled(x, self.has_kernel(x))

    def couple(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The whole layer on channel-major x [c, B, H, W]: ([c, B, H, W], log|det| [B])."""
        x1, x2 = x.split(self.half)
        y2, logdet = self.transform(x2, self.net(x1.transpose(0, 1)), inverse)
        return torch.cat([x1, y2]), logdet

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = self.couple(x.transpose(0, 1))
        return y.transpose(0, 1).contiguous(), logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = self.couple(z.transpose(0, 1), inverse=True)
        return x.transpose(0, 1).contiguous(), logdet


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

    def has_kernel(self, x: Tensor) -> bool:
        return is_ordinary(x) and affine_native.has_kernel(self.half)

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return affine_coupling(x2, params, self.bound, inverse)


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

    def has_kernel(self, x: Tensor) -> bool:
        return not self.low_rank and is_ordinary(x) and expm_native.has_kernel(self.half, self.bound)

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        if not self.low_rank:
            couple = expm_coupling_op if torch.compiler.is_compiling() else expm_coupling
            return couple(x2, params, self.bound, inverse)
        n, batch, height, width = x2.shape
        q, side = self.rank, self.bound**0.5
        u = params[:, : n * q].reshape(batch, n, q, height, width)
        w = params[:, n * q : 2 * n * q].reshape(batch, q, n, height, width) + self.factor_offset
        u, w = row_bounded(u, side, 2), row_bounded(w, side, 2)
        shift, v = params[:, 2 * n * q :], x2.transpose(0, 1)
        logdet = torch.einsum("bnqhw,bqnhw->b", u, w)
        if inverse:
            return expm_apply_low_rank(u, w, v - shift, self.bound, inverse=True).transpose(0, 1), -logdet
        return (expm_apply_low_rank(u, w, v, self.bound) + shift).transpose(0, 1), logdet
