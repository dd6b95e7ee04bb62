"""The contract of a flow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def initialise(self, x: Tensor) -> None:
        """Set the layers that depend on the first batch `x` [B,C,H,W], once."""

    def set_dropout(self, part: float) -> None:
        """Leave out that part of the networks' channels at random, 0 for none; see `Subnet`.

        ValueError: no module of the flow, such as a coupling or a `Subnet`, has this method.
        """
        _set(self, "set_dropout", part, "dropout")

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        """Run the networks in `dtype` (float16 or bfloat16) or, with None, in float32; errors as in `set_dropout`."""
        _set(self, "set_autocast", dtype, "precision bf16")


def _set(flow: Flow, method: str, value: Any, setting: str) -> None:
    parts = [part for part in flow.modules() if part is not flow and hasattr(part, method)]
    if value and not parts:
        raise ValueError(
            f"{type(flow).__name__} can't be trained with {setting}: leave it out, or give the flow, its couplings or "
            f"their networks a method {method}"
        )
    for part in parts:
        getattr(part, method)(value)


register_flow = partial(register, "flow", base=Flow)
