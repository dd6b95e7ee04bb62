"""Where code that torch does not know may stand for torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# Asked several times in a pass, each time after a network has emptied the caches: the fewer steps to it, the better.
_is_tracing, _modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
_interpreter, _is_batched = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.is_legacy_batchedtensor


def is_ordinary(x: Tensor) -> bool:
    """Whether ``x`` is float32 on a CPU, and nobody follows what is done to it but autograd in reverse.

    Code of another kind would be lost on tangents, tracing, ``torch.func``, subclasses, and modes that count or fake
    operations.
    """
    return not _is_followed() and is_known(x)


def are_ordinary(tensors: Iterable[Tensor]) -> bool:
    """Whether all are."""
    return not _is_followed() and all(map(is_known, tensors))


def are_ordinary_on_cuda(tensors: Iterable[Tensor]) -> bool:
    """As ``are_ordinary``, on a GPU."""
    return not _is_followed() and all(
        type(x) in (Tensor, nn.Parameter) and x.is_cuda and x.dtype is torch.float32 and not _is_batched(x)
        for x in tensors
    )


def is_known(x: Tensor) -> bool:
    """What of ``is_ordinary`` depends on ``x``."""
    kind = type(x)
    # What autograd.grad's is_grads_batched makes is no parameter.
    known = kind is nn.Parameter or (kind is Tensor and not _is_batched(x))
    return known and x.is_cpu and x.dtype is torch.float32


def _is_followed() -> bool:
    return (
        forward_ad._current_level >= 0
        or is_compiling()
        or _is_tracing()
        or bool(_modes())
        or _interpreter() is not None
    )


def gradients_of(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    rest: Sequence[Any],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by way of torch's operations, for a backward that a kernel can't do; differentiable where asked for.

    Args:
        function: ``function(*inputs, *rest)``: what the kernel computes; a result may be None.
        inputs, rest: tensors, and what else it takes.
        needed: which inputs' gradients are; may be longer.
        upstream: the gradients of its results.

    Returns:
        One per input; None where it is not needed.
    """
    followed = torch.is_grad_enabled()
    wanted = [t for t, needs in zip(inputs, needed, strict=False) if needs]
    with torch.enable_grad():
        results = zip(function(*inputs, *rest), upstream, strict=True)
    # A result may be none, and the log|det| of a frozen network has no gradient.
    pairs = [(result, g) for result, g in results if result is not None and result.requires_grad]
    found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=followed))
    return [next(found) if needs else None for _, needs in zip(inputs, needed, strict=False)]
