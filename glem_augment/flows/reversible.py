"""Training a level without storing its activations: they are rebuilt from its output through the exact inverse.

Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for the idea; a flow needs no special blocks for
it. The coupling's network is evaluated once in the backward pass, on the half that passes unchanged, and serves both to
undo the coupling and to differentiate it, so a step costs one forward pass of its network more than ordinarily. Affine
levels that ordinarily are one node do all this by the same kernels, see ``level_node``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glem_augment.flows.coupling import Coupling, MatExpCoupling
from glem_augment.flows.expm_coupling import expm_coupling_backward
from glem_augment.flows.precision import full_precision

if TYPE_CHECKING:
    from glem_augment.flows.level import Level
    from glem_augment.flows.prepared import Prepared


class _ReversibleSteps(torch.autograd.Function):
    """The steps of a level on x [C, B, H, W]; saves only the result. Its parameters are inputs, to get gradients."""

    @staticmethod
    def forward(ctx: Any, level: Level, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        y, shared, logdets = level.run_steps(x)
        # Not the weights: saving them would be as good, but only what grows with the batch is worth counting.
        ctx.level = level
        ctx.versions = _versions(weights)
        ctx.save_for_backward(y)
        return y, torch.stack(logdets).sum(0) + shared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_logdet: Tensor):
        level: Level = ctx.level
        weights = list(level.step_parameters())
        if _versions(weights) != ctx.versions:
            raise RuntimeError("a weight of the flow was changed between the forward and the backward pass")
        (y,) = ctx.saved_tensors
        grads: dict[Tensor, Tensor] = {}
        with full_precision(y.device.type), torch.enable_grad():
            made = level.gradients_from_result(y, g, g_logdet, ctx.needs_input_grad[1])
            if made is not None:
                g_x, found = made
                _add(grads, *zip(*found, strict=True))
                return None, g_x, *(grads.get(w) for w in weights)
            ahead, back = level.prepare(inverse=False), level.prepare(inverse=True)
            leaves = _leaves(ahead)
            for index in reversed(range(len(level.couplings))):
                y, g = _coupling_backward(level.couplings[index], y, g, g_logdet, grads)
                y, g = _mixing_backward(level, back, leaves, index, y, g)
            _prepared_backward(ahead, leaves, g_logdet.sum(), weights, grads)
        return None, g, *(grads.get(w) for w in weights)


def _versions(weights: Sequence[Tensor]) -> list[int]:
    return [0 if w.is_inference() else w._version for w in weights]


def _add(grads: dict[Tensor, Tensor], weights: list[Tensor], found: Sequence[Tensor | None]) -> None:
    for weight, grad in zip(weights, found, strict=True):
        if grad is not None:
            grads[weight] = grad if weight not in grads else grads[weight] + grad


def _coupling_backward(
    coupling: Coupling, y: Tensor, g: Tensor, g_logdet: Tensor, grads: dict[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """From the coupling's output and its gradient to its input and that one's gradient."""
    y1, y2 = y.split(coupling.half)
    x1 = y1.detach().requires_grad_()
    params = coupling.net(x1.transpose(0, 1))
    weights = [w for w in coupling.parameters() if w.requires_grad]
    g1, g2 = g.split(coupling.half)
    if isinstance(coupling, MatExpCoupling) and not coupling.low_rank:
        x2, g_x2, g_params = expm_coupling_backward(y2, params, g2, g_logdet, coupling.bound)
        g_x1, *found = torch.autograd.grad(params, [x1, *weights], g_params, allow_unused=True)
    else:
        with torch.no_grad():
            x2 = coupling.transform(y2, params, inverse=True)[0]
        leaf = x2.detach().requires_grad_()
        out = coupling.transform(leaf, params)
        g_x1, g_x2, *found = torch.autograd.grad(out, [x1, leaf, *weights], [g2, g_logdet], allow_unused=True)
    _add(grads, weights, found)
    return torch.cat([y1, x2]), torch.cat([g1 + g_x1, g_x2])


def _leaves(prepared: Prepared) -> dict[str, list[Tensor]]:
    """Per step, detached copies of what the step uses, to collect gradients on."""
    names = ("shift", "matrix") if prepared.scale is None else ("scale", "shift", "matrix")
    return {name: [t.detach().requires_grad_(t.requires_grad) for t in getattr(prepared, name)] for name in names}


def _mixing_backward(
    level: Level, back: Prepared, leaves: dict[str, list[Tensor]], index: int, y: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for the ActNorm and mixing of step ``index``; gradients of what they use go to ``leaves``."""
    from glem_augment.flows.level import mix, unmix

    scale = None if back.scale is None else back.scale[index].detach()
    with torch.no_grad():
        x = unmix(y, scale, back.shift[index].detach(), back.matrix[index].detach())
    x.requires_grad_()
    ahead = [values[index] for values in leaves.values()]
    out = mix(x, *([None] if len(ahead) == 2 else []), *ahead)
    wanted = [t for t in ahead if t.requires_grad]
    found = torch.autograd.grad(out, [x, *wanted], g)
    for leaf, grad in zip(wanted, found[1:], strict=True):
        leaf.grad = grad
    return x.detach(), found[0]


def _prepared_backward(
    prepared: Prepared,
    leaves: dict[str, list[Tensor]],
    g_shared: Tensor,
    weights: list[Tensor],
    grads: dict[Tensor, Tensor],
) -> None:
    """Through the exponentials that every step of the level shares, once."""
    outputs = [prepared.logdet] if prepared.logdet.requires_grad else []
    upstream = [g_shared] * len(outputs)
    for name, values in leaves.items():
        for tensor, leaf in zip(getattr(prepared, name), values, strict=True):
            if leaf.grad is not None:
                outputs.append(tensor)
                upstream.append(leaf.grad)
    if outputs:
        wanted = [w for w in weights if w.requires_grad]
        _add(grads, wanted, torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))


def reversible_steps(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """As the steps of ``level``, with activation memory that does not grow with their number.

    Args:
        level: its steps are run.
        x: [C, B, H, W], channel-major, after the squeeze.

    Returns:
        [C, B, H, W] and log|det| [B]. Can be differentiated once; gradients equal the ordinary ones up to the
        rounding of the rebuilt activations.
    """
    return _ReversibleSteps.apply(level, x, *level.step_parameters())
