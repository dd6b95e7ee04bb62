"""Where code that torch does not know may stand for torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_ordinary(x: Tensor) -> bool:
    """Whether ``x`` is float32 on a CPU, and nobody follows what is done to it but autograd in reverse.

    Code of another kind would be lost on tangents, tracing, ``torch.func``, subclasses, and modes that count or fake
    operations.
    """
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.is_cpu
        and x.dtype is torch.float32
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # autograd.grad's is_grads_batched
    )
