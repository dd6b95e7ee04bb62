"""``torch.compile`` of the steps of a flow.

A step, not the whole flow, is the unit: the steps of a level differ only in their weights, so a level costs a few
compilations however deep it is, instead of one that grows with the depth.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, Tensor]]
# Kinds of one step: per level, with and without gradients, in training and eval mode, in reduced precision, for a batch
# of one, and the first step, whose input needs no gradient.
_KINDS_PER_LEVEL = 32


def compile_step(function: Step, levels: int, backend: str = "inductor") -> Step:
    """A compiled form of ``level.step_forward`` or ``level.step_inverse``, for any batch size.

    Args:
        function: takes channel-major x [C, B, H, W] first.
        levels: of the flow; raises Dynamo's limit of compilations per function where it needs more.
        backend: see ``torch.compile``.

    Returns:
        The same function. A graph break is an error (``fullgraph``), raised by its first call, as is a missing compiler
        (RuntimeError that says what to do). Beyond Dynamo's limit of compilations it goes on uncompiled, with a
        warning.
    """
    limit = _KINDS_PER_LEVEL * levels
    config, exceptions = torch._dynamo.config, torch._dynamo.exc
    limit_hit = getattr(exceptions, "FailOnRecompileLimitHit", None) or exceptions.FailOnCacheLimitHit  # torch < 2.7
    config.cache_size_limit = max(config.cache_size_limit, limit)
    config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, 4 * limit)
    # Dynamo counts per code object: a copy for each flow, or all flows of a process would share one limit.
    plain = function
    function = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    # The subnets ask for channels_last themselves; the compiler's own choice can't cope with a batch of unknown size.
    options = {"layout_optimization": False} if backend == "inductor" else None
    # The batch is dynamic by its mark below. Other sizes are those of a level: code for any number of channels was more
    # than Inductor could make of an affine coupling's gradient.
    fast = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)
    given_up = False

    def run(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        torch._dynamo.maybe_mark_dynamic(x, 1)  # a short last batch needs no code of its own
        nonlocal given_up
        if given_up:
            return plain(x, *rest)
        try:
            return fast(x, *rest)
        except limit_hit:
            given_up = True
            warnings.warn(
                f"more than {limit} kinds of calls of one flow: its steps go on uncompiled in this direction",
                stacklevel=2,
            )
            return plain(x, *rest)
        except Exception as error:
            if "compiler" not in str(error).lower() or "InvalidCxx" not in f"{type(error).__name__}{error}":
                raise
            raise RuntimeError(
                "the flow could not be compiled, because no C++ compiler was found: install one (for example the "
                "package g++) or name it in the environment variable CXX, or run without compile"
            ) from error

    return run
