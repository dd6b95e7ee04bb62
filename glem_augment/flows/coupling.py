"""The contract of a coupling, which is registered by a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.parts import register

# (in_channels, out_channels) -> network
SubnetFactory = Callable[[int, int], nn.Module]
_LARGEST_BOUND = 8


class Coupling(nn.Module):
    """Splits the channels in halves x1, x2; x1 passes unchanged, x2 is mapped with parameters made from x1.

    A new coupling is a subclass with `__init__(channels, ...)`, which sets `net`, and `transform`; or `couple`, for a
    layer without halves. With the decorator `register_coupling(name)`, presets, `create_flow` and saved models know it
    by that name. Its constructor may take `subnet`, `shape`, the (c, H, W) of x, and `index`, its number in the flow.
    `subnet(inputs, outputs)` makes a network whose last layer is zero, so `net` gives zeros at the start. The further
    arguments, each with a default, are options, which presets, saved models and users may set.

    Attributes:
        n: c / 2, the channels of a half.
        net: maps x1 [B, c/2, H, W] to parameters [B, m, H, W].
    """

    net: nn.Module

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """ValueError: a value of `options` that can't be used. It may come from a stranger's file.

        Types and names were checked before.
        """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n = channels // 2

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The map of the second half x2 [c/2, B, H, W], channel-major (see `multiscale`), or its inverse.

        `params` [B, m, H, W] come from the network. Returns the result and log|det| [B] in nats.
        """
        raise NotImplementedError

    def couple(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The whole layer on channel-major x [c, B, H, W]: ([c, B, H, W], log|det| [B])."""
        x1, x2 = x.split(self.n)
        y2, logdet = self.transform(x2, self.net(x1.transpose(0, 1)), inverse)
        return torch.cat([x1, y2]), logdet


def check_bound(bound: float) -> None:
    """ValueError unless the bound of log-scales or of ||S|| lies in (0, 8]."""
    if not 0 < bound <= _LARGEST_BOUND:
        raise ValueError(f"bound must lie in (0, {_LARGEST_BOUND}], got {bound!r}")


register_coupling = partial(register, "coupling", base=Coupling)
