"""The steps of an affine level in training on a CPU as one node of autograd's graph.

Where networks are small, what lies between them is mostly the way there: autograd's nodes, and the modules' calls. The
numbers are those of ``prepared``, ``affine_joint`` and ``network_node``, whose kernels are what runs here. Reversible
training takes the gradients from here, too, with states that are rebuilt rather than kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glem_augment.flows import affine_joint_native, fold_native, network_node
from glem_augment.flows.affine_joint import plain_joint
from glem_augment.flows.affine_level import (
    Trail,
    Visited,
    addresses,
    gradients_of_steps,
    kept_on_the_way,
    rebuilt,
    run_steps,
)
from glem_augment.flows.layout import rows, squeeze
from glem_augment.flows.network_parts import Parts, Plan
from glem_augment.flows.ordinary import are_ordinary, gradients_of
from glem_augment.flows.prepared import Prepared, Weights, plain_prepared


class _Plan(NamedTuple):
    """What of a level is not a tensor."""

    side: int  # of the squeeze
    pixels: tuple[int, int]  # see ``prepare``
    bounds: Sequence[float]  # of the couplings
    networks: Sequence[Plan]
    in_rows: bool  # see ``Level.forward``

    def sorted(self, weights: Sequence[Any]) -> tuple[Weights, list[Sequence[Any]]]:
        """Those of ActNorms and mixings, then those of every network."""
        steps = len(self.bounds)
        networks, end = [], 3 * steps
        for plan in self.networks:
            begin, end = end, end + 2 * len(plan.convolutions)
            networks.append(weights[begin:end])
        return Weights(*(weights[k * steps : (k + 1) * steps] for k in range(3))), networks


def _plain(x: Tensor, *weights_and_plan: Any) -> tuple[Tensor, Tensor]:
    """The steps by torch's operations."""
    *weights, plan = weights_and_plan
    shared, networks = plan.sorted(weights)
    prepared = plain_prepared(shared, plan.pixels, per_channel=True, inverse=False)
    mixings = [*zip(prepared.matrix, prepared.shift, strict=True), (None, None)]
    u, images, _ = plain_joint(squeeze(x, plan.side), None, *mixings[0], 1.0, False)
    total = prepared.logdet.expand(x.shape[1])
    for bound, network, own, mixing in zip(plan.bounds, plan.networks, networks, mixings[1:], strict=True):
        (params,) = network_node.plain(images, *own, network)
        u, images, logdet = plain_joint(u, params, *mixing, bound, False)
        total = total + logdet
    return rows(u) if plan.in_rows else u, total


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, x: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
        shared, networks = plan.sorted(weights)
        matrices, shifts, logdet = fold_native.fold(*shared, plan.pixels, x.shape[1:2])
        saved: list[Tensor] = []

        def run(network: Plan, own: Sequence[Tensor | None], images: Tensor) -> Tensor:
            params, inputs = network_node.forward(network, images, own)
            saved.extend(inputs)
            return params

        runs = [partial(run, *each) for each in zip(plan.networks, networks, strict=True)]
        mixings = list(zip(addresses(matrices), addresses(shifts), strict=True))
        y, trail = run_steps(x, plan.side, mixings, plan.bounds, runs, logdet, kept=True)
        ctx.plan = plan
        ctx.save_for_backward(x, *weights, matrices, trail.states, *trail.params, *saved)
        return rows(y) if plan.in_rows else y, logdet

    @staticmethod
    def backward(ctx, g: Tensor, g_logdet: Tensor):
        plan, needed, saved = ctx.plan, ctx.needs_input_grad[1:], list(ctx.saved_tensors)
        count, steps = len(needed), len(plan.bounds)
        x, *weights = saved[:count]
        if torch.is_grad_enabled() or not are_ordinary((g, g_logdet)):
            # These gradients are to be differentiated in turn, or come in batches.
            return (None, *gradients_of(_plain, (x, *weights), (plan,), needed, (g, g_logdet)))
        matrices, states = saved[count : count + 2]
        if plan.in_rows:
            _, channels, batch, height, width = states.shape
            g = g.reshape(batch, channels, height, width).transpose(0, 1)
        trail = Trail(states, saved[count + 2 : count + 2 + steps])
        # The networks' part is used up from its end.
        del saved[: count + 2 + steps]
        network_node.let_go(ctx)

        def inputs(network: Plan) -> list[Tensor]:
            return [saved.pop() for _ in network.convolutions][::-1]

        visited = kept_on_the_way(affine_joint_native.in_rows(x), plan.side, trail)
        return (None, *_gradients(plan, weights, needed, matrices, visited, inputs, g, g_logdet))


