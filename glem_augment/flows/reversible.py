"""Training a level without storing its activations: they are rebuilt from its output through the exact inverse.

Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for the idea; a flow needs no special blocks for
it. The coupling's network is evaluated once in the backward pass, on the half that passes unchanged, and serves both to
undo the coupling and to differentiate it. So a step costs one forward pass of its network more than ordinarily.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glem_augment.flows.coupling import Coupling
from glem_augment.flows.level import Level, Mixing, squeeze
from glem_augment.flows.precision import full_precision


def reversible_level(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """`level(x)` with activation memory that does not grow with the number of its steps.

    Returns:
        The level's output and log|det| [B]. They can be differentiated once; gradients equal the ordinary ones up to
        the rounding of the rebuilt activations.
    """
    mixings, shared = level.mixings(inverse=False)
    tensors = [t for mixing in mixings for t in mixing]
    weights = [w for coupling in level.couplings for w in coupling.parameters()]
    y, logdet = _ReversibleSteps.apply(level, squeeze(x, level.side), len(tensors), *tensors, *weights)
    return y, logdet + shared


class _ReversibleSteps(torch.autograd.Function):
    """The steps of a level. Saves only the result; what the steps use are inputs, so that they get gradients."""

    @staticmethod
    def forward(ctx: Any, level: Level, x: Tensor, count: int, *used: Tensor) -> tuple[Tensor, Tensor]:
        mixings = [Mixing(*used[i : i + 3]) for i in range(0, count, 3)]
        ctx.level, ctx.mixings = level, mixings
        ctx.versions = _versions(level.parameters())
        y, logdet = level.run_steps(x, mixings)
        ctx.save_for_backward(y)
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_logdet: Tensor) -> tuple[Tensor | None, ...]:
        level: Level = ctx.level
        if _versions(level.parameters()) != ctx.versions:
            raise RuntimeError("a weight of the flow was changed between the forward and the backward pass")
        (y,) = ctx.saved_tensors
        of_mixings: list[Tensor | None] = []
        of_weights: list[Tensor | None] = []
        with full_precision(y.device.type):
            with torch.no_grad():
                undo, _ = level.mixings(inverse=True)
            for index in reversed(range(len(undo))):
                y, g, found = _coupling_backward(level.couplings[index], y, g, g_logdet)
                of_weights = [*found, *of_weights]
                y, g, found = _mixing_backward(ctx.mixings[index], undo[index], y, g)
                of_mixings = [*found, *of_mixings]
        return None, g, None, *of_mixings, *of_weights


def _versions(weights: Any) -> list[int]:
    return [0 if w.is_inference() else w._version for w in weights]


def _gradients(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of some outputs, one per input; None for an input that is None or needs none."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _coupling_backward(
    coupling: Coupling, y: Tensor, g: Tensor, g_logdet: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """From a coupling's output and its gradient to its input, the gradient of this, and those of its weights."""
    y1, y2 = y.split(coupling.half)
    g1, g2 = g.split(coupling.half)
    with torch.enable_grad():
        x1 = y1.detach().requires_grad_()
        params = coupling.net(x1.transpose(0, 1))
        with torch.no_grad():
            x2, _ = coupling.transform(y2, params, inverse=True)
        x2.requires_grad_()
        inputs = [x1, x2, *coupling.parameters()]
        g_x1, g_x2, *found = _gradients(coupling.transform(x2, params), [g2, g_logdet], inputs)
    return torch.cat([y1, x2.detach()]), torch.cat([g1 + g_x1, g_x2]), found


def _mixing_backward(mixing: Mixing, undo: Mixing, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The same for ActNorm and 1x1 mixing; `undo` is the mixing made for the inverse."""
    x = undo.inverse(y).requires_grad_()
    with torch.enable_grad():
        used = Mixing(*(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in mixing))
        g_x, *found = _gradients([used.forward(x)], [g], [x, *used])
    return x.detach(), g_x, found
