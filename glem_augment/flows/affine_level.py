"""The steps of an affine level by the kernel of ``affine_joint_native``, without a graph: there, back, and gradients.

What the kernel makes lies in memory that is had at once, and a squeeze is where it reads from or writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glem_augment.flows.affine_joint_native import Joints, Planes, in_rows, planes, planes_at
from glem_augment.flows.ordinary import is_known

# Of a coupling: from images [B, n, H, W] to its parameters [B, 2n, H, W].
Network = Callable[[Tensor], Tensor]
# From the gradient of its parameters, and the sums of that by channel, [2n], to the gradient of its images.
NetworkBackward = Callable[[Tensor, Tensor], Tensor]


def _parameters(params: Tensor, shape: Sequence[int]) -> Tensor:
    """What a network has made for planes [C, B, H, W] of such a shape, as the kernel takes it."""
    channels, batch, height, width = shape
    if params.shape != (batch, channels, height, width) or not is_known(params):
        raise ValueError(
            f"a network makes float32 [{batch}, {channels}, {height}, {width}] of such images, "
            f"not {params.dtype} {list(params.shape)}"
        )
    return params.contiguous(memory_format=torch.channels_last)


class Trail(NamedTuple):
    """What the gradients are made from."""

    states: Tensor  # [S, C, B, H, W], what goes into every coupling
    params: list[Tensor]  # of every coupling


def addresses(entries: Tensor) -> list[int]:
    """Of the entries of a contiguous tensor, which must be kept."""
    first, step = entries.data_ptr(), entries.stride(0) * entries.element_size()
    return [first + step * index for index in range(len(entries))]


def run_steps(
    x: Tensor,
    side: int,
    mixings: Sequence[tuple[int, int]],
    bounds: Sequence[float],
    networks: Sequence[Network],
    logdet: Tensor,
    inverse: bool = False,
    kept: bool = False,
) -> tuple[Tensor, Trail]:
    """All steps of a level, after a squeeze or, for the inverse, before its undoing.

    Args:
        x: [C / side^2, B, side H, side W]; for the inverse [C, B, H, W].
        side: of the squeeze; 1 for none.
        mixings: of every step, the addresses of contiguous matrix [C, C] and shift [C, 1]: see ``Prepared``.
        bounds, networks: of every coupling.
        logdet: [B], contiguous, to which those of the couplings are added.
        inverse: from the last step back to the first.
        kept: with a trail; else what is returned as one is of no use.

    Returns:
        What the other direction takes.

    Raises:
        ValueError: a network whose result is not float32 [B, C, H, W].
    """
    steps, x = len(networks), in_rows(x)
    if inverse:
        channels, batch, height, width = x.shape
        between = [None, *reversed(mixings)]
        networks, bounds = networks[::-1], bounds[::-1]
        there, back = 1, side
    else:
        channels, batch, height, width = len(x) * side**2, x.shape[1], x.shape[2] // side, x.shape[3] // side
        between = [*mixings, None]
        there, back = side, 1
    joints = Joints(channels, batch, height, width)
    images = x.new_empty(steps, batch, height, width, channels // 2).permute(0, 1, 4, 2, 3).unbind()
    y = x.new_empty(batch, channels // back**2, back * height, back * width).transpose(0, 1)
    source, last, found = planes(x, there), planes(y, back), []
    own = sums = None
    if kept or inverse:
        # Without a trail one place serves for all that lies between.
        states = x.new_empty(steps if kept else 1, channels, batch, height, width)
        places = [planes(state) for state in states.unbind()]
    else:
        states, places = y, [last]
    for index, mixing in enumerate(between[:-1]):
        matrix, shift = mixing or (None, None)
        # Where nothing is mixed, nothing is changed.
        target = None if mixing is None else places[index if kept else 0]
        seen = images[index]
        joints.forward(source, target, own, matrix, shift, seen.data_ptr(), sums, bounds[index - 1], inverse)
        source = target or source
        params = _parameters(networks[index](seen), joints.shape)
        own, sums = params.data_ptr(), logdet.data_ptr()
        if kept:
            found.append(params)
    matrix, shift = between[-1] or (None, None)
    joints.forward(source, last, own, matrix, shift, None, sums, bounds[-1], inverse)
    return y, Trail(states, found)


class Visited(NamedTuple):
    """What the steps were led through, for their gradients: of every step, from the last back to the first."""

    at: Callable[[int], tuple[Planes, int]]  # what went into its coupling, and the address of that one's parameters
    start: Callable[[], Planes]  # what the first step was given, after all others


def kept_on_the_way(x: Tensor, side: int, trail: Trail) -> Visited:
    """As ``run_steps`` left it in ``trail``; x, side: as they were there."""
    _, _, batch, height, width = trail.states.shape
    states = addresses(trail.states)
    return Visited(
        lambda index: (planes_at(states[index], batch, height, width), trail.params[index].data_ptr()),
        lambda: planes(x, side),
    )


def rebuilt(
    y: Tensor, mixings: Sequence[tuple[int, int]], bounds: Sequence[float], networks: Sequence[Network]
) -> Visited:
    """From the result of the steps, each by its exact inverse, in memory for one of them.

    Args:
        y: [C, B, H, W], as ``in_rows`` returned it.
        mixings: of every step, the addresses of contiguous matrix [C, C] and shift [C, 1] that undo its own.
        bounds, networks: of every coupling.
    """
    channels, batch, height, width = y.shape
    joints, state, logdets = Joints(*y.shape), y.new_empty(y.shape), y.new_zeros(batch)
    images = y.new_empty(batch, height, width, channels // 2).permute(0, 3, 1, 2)
    params = state  # named out here, since all that its user has of it is an address

    def at(index: int) -> tuple[Planes, int]:
        nonlocal params
        here, after_all = planes(state), index == len(networks) - 1
        source, mixing = (planes(y), (None, None)) if after_all else (here, mixings[index + 1])
        joints.forward(source, here, None, *mixing, images.data_ptr(), None, 1.0, False)
        params = _parameters(networks[index](images), y.shape)
        joints.forward(here, here, params.data_ptr(), None, None, None, logdets.data_ptr(), bounds[index], True)
        return here, params.data_ptr()

    def start() -> Planes:
        here = planes(state)
        joints.forward(here, here, None, *mixings[0], None, None, 1.0, False)
        return here

    return Visited(at, start)


class Gradients(NamedTuple):
    """Of x, and, as addresses in a memory of their own, of every step's matrix and shift."""

    x: Tensor | None
    matrices: list[int]
    shifts: list[int]
    memory: Tensor


