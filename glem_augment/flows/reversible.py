"""Training a level without storing its activations: they are rebuilt from its output through the exact inverse.

Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for the idea; a flow needs no special blocks for
it. The coupling's network is evaluated once in the backward pass, on the half that passes unchanged, and serves both to
undo the coupling and to differentiate it. So a step costs one forward pass of its network more than ordinarily.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glem_augment.flows.coupling import Coupling
from glem_augment.flows.level import Level, Mixing, squeeze
from glem_augment.flows.precision import full_precision

_CHANGED = "a weight of the flow was changed between the forward and the backward pass"


def reversible_level(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """`level(x)` with activation memory that does not grow with the number of its steps.

    Returns:
        The level's output and log|det| [B]. They can be differentiated once; gradients equal the ordinary ones up to
        the rounding of the rebuilt activations.
    """
    return _ReversibleSteps.apply(level, squeeze(x, level.side), *level.parameters())


class _ReversibleSteps(torch.autograd.Function):
    """The steps of a level. Saves only the result. The weights are inputs so that autograd asks for their gradients."""

    @staticmethod
    def forward(ctx: Any, level: Level, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        mixings, shared = level.mixings(inverse=False)
        y, logdet = level.run_steps(x, mixings)
        ctx.level, ctx.versions = level, _versions(weights)
        ctx.save_for_backward(y)
        return y, logdet + shared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_logdet: Tensor) -> tuple[Tensor | None, ...]:
        level: Level = ctx.level
        if _versions(level.parameters()) != ctx.versions:
            raise RuntimeError(_CHANGED)
        (y,) = ctx.saved_tensors
        grads: dict[Tensor, Tensor | None] = {}
        with full_precision(y.device.type):
            undo, _ = level.mixings(inverse=True)
            with torch.enable_grad():
                mixings, shared = level.mixings(inverse=False)
            # The exponentials behind the mixings are differentiated once, after all steps.
            outputs, upstream = [shared], [g_logdet.sum()]
            for index in reversed(range(len(mixings))):
                y, g, found = _coupling_backward(level.couplings[index], y, g, g_logdet)
                grads.update(zip(level.couplings[index].parameters(), found, strict=True))
                y, g, found = _mixing_backward(mixings[index], undo[index], y, g)
                for tensor, grad in zip(mixings[index], found, strict=True):
                    if grad is not None:
                        outputs.append(tensor)
                        upstream.append(grad)
            if shared.requires_grad:
                rest = level.mixing_weights()
                grads.update(zip(rest, _gradients(outputs, upstream, rest), strict=True))
        return None, g, *(grads.get(w) for w in level.parameters())


def reversible_couplings(couplings: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for couplings with nothing between them: their result and log|det| [B]."""
    return _ReversibleCouplings.apply(couplings, x, *couplings.parameters())


class _ReversibleCouplings(torch.autograd.Function):
    """See `_ReversibleSteps`."""

    @staticmethod
    def forward(ctx: Any, couplings: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for coupling in couplings:
            x, change = coupling.couple(x)
            logdet = logdet + change
        ctx.couplings, ctx.versions = couplings, _versions(weights)
        ctx.save_for_backward(x)
        return x, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_logdet: Tensor) -> tuple[Tensor | None, ...]:
        if _versions(ctx.couplings.parameters()) != ctx.versions:
            raise RuntimeError(_CHANGED)
        (y,) = ctx.saved_tensors
        found: list[Tensor | None] = []
        with full_precision(y.device.type):
            for coupling in reversed(ctx.couplings):
                y, g, grads = _coupling_backward(coupling, y, g, g_logdet)
                found = [*grads, *found]
        return None, g, *found


def _versions(weights: Any) -> list[int]:
    return [0 if w.is_inference() else w._version for w in weights]


def _gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
    """Gradients of some outputs, one per input; None for an input that needs none."""
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def _coupling_backward(
    coupling: Coupling, y: Tensor, g: Tensor, g_logdet: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """From a coupling's output and its gradient to its input, the gradient of this, and those of its weights."""
    y1, y2 = coupling.split(y)
    g1, g2 = coupling.split(g)
    with torch.enable_grad():
        x1 = y1.detach().requires_grad_()
        params = coupling.params(x1)
        with torch.no_grad():
            x2, _ = coupling.transform(y2, params, inverse=True)
        x2.requires_grad_()
        inputs = [x1, x2, *coupling.parameters()]
        g_x1, g_x2, *found = _gradients(coupling.transform(x2, params), [g2, g_logdet], inputs)
    return coupling.merge(y1, x2.detach()), coupling.merge(g1 + g_x1, g_x2), found


def _mixing_backward(mixing: Mixing, undo: Mixing, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The same for ActNorm and 1x1 mixing; `undo` is the mixing made for the inverse."""
    x = undo.inverse(y).requires_grad_()
    with torch.enable_grad():
        used = Mixing._make(t.detach().requires_grad_(t.requires_grad) for t in mixing)
        g_x, *found = _gradients([used.forward(x)], [g], [x, *used])
    return x.detach(), g_x, found
