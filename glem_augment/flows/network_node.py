"""A convolutional network in training on a CPU as one node of autograd's graph: fewer passes over memory.

The gradients are those of the modules. ELU overwrites what the convolution before it has made, its derivative the
gradient from the convolution after it, to which in the same pass is added what came past the block, and which is summed
there for the bias. Where a kernel is the faster way to the gradient of a weight, it is taken. All this is for ELU and
float32; all else is the modules' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.flows import conv_weight_native, elu_native
from glem_augment.flows.network_parts import Parts, Plan
from glem_augment.flows.ordinary import are_ordinary, gradients_of, is_ordinary

_convolution_backward = torch.ops.aten.convolution_backward.default


def _in_turn(plan: Plan, weights: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """The convolutions: each call is the next one's."""
    layers = zip(weights[::2], weights[1::2], plan.convolutions, strict=True)

    def layer(x: Tensor) -> Tensor:
        weight, bias, geometry = next(layers)
        return _ordered(F.conv2d(x, weight, bias, *geometry))

    return layer


def _ordered(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def plain(x: Tensor, *weights_and_plan: Any) -> tuple[Tensor]:
    """The network by torch's operations."""
    *weights, plan = weights_and_plan
    layer = _in_turn(plan, weights)
    h = layer(x)
    for block in plan.blocks:
        u = h
        for before in block:
            u = layer(F.elu(u) if before else u)
        h = h + u
    return (layer(F.elu(h)),)


def forward(plan: Plan, x: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """The network's result, and what ``backward`` wants of the way there: the input of every convolution."""
    layer, saved = _in_turn(plan, weights), [x]
    h = layer(x)
    for block in plan.blocks:
        u = h
        for before in block:
            if before:
                u = elu_native.elu(u, owned=u is not h)
            saved.append(u)
            u = layer(u)
        h = u.add_(h)
    saved.append(elu_native.elu(h, owned=True))
    return layer(saved[-1]), saved


def backward(
    plan: Plan,
    saved: list[Tensor],
    weights: Sequence[Tensor | None],
    needed: Sequence[bool],
    g: Tensor,
    sums: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of x and the weights, as far as they are ``needed``, from that of the result.

    Args:
        saved: see ``forward``; emptied from its end, so that the memory serves again.
        sums: of g by channel, the gradient of the last bias, if they are known already.
    """
    found: list[Tensor | None] = [None] * len(weights)

    def through(g: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last convolution of which the input is left; that comes back, too. sums: of g, if they are known."""
        x, index = saved.pop(), len(saved)
        at = 2 * index
        weight, bias = weights[at], weights[at + 1]
        stride, padding, dilation, groups = plan.convolutions[index]
        if bias is not None and needed[at + 2]:
            # oneDNN's own, which would come with the convolution's, takes four times as long.
            found[at + 1] = g.sum((0, 2, 3)) if sums is None else sums
        ours = needed[at + 1] and conv_weight_native.serves(x, weight, plan.convolutions[index])
        g_x, g_weight, _ = _convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, (0, 0), groups,
            (index > 0 or needed[0], needed[at + 1] and not ours, False),
        )  # fmt: skip
        found[at] = conv_weight_native.conv_weight_gradient(g, x, weight) if ours else g_weight
        return (None if g_x is None else _ordered(g_x)), x

    with_sums = any(needed[2::2])
    g, x = through(_ordered(g), sums)
    g, sums = elu_native.elu_backward(g, x, None, with_sums)
    for block in reversed(plan.blocks):
        stream = g
        for position in reversed(range(len(block))):
            g, x = through(g, sums)
            sums = None
            if block[position]:
                g, sums = elu_native.elu_backward(g, x, None if position else stream, with_sums)
            elif not position:
                g.add_(stream)
    return [through(g, sums)[0], *found]


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, x: Tensor, *weights: Tensor | None) -> Tensor:
        y, saved = forward(plan, x, weights)
        ctx.plan = plan
        ctx.save_for_backward(*saved, *weights)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        plan, needed, saved = ctx.plan, ctx.needs_input_grad[1:], list(ctx.saved_tensors)
        weights = saved[len(plan.convolutions) :]
        del saved[len(plan.convolutions) :]
        if torch.is_grad_enabled() or not is_ordinary(g):
            # These gradients are to be differentiated in turn, or come in batches.
            return (None, *gradients_of(plain, (saved[0], *weights), (plan,), needed, (g,)))
        let_go(ctx)
        return (None, *backward(plan, saved, weights, needed, g))


def let_go(ctx: Any) -> None:
    """Of what a node has saved, unless the graph is retained: memory then serves again before the node is done."""
    if hasattr(ctx, "maybe_clear_saved_tensors"):  # not in older versions
        ctx.maybe_clear_saved_tensors()


def serves(network: Parts) -> bool:
    """Whether a network is of those that this module runs."""
    return network.act.name == "elu"


def may_run(x: Tensor) -> bool:
    """Whether networks may run here where they are to be differentiated: on an ``x`` like this, as things stand."""
    return (
        torch.is_grad_enabled()
        and is_ordinary(x)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and elu_native.has_kernel()
    )


def run_as_node(x: Tensor, parts: Callable[[], Parts | None]) -> Tensor | None:
    """The network's result, to be differentiated; or None where it is to be had from the modules.

    Args:
        x: [B, C, H, W] in channels_last format.
        parts: gives those of the network; None where it is to be had from the modules.
    """
    network = parts() if may_run(x) else None
    if network is None or not serves(network):
        return None
    if not are_ordinary((x, *network.in_question)):
        return None
    if not (x.requires_grad or any(p is not None and p.requires_grad for p in network.weights)):
        return None
    return _Network.apply(network.plan, x, *network.weights)
