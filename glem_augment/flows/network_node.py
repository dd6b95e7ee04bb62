"""A convolutional network in training on a CPU as one node of autograd's graph: fewer passes over memory.

The gradients are those of the modules. ELU overwrites what the convolution before it has made, its derivative the
gradient from the convolution after it, to which in the same pass is added what came past the block. It is for ELU and
float32; all else is the modules' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.flows import elu_native
from glem_augment.flows.frozen import Parts, is_bare
from glem_augment.flows.ordinary import are_ordinary, gradients_of, is_ordinary


class _Plan(NamedTuple):
    """What of a network is not a tensor."""

    convolutions: tuple[tuple, ...]  # of every layer: stride, padding, dilation, groups
    blocks: tuple[tuple[bool, ...], ...]  # of every layer of a block: whether the activation stands before it


class _Layers:
    """The convolutions, by index, with their weights."""

    def __init__(self, plan: _Plan, weights: Sequence[Tensor | None]) -> None:
        self.plan, self.weights = plan, weights

    def __call__(self, index: int, x: Tensor) -> Tensor:
        return _ordered(F.conv2d(x, *self.weights[2 * index : 2 * index + 2], *self.plan.convolutions[index]))

    def backward(self, index: int, g: Tensor, x: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, as far as they are needed."""
        weight, bias = self.weights[2 * index : 2 * index + 2]
        stride, padding, dilation, groups = self.plan.convolutions[index]
        sizes = None if bias is None else [len(bias)]
        g_x, *rest = torch.ops.aten.convolution_backward(
            g, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, list(needed)
        )
        return (None if g_x is None else _ordered(g_x), *rest)


def _ordered(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _plain(x: Tensor, *weights_and_plan: Any) -> tuple[Tensor]:
    """The network by torch's operations."""
    *weights, plan = weights_and_plan
    layer, index = _Layers(plan, weights), 1
    h = layer(0, x)
    for block in plan.blocks:
        u = h
        for before in block:
            u = layer(index, F.elu(u) if before else u)
            index += 1
        h = h + u
    return (layer(index, F.elu(h)),)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, x: Tensor, *weights: Tensor | None) -> Tensor:
        layer, saved = _Layers(plan, weights), [x]
        h = layer(0, x)
        for block in plan.blocks:
            u = h
            for before in block:
                if before:
                    u = elu_native.elu(u, owned=u is not h)
                saved.append(u)
                u = layer(len(saved) - 1, u)
            h = u.add_(h)
        saved.append(elu_native.elu(h, owned=True))
        ctx.plan = plan
        ctx.save_for_backward(*saved, *weights)
        return layer(len(saved) - 1, saved[-1])

    @staticmethod
    def backward(ctx, g: Tensor):
        plan, count = ctx.plan, len(ctx.plan.convolutions)
        saved, weights, needed = ctx.saved_tensors[:count], ctx.saved_tensors[count:], ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not is_ordinary(g):
            # These gradients are to be differentiated in turn, or come in batches.
            return (None, *gradients_of(_plain, (saved[0], *weights), (plan,), needed, (g,)))
        layer, found = _Layers(plan, weights), [None] * (2 * count)

        def through(index: int, g: Tensor) -> Tensor | None:
            own = slice(2 * index, 2 * index + 2)
            mask = (index > 0 or needed[0], *needed[1:][own])
            g, *found[own] = layer.backward(index, g, saved[index], mask)
            return g

        index = count - 1
        g = elu_native.elu_backward(through(index, g), saved[index])
        for block in reversed(plan.blocks):
            stream = g
            for position in reversed(range(len(block))):
                index -= 1
                g = through(index, g)
                if block[position]:
                    g = elu_native.elu_backward(g, saved[index], None if position else stream)
                elif not position:
                    g.add_(stream)
        return (None, through(0, g), *found)


def run_as_node(x: Tensor, parts: Callable[[], Parts | None]) -> Tensor | None:
    """The network's result, to be differentiated; or None where it is to be had from the modules.

    Args:
        x: [B, C, H, W] in channels_last format.
        parts: makes those of the network; None if it is another than they could tell.
    """
    if not (
        torch.is_grad_enabled()
        and is_ordinary(x)
        and x.numel()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and elu_native.has_kernel()
    ):
        return None
    network = parts()
    if network is None or network.act.name != "elu":
        return None
    layers = network.layers()
    if not all(map(is_bare, layers)):
        return None
    weights = [layer._parameters[name] for layer in layers for name in ("weight", "bias")]
    tensors = [x, *(p for p in weights if p is not None)]
    if not (are_ordinary(tensors) and any(t.requires_grad for t in tensors)):
        return None
    plan = _Plan(
        tuple((layer.stride, layer.padding, layer.dilation, layer.groups) for layer in layers),
        tuple(tuple(before for before, _ in block) for block in network.blocks),
    )
    return _Network.apply(plan, x, *weights)
