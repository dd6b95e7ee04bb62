"""What lies between the networks of two affine steps, as one operation where there is a kernel for it."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows import affine_joint_native
from glem_augment.flows.affine_coupling import plain_coupling
from glem_augment.flows.ordinary import are_ordinary, gradients_of

Joined = tuple[Tensor, Tensor | None, Tensor | None]


def plain_joint(
    x: Tensor, params: Tensor | None, matrix: Tensor | None, shift: Tensor | None, bound: float, inverse: bool
) -> Joined:
    """By torch's operations."""
    logdet = images = None
    if params is not None:
        x1, x2 = x.chunk(2)
        y2, logdet = plain_coupling(x2, params, bound, inverse)
        x = torch.cat([x1, y2])
    if matrix is not None:
        x = torch.addmm(shift, matrix, x.flatten(1)).view(x.shape)
        images = x.chunk(2)[0].transpose(0, 1)
    return x, images, logdet


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        params: Tensor | None,
        matrix: Tensor | None,
        shift: Tensor | None,
        bound: float,
        inverse: bool,
    ) -> Joined:
        ctx.save_for_backward(x, params, matrix, shift)
        ctx.plan = (bound, inverse)
        return affine_joint_native.joint(x, params, matrix, shift, bound, inverse)

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        needed, tensors = ctx.needs_input_grad[:4], ctx.saved_tensors
        if torch.is_grad_enabled() or not are_ordinary([g for g in upstream if g is not None]):
            # These gradients are to be differentiated in turn, or come in batches.
            found = gradients_of(plain_joint, tensors, ctx.plan, needed, upstream)
        else:
            found = affine_joint_native.joint_backward(upstream, needed, *tensors, *ctx.plan)
        return (*found, None, None)


def joint(
    x: Tensor,
    params: Tensor | None,
    matrix: Tensor | None,
    shift: Tensor | None,
    bound: float,
    inverse: bool = False,
) -> Joined:
    """The affine coupling of a step, then the matrix and shift that are the next step's ActNorm per channel and mixing.

    For the inverse those are the same step's.

    Args:
        x: [2n, B, H, W] channel-major; its first half passes the coupling unchanged.
        params: [B, 2n, H, W], see ``affine_coupling``; None: before the first network, no coupling.
        matrix, shift: [2n, 2n] and [2n, 1]; None: after the last network, no mixing.
        bound: of the coupling, if there is one.
        inverse: of the coupling; the matrix is applied as it is.

    Returns:
        [2n, B, H, W]; its first half once more, as images [B, n, H, W] for the next network (None without a matrix);
        the coupling's log|det| [B] in nats (None without one).
    """
    tensors = [t for t in (x, params, matrix, shift) if t is not None]
    if not (are_ordinary(tensors) and affine_joint_native.has_kernel(len(x) // 2)):
        return plain_joint(x, params, matrix, shift, bound, inverse)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Joint.apply(x, params, matrix, shift, bound, inverse)
    return affine_joint_native.joint(x, params, matrix, shift, bound, inverse)
