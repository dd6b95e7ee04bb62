"""``torch.compile`` of the steps of a flow.

A step, not the whole flow, is the unit: the steps of a level differ only in their weights, so a level costs a few
compilations however deep it is, instead of one that grows with the depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, Tensor]]
# Kinds of one step: per level, with and without gradients, and the first one, whose input needs none.
_KINDS_PER_LEVEL = 8


def compile_step(function: Step, levels: int, backend: str = "inductor") -> Step:
    """A compiled form of ``level.step_forward`` or ``level.step_inverse``, for any batch size.

    Args:
        function: takes channel-major x [C, B, H, W] first.
        levels: of the flow; raises Dynamo's limit of compilations per function where it needs more.
        backend: see ``torch.compile``.

    Returns:
        The same function. A graph break is an error (``fullgraph``), raised by its first call, as is a missing compiler
        (RuntimeError that says what to do).
    """
    limit = _KINDS_PER_LEVEL * levels
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, limit)
    # The subnets ask for channels_last themselves; the compiler's own choice can't cope with a batch of unknown size.
    options = {"layout_optimization": False} if backend == "inductor" else None
    fast = torch.compile(function, fullgraph=True, backend=backend, options=options)

    def run(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        torch._dynamo.maybe_mark_dynamic(x, 1)  # a short last batch needs no code of its own
        try:
            return fast(x, *rest)
        except Exception as error:
            if "compiler" not in str(error).lower() or "InvalidCxx" not in f"{type(error).__name__}{error}":
                raise
            raise RuntimeError(
                "the flow could not be compiled, because no C++ compiler was found: install one (for example the "
                "package g++) or name it in the environment variable CXX, or run without compile"
            ) from error

    return run