def _gradients(
    plan: _Plan,
    weights: Sequence[Tensor | None],
    needed: Sequence[bool],
    matrices: Tensor,
    visited: Visited,
    inputs: Callable[[Plan], list[Tensor]],
    g: Tensor,
    g_logdet: Tensor,
) -> list[Tensor | None]:
    """Of x and the weights, as far as they are ``needed``.

    Args:
        matrices: that the ActNorms and mixings were folded into.
        visited: see there.
        inputs: those of a network's convolutions; asked for once for each, after ``visited`` for its step.
        g, g_logdet: gradients of the results.
    """
    shared, networks = plan.sorted(weights)
    found: list[list[Tensor | None]] = []

    def run(
        network: Plan, own: Sequence[Tensor | None], wants: Sequence[bool], g_params: Tensor, sums: Tensor
    ) -> Tensor:
        g_images, *g_own = network_node.backward(network, inputs(network), own, (True, *wants), g_params, sums)
        found.append(g_own)
        assert g_images is not None
        return g_images

    wanted = plan.sorted(needed[1:])[1]
    runs = [partial(run, *each) for each in zip(plan.networks, networks, wanted, strict=True)]
    made = gradients_of_steps(visited, addresses(matrices), plan.bounds, runs, g, g_logdet, plan.side, needed[0])
    upstream = made.matrices, made.shifts, g_logdet.contiguous()
    each = fold_native.fold_backward(*upstream, *shared, matrices, plan.pixels)
    return [made.x, *each, *(own for g_own in reversed(found) for own in g_own)]


def gradients_from_result(
    y: Tensor,
    back: Callable[[], Prepared],
    weights: Weights,
    pixels: tuple[int, int],
    bounds: Sequence[float],
    networks: Sequence[Parts],
    needs_x: bool,
    g: Tensor,
    g_logdet: Tensor,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor | None]]] | None:
    """Gradients of the steps without a squeeze, of which nothing was kept but the result; or None where they are to be
    had otherwise.

    Args:
        y, g, g_logdet: the result [C, B, H, W], and gradients of it and of log|det| [B].
        back: gives what ``prepare`` makes for the other direction.
        weights, pixels, bounds, networks: see ``run_as_node``.
        needs_x: whether what the steps were given needs a gradient.

    Returns:
        That gradient, and every weight with its own.
    """
    if not (_serves(y, len(y), weights, networks) and are_ordinary((g, g_logdet))):
        return None
    plan = _Plan(1, pixels, bounds, [network.plan for network in networks], False)
    everything = [*weights.all(), *(w for network in networks for w in network.weights)]
    y, inputs = affine_joint_native.in_rows(y), []

    def run(network: Parts, images: Tensor) -> Tensor:
        params, inputs[:] = network_node.forward(network.plan, images, network.weights)
        return params

    with torch.no_grad():
        matrices, _, _ = fold_native.fold(*weights, pixels)
        undoing = back()
        mixings = [[t.contiguous() for t in each] for each in zip(undoing.matrix, undoing.shift, strict=True)]
        places = [(matrix.data_ptr(), shift.data_ptr()) for matrix, shift in mixings]
        visited = rebuilt(y, places, bounds, [partial(run, network) for network in networks])
        needed = [needs_x, *(w is not None and w.requires_grad for w in everything)]
        g_x, *each = _gradients(plan, everything, needed, matrices, visited, lambda _: inputs, g, g_logdet)
    return g_x, [(w, g_w) for w, g_w in zip(everything, each, strict=True) if w is not None]


def _serves(x: Tensor, channels: int, weights: Weights, networks: Sequence[Parts]) -> bool:
    """Whether the kernels may stand for torch's operations here."""
    return (
        affine_joint_native.has_kernel(channels // 2)
        and fold_native.serves(*weights)
        and are_ordinary([x, *(w for network in networks for w in network.in_question)])
    )


def run_as_node(
    x: Tensor,
    side: int,
    weights: Weights,
    pixels: tuple[int, int],
    bounds: Sequence[float],
    networks: Sequence[Parts],
    in_rows: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The squeeze and the steps of a level, to be differentiated; or None where they are to be had otherwise.

    Args:
        x: [C / side^2, B, side H, side W], for which ``network_node.may_run`` holds.
        side: of the squeeze.
        weights, pixels: of the ActNorms, which are per channel, and mixings: see ``prepare``.
        bounds, networks: of the couplings.
        in_rows: see ``Level.forward``.

    Returns:
        [C, B, H, W], or in rows, and log|det| [B] in nats.
    """
    shared, own = weights.all(), [w for network in networks for w in network.weights]
    if not (any(w.requires_grad for w in shared) and _serves(x, len(x) * side**2, weights, networks)):
        return None
    plan = _Plan(side, pixels, bounds, [network.plan for network in networks], in_rows)
    return _Steps.apply(plan, x, *shared, *own)
