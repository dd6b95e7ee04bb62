"""The contract of a flow."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from glem_augment.flows.subnets import Subnet
from glem_augment.parts import register


class Flow(nn.Module):
    """An invertible map with a tractable log-determinant: x [B,C,H,W] <-> flat z [B, C*H*W].

    `forward(x)` returns `(z, logdet)` and `inverse(z)` returns `(x, logdet)`. Both log-determinants are [B], in nats.
    Each belongs to its direction, so the two of a round trip cancel. Pixels lie in [-1/2, 1/2). Both methods run in
    `precision.full_precision`, and they are differentiable. `check_flow` tests a user's subclass.

    A subclass `__init__(image_shape, ...)`, whose further arguments have defaults, can have the decorator
    `register_flow(name)`: `GLEM.create`, presets and saved models then know it by that name.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape: tuple[int, int, int] = image_shape
        self.autocast: torch.dtype | None = None

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def initialise(self, x: Tensor) -> None:
        """Set the layers that depend on the first batch `x` [B,C,H,W], once."""

    def set_dropout(self, part: float) -> None:
        """Leave out that part of the channels of the subnets, at random. See `Subnet`."""
        for module in self.modules():
            if isinstance(module, Subnet):
                module.dropout = part

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        """Run the subnets in `dtype` (float16 or bfloat16) or, with None, in float32. See `Subnet`."""
        self.autocast = dtype
        for module in self.modules():
            if isinstance(module, Subnet):
                module.autocast = dtype


register_flow = partial(register, "flow", base=Flow)
