"""The elementwise nonlinearities of the convolutional subnets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glem_augment.flows.processor import mkl_is_fast

ACTIVATIONS = ("elu", "silu", "relu", "gelu")
_PLAIN: dict[str, Callable[..., Tensor]] = {"elu": F.elu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu}
# Those whose derivative follows from their result: done in place, autograd keeps one tensor instead of two. The others
# would make autograd copy the input first.
_FROM_RESULT = ("elu", "relu")
_LOG2_E = 1 / math.log(2)


def fast_elu(x: Tensor) -> Tensor:
    """ELU as ``max(x, min(e^x, 1) - 1)``: within 1e-7 of ``F.elu`` in float32, and without a derivative.

    Four or five passes over memory, and yet half the time of ``F.elu`` on a CPU: torch's expm1 is slow
    (benchmarks/elementwise.py).
    """
    if mkl_is_fast():
        below = torch.exp(x).clamp_max_(1).sub_(1)
    else:
        below = torch.mul(x, _LOG2_E).clamp_max_(0).exp2_().sub_(1)
    return torch.maximum(x, below, out=below)


class Activation(nn.Module):
    """An elementwise nonlinearity that keeps as little for the backward pass as its derivative allows.

    Args:
        name: one of ``ACTIVATIONS``.
    """

    def __init__(self, name: str = "elu") -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        self.name = name

    def forward(self, x: Tensor, owned: bool = True) -> Tensor:
        """Apply it to ``x``, any shape.

        Args:
            owned: nobody else reads ``x`` any more (the result of a convolution, which does not need it for its
                gradient), so it may be overwritten.
        """
        if self.name == "elu" and _may_be_fast(x):
            return fast_elu(x)
        function = _PLAIN[self.name]
        if self.name not in _FROM_RESULT:
            return function(x)
        if owned:
            return function(x, inplace=True)
        # relu keeps its result in either form. For elu a copy is cheaper than what it saves: the derivative from the
        # result needs no exponential, and the input is not kept beside the result.
        if self.name == "elu" and torch.is_grad_enabled():
            return function(x.clone(), inplace=True)
        return function(x)


def _may_be_fast(x: Tensor) -> bool:
    """Whether ``fast_elu`` may stand for ``F.elu``; a compiler makes one pass of either."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not plain and x.device.type == "cpu" and x.dtype == torch.float32
