"""The elementwise nonlinearities of the convolutional subnets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glem_augment.flows import elu_native
from glem_augment.flows.elu_native import LOG2_E
from glem_augment.flows.ordinary import is_ordinary
from glem_augment.flows.processor import mkl_is_fast

ACTIVATIONS = ("elu", "silu", "relu", "gelu")
_PLAIN: dict[str, Callable[..., Tensor]] = {"elu": F.elu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu}
# Those whose derivative follows from their result: done in place, autograd keeps one tensor instead of two. The others
# would make autograd copy the input first.
_FROM_RESULT = ("elu", "relu")
# With gradients, a function written in Python costs what torch's own elu takes for so many numbers.
_WORTH_A_FUNCTION = 2**16
_ZERO, _MINUS_LOG2_E = torch.zeros(()), torch.tensor(-LOG2_E)


def fast_elu(x: Tensor, owned: bool = False) -> Tensor:
    """ELU within 1e-7 of ``F.elu`` in float32, and without a derivative.

    By a kernel, or else as ``min(max(x, 0), e^x - 1)``: three or four passes over memory, and yet less than half the
    time of ``F.elu`` on a CPU, since torch's expm1 is slow (benchmarks/elementwise.py).

    Args:
        x: any shape.
        owned: it may be overwritten.
    """
    if elu_native.serves(x):
        return elu_native.elu(x, owned=owned)
    bent = torch.exp(x) if mkl_is_fast() else torch.mul(x, LOG2_E).exp2_()
    bent.sub_(1)
    return torch.clamp(_ZERO, x, bent, out=bent)


def fast_elu_in_bits(x: Tensor, owned: bool = False) -> Tensor:
    """``c * elu(x / c)`` with c = log2(e), likewise: without a kernel one pass less, where exp2 is faster than exp."""
    if elu_native.serves(x):
        return elu_native.elu(x, LOG2_E, owned)
    bent = torch.exp2(x)
    torch.add(_MINUS_LOG2_E, bent, alpha=LOG2_E, out=bent)
    return torch.clamp(_ZERO, x, bent, out=bent)


class _FastElu(torch.autograd.Function):
    """``fast_elu`` with the derivative that ``F.elu`` has in place: from the result, which alone is kept."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = fast_elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.elu_backward(g, 1.0, 1.0, 1.0, True, y)


def may_be_overwritten(x: Tensor) -> bool:
    """Whether autograd lets the result of a module be overwritten: not if a hook for its gradients made it a view."""
    return torch.compiler.is_compiling() or not x._is_view()


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
        if self.name == "elu" and is_ordinary(x):
            if not torch.is_grad_enabled():
                return fast_elu(x, owned)
            if x.numel() >= _WORTH_A_FUNCTION:
                return _FastElu.apply(x)
        function = _PLAIN[self.name]
        if self.name not in _FROM_RESULT:
            return function(x)
        if owned and may_be_overwritten(x):
            return function(x, inplace=True)
        # relu keeps its result in either form. For elu a copy is cheaper than what it saves: the derivative from the
        # result needs no exponential, and the input is not kept beside the result.
        if self.name == "elu" and torch.is_grad_enabled():
            return function(x.clone(), inplace=True)
        return function(x)
