"""Coupling layers: one half of the channels sets the parameters of a linear map of the other half."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from glem_augment.flows.matexp import PLANES_UP_TO, expm_apply, expm_apply_low_rank

# (in_channels, out_channels) -> network
SubnetFactory = Callable[[int, int], nn.Module]
# Above this size S is the product of two thin factors: a full S would need n^2 outputs per pixel.
FULL_MATRIX_UP_TO = 24


class Coupling(nn.Module):
    """Splits the channels in halves x1, x2; x1 passes unchanged, x2 is mapped with parameters made from x1."""

    net: nn.Module

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n = channels // 2

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The map of the second half x2 [c/2, B, H, W], channel-major (see `multiscale`), or its inverse.

        `params` [B, m, H, W] come from the network. Returns the result and log|det| [B] in nats.
        """
        raise NotImplementedError

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves."""
        first, second = x.split(self.n)
        return first, second

    def merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Undoes `split`."""
        return torch.cat([x1, x2])

    def params(self, x1: Tensor) -> Tensor:
        """The network's output for the first half."""
        return self.net(x1.transpose(0, 1))

    def couple(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The whole layer on channel-major x [c, B, H, W]: ([c, B, H, W], log|det| [B])."""
        x1, x2 = self.split(x)
        y2, logdet = self.transform(x2, self.params(x1), inverse)
        return self.merge(x1, y2), logdet


class AffineCoupling(Coupling):
    """`y2 = exp(s(x1)) * x2 + b(x1)` with `s = bound * tanh(raw / bound)`; log|det| = sum of s.

    Source: Dinh et al. 2017, Sec. 3.4, here with log-scales bounded on both sides.

    Args:
        channels: c, even.
        subnet: factory of the network c/2 -> c.
        bound: largest absolute log-scale.
    """

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


def row_bounded(raw: Tensor, bound: float, dim: int) -> tuple[Tensor, Tensor]:
    """`S = bound * raw / (1 + sum |raw|)` with the sum along `dim`: absolute row sums stay below `bound`.

    The slope at 0 is `bound`. A single entry may use the whole budget of its row, unlike with an entrywise bound of
    r/n. So a diagonal S can scale by e^(+-r) for every n. Returns S and the denominators.
    """
    denominators = 1 + raw.abs().sum(dim, keepdim=True)
    return raw * (bound / denominators), denominators


def _norm_bound(denominators: Tensor, bound: float) -> float:
    """An upper bound of `||S||_inf` over the batch: `bound` divided by a power of two up to 2^10.

    Early in training S is small, and then most terms of its series are zeros. The largest row sum of S is
    `bound - bound / denominator`. It is read only on a CPU, where that does not wait for the device.
    """
    if denominators.device.type != "cpu" or not denominators.numel():
        return bound
    norm = bound - bound / float(denominators.detach().max()) + 1e-6 * bound
    if not norm < bound:  # also if a network has diverged to NaN
        return bound
    return bound * 0.5 ** min(10, math.floor(math.log2(bound / norm)))


class MatExpCoupling(Coupling):
    """`y2 = exp(S(x1)) x2 + b(x1)` per pixel, S an n x n matrix with `||S||_inf <= bound`; log|det| = trace S.

    Source: Xiao & Liu 2020, Sec. 4.2. Their S is a tanh with a free scale and shift, which bounds nothing.

    Args:
        channels: c = 2n, even.
        subnet: factory of the network n -> n^2 + n (or 2 n rank + n for n > 24).
        bound: r; `taylor_plan` tells its cost.
        rank: of the factors S = U W used for n > 24.
    """

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
            u, _ = row_bounded(raw_u.unflatten(1, (n, q)), r**0.5, 2)
            w, _ = row_bounded(raw_w.unflatten(1, (q, n)) + self.factor_offset, r**0.5, 2)
            v = expm_apply_low_rank(u, w, v, r, inverse)
            logdet = torch.einsum("bnqhw,bqnhw->b", u, w)
        else:
            s, denominators = row_bounded(raw.unflatten(1, (n, n)), r, 2)
            v = expm_apply(s, v, _norm_bound(denominators, r), inverse)
            logdet = s.diagonal(dim1=1, dim2=2).sum((1, 2, 3))
        if inverse:
            return v.transpose(0, 1), -logdet
        return (v + shift).transpose(0, 1), logdet
