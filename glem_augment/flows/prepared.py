"""What the ActNorms and mixings of a level amount to: made once per pass, since no image has a part in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glem_augment.flows import fold_native
from glem_augment.flows.generators import exp_of_generators
from glem_augment.flows.ordinary import are_ordinary, gradients_of


class Prepared(NamedTuple):
    """``u = x * scale + shift`` per element, then ``y = matrix u``; the lists hold one entry per step.

    For the inverse the other way round: ``u = matrix y``, ``x = u * scale + shift``. With ActNorm per channel, scale
    and shift are folded into the matrix and a bias and ``scale`` is None.
    """

    scale: tuple[Tensor, ...] | None  # [C,1,H,W]
    shift: tuple[Tensor, ...]  # [C,1,H,W], or [C,1] where folded
    matrix: tuple[Tensor, ...]  # [C,C]
    logdet: Tensor  # of the direction, nats, the same for every image


class Weights(NamedTuple):
    """Of the steps of a level, one entry per step."""

    biases: Sequence[Tensor]  # of the ActNorms
    log_scales: Sequence[Tensor]
    generators: Sequence[Tensor]  # of the mixings, [C,C]

    def all(self) -> list[Tensor]:
        return [*self.biases, *self.log_scales, *self.generators]


class _Folded(torch.autograd.Function):
    """By the kernel; weights: biases, then log_scales, then generators."""

    @staticmethod
    def forward(ctx, pixels: tuple[int, int], *weights: Tensor) -> tuple[Tensor, ...]:
        matrices, shifts, logdet = fold_native.fold(*_thirds(weights), pixels)
        ctx.save_for_backward(*weights)
        ctx.made = (pixels, matrices)
        return (*matrices, *shifts, logdet)

    @staticmethod
    def backward(ctx, *g: Tensor):
        weights, (pixels, matrices) = ctx.saved_tensors, ctx.made
        if torch.is_grad_enabled() or not are_ordinary(g):
            # These gradients are to be differentiated in turn, or come in batches.
            return (None, *gradients_of(_plain_folded, weights, (pixels,), ctx.needs_input_grad[1:], g))
        steps, g = len(weights) // 3, [t.contiguous() for t in g]  # kept: the kernel is handed addresses
        each = [t.data_ptr() for t in g]
        upstream = each[:steps], each[steps:-1], g[-1]
        return (None, *fold_native.fold_backward(*upstream, *_thirds(weights), matrices, pixels))


def _plain_folded(*weights_and_pixels: Any) -> tuple[Tensor, ...]:
    *weights, pixels = weights_and_pixels
    made = plain_prepared(Weights(*_thirds(weights)), pixels, per_channel=True, inverse=False)
    return (*made.matrix, *made.shift, made.logdet)


def _thirds(values: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    n = len(values) // 3
    return [values[:n], values[n : 2 * n], values[2 * n :]]


def prepare(weights: Weights, pixels: tuple[int, int], per_channel: bool, inverse: bool) -> Prepared:
    """Differentiable.

    Args:
        weights: of the level.
        pixels: how many an entry of a log_scale stands for, and how many the level's images have.
        per_channel: whether the ActNorms are.
        inverse: which direction.
    """
    if per_channel and not inverse and fold_native.serves(*weights):
        steps = len(weights.biases)
        *made, constant = _Folded.apply(pixels, *weights.all())
        return Prepared(None, tuple(made[steps:]), tuple(made[:steps]), constant)
    return plain_prepared(weights, pixels, per_channel, inverse)


def plain_prepared(weights: Weights, pixels: tuple[int, int], per_channel: bool, inverse: bool) -> Prepared:
    """``prepare`` by torch's operations."""
    norm_pixels, level_pixels = pixels
    bias, log_scale, generators = map(torch.stack, weights)
    bias, log_scale = bias.unsqueeze(2), log_scale.unsqueeze(2)
    constant = log_scale.sum() * norm_pixels + generators.diagonal(dim1=1, dim2=2).sum() * level_pixels
    sign = -1.0 if inverse else 1.0
    matrix = exp_of_generators(generators, sign)
    scale = (sign * log_scale).exp()
    shift = -bias if inverse else bias * scale
    if not per_channel:
        return Prepared(tuple(scale), tuple(shift), tuple(matrix), sign * constant)
    scale, shift = scale.flatten(2), shift.flatten(2)
    if inverse:
        return Prepared(None, tuple(shift), tuple(scale * matrix), -constant)
    return Prepared(None, tuple(matrix @ shift), tuple(matrix * scale.transpose(1, 2)), constant)
