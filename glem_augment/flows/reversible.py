"""Training a level without storing its activations: they are rebuilt from its output through the exact inverse.

Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for the idea; a flow needs no special blocks for
it. The backward pass evaluates the coupling's network once, on the half that passes unchanged. The result serves to
undo the coupling and to differentiate it. So a step costs one more forward pass of its network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glem_augment.flows.coupling import Coupling
from glem_augment.flows.precision import full_precision


def reversible(steps: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`steps(x)` with activation memory that does not grow with their number.

    Args:
        steps: a `Level` or a `JetFlow`.
        x: the argument of `run_steps`.

    Returns:
        The result and log|det| [B]. They can be differentiated once; gradients equal the ordinary ones up to the
        rounding of the rebuilt activations.
    """
    return _ReversibleSteps.apply(steps, x, *steps.parameters())


class _ReversibleSteps(torch.autograd.Function):
    """Saves only the result. The weights are inputs so that autograd asks for their gradients."""

    @staticmethod
    def forward(ctx: Any, steps: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = steps.run_steps(x)
        ctx.steps, ctx.versions = steps, _versions(weights)
        ctx.save_for_backward(y)
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_logdet: Tensor) -> tuple[Tensor | None, ...]:
        steps = ctx.steps
        if _versions(steps.parameters()) != ctx.versions:
            raise RuntimeError("a weight of the flow was changed between the forward and the backward pass")
        (y,) = ctx.saved_tensors
        grads: dict[Tensor, Tensor | None] = {}
        with full_precision(y.device.type):
            undo, _ = steps.mixings(inverse=True)
            with torch.enable_grad():
                mixings, shared = steps.mixings(inverse=False)
            # The exponentials behind the mixings are differentiated once, after all steps.
            outputs, upstream = [shared], [g_logdet.sum()]
            for index, coupling in reversed(list(enumerate(steps.couplings))):
                y, g, found = _coupling_backward(coupling, y, g, g_logdet)
                grads.update(zip(coupling.parameters(), found, strict=True))
                if not mixings:
                    continue
                y, g, found = _mixing_backward(mixings[index], undo[index], y, g)
                for tensor, grad in zip(mixings[index], found, strict=True):
                    if grad is not None:
                        outputs.append(tensor)
                        upstream.append(grad)
            if shared.requires_grad:
                rest = steps.mixing_weights()
                grads.update(zip(rest, _gradients(outputs, upstream, rest), strict=True))
        return None, g, *(grads.get(w) for w in steps.parameters())


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
    """From a coupling's output and its gradient to the input, the input's gradient, and the weights' gradients."""
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


def _mixing_backward(mixing: Any, undo: Any, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The same for a `multiscale.Mixing`; `undo` is the mixing made for the inverse."""
    x = undo.inverse(y).requires_grad_()
    with torch.enable_grad():
        used = mixing._make(t.detach().requires_grad_(t.requires_grad) for t in mixing)
        g_x, *found = _gradients([used.forward(x)], [g], [x, *used])
    return x.detach(), g_x, found