def gradients_of_steps(
    visited: Visited,
    matrices: Sequence[int],
    bounds: Sequence[float],
    networks: Sequence[NetworkBackward],
    g: Tensor,
    g_logdet: Tensor,
    side: int,
    needs_x: bool,
) -> Gradients:
    """From the gradients of what ``run_steps`` made to those of what it was made from.

    Args:
        visited: see there.
        matrices, bounds: as they were for ``run_steps``, the former without the shifts.
        networks: of every coupling. The gradient that they are handed is overwritten later; the sums are theirs.
        g, g_logdet: of y and of the log-determinants.
        side: of the squeeze.
        needs_x: whether x needs one.
    """
    steps, (channels, batch, height, width) = len(networks), g.shape
    g, g_logdet = in_rows(g), g_logdet.contiguous()
    joints = Joints(channels, batch, height, width)
    # One memory for what needs no name of its own: a gradient between two networks, sums, and what is found.
    state, mixing = channels * batch * height * width, channels * (channels + 1)
    memory = g.new_empty(state + joints.parts() + steps * mixing)
    first, number = memory.data_ptr(), memory.element_size()
    parts = first + number * state
    g_matrices = [parts + number * (joints.parts() + mixing * index) for index in range(steps)]
    g_shifts = [address + number * channels**2 for address in g_matrices]
    g_params = g.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    # After the last coupling there is no mixing.
    following = [*zip(matrices, g_matrices, g_shifts, strict=True), (None,) * 3][1:]
    source, target, seen = planes(g), planes_at(first, batch, height, width), None
    logdets = g_logdet.data_ptr()
    for index in reversed(range(steps)):
        (matrix, *found), (there, params) = following[index], visited.at(index)
        g_bias = g.new_empty(channels)
        given = (params, matrix, seen, logdets, g_params.data_ptr(), g_bias.data_ptr())
        joints.backward(there, source, target, *given, *found, parts, bounds[index], False)
        source, g_images = target, networks[index](g_params, g_bias)
        seen = g_images.data_ptr()
    g_x = g.new_empty(batch, channels // side**2, side * height, side * width).transpose(0, 1) if needs_x else None
    place = None if g_x is None else planes(g_x, side)
    found = (g_matrices[0], g_shifts[0], parts)
    joints.backward(visited.start(), source, place, None, matrices[0], seen, None, None, None, *found, 1.0, False)
    return Gradients(g_x, g_matrices, g_shifts, memory)
