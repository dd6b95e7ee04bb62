"""The steps of an affine level by the kernel of ``affine_joint_native``, without a graph: there, back, and gradients.

What the kernel makes lies in memory that is had at once, and a squeeze is where it reads from or writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glem_augment.flows.affine_joint_native import Joints, in_rows, planes, planes_at
from glem_augment.flows.ordinary import is_known

# Of a coupling: from images [B, n, H, W] to its parameters [B, 2n, H, W].
Network = Callable[[Tensor], Tensor]
# From the gradient of its parameters, and the sums of that by channel, [2n], to the gradient of its images.
NetworkBackward = Callable[[Tensor, Tensor], Tensor]


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
        params = networks[index](seen)
        if params.shape != (batch, channels, height, width) or not is_known(params):
            raise ValueError(
                f"a network makes float32 [{batch}, {channels}, {height}, {width}] of such images, "
                f"not {params.dtype} {list(params.shape)}"
            )
        params = params.contiguous(memory_format=torch.channels_last)
        own, sums = params.data_ptr(), logdet.data_ptr()
        if kept:
            found.append(params)
    matrix, shift = between[-1] or (None, None)
    joints.forward(source, last, own, matrix, shift, None, sums, bounds[-1], inverse)
    return y, Trail(states, found)


class Gradients(NamedTuple):
    """Of x, and, as addresses in a memory of their own, of every step's matrix and shift."""

    x: Tensor | None
    matrices: list[int]
    shifts: list[int]
    memory: Tensor


def gradients_of_steps(
    x: Tensor,
    side: int,
    matrices: Sequence[int],
    bounds: Sequence[float],
    networks: Sequence[NetworkBackward],
    trail: Trail,
    g: Tensor,
    g_logdet: Tensor,
    needs_x: bool,
) -> Gradients:
    """From the gradients of what ``run_steps`` made to those of what it was made from.

    Args:
        x, side, bounds: as they were there; ``matrices`` without the shifts.
        networks: of every coupling. The gradient that they are handed is overwritten later; the sums are theirs.
        trail: that it left.
        g, g_logdet: of y and of the log-determinants.
        needs_x: whether x needs one.
    """
    steps, (channels, batch, height, width) = len(networks), g.shape
    x, g, g_logdet = in_rows(x), in_rows(g), g_logdet.contiguous()
    joints = Joints(channels, batch, height, width)
    # One memory for what needs no name of its own: a gradient between two networks, sums, and what is found.
    state, mixing = channels * batch * height * width, channels * (channels + 1)
    memory = x.new_empty(state + joints.parts() + steps * mixing)
    first, number = memory.data_ptr(), memory.element_size()
    parts = first + number * state
    g_matrices = [parts + number * (joints.parts() + mixing * index) for index in range(steps)]
    g_shifts = [address + number * channels**2 for address in g_matrices]
    g_params = x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    # After the last coupling there is no mixing.
    following = [*zip(matrices, g_matrices, g_shifts, strict=True), (None,) * 3][1:]
    source, target, seen = planes(g), planes_at(first, batch, height, width), None
    states, logdets = addresses(trail.states), g_logdet.data_ptr()
    for index in reversed(range(steps)):
        (matrix, *found), params = following[index], trail.params[index].data_ptr()
        there = planes_at(states[index], batch, height, width)
        g_bias = x.new_empty(channels)
        given = (params, matrix, seen, logdets, g_params.data_ptr(), g_bias.data_ptr())
        joints.backward(there, source, target, *given, *found, parts, bounds[index], False)
        source, g_images = target, networks[index](g_params, g_bias)
        seen = g_images.data_ptr()
    g_x = x.new_empty(batch, *(x.shape[k] for k in (0, 2, 3))).transpose(0, 1) if needs_x else None
    place = None if g_x is None else planes(g_x, side)
    found = (g_matrices[0], g_shifts[0], parts)
    joints.backward(planes(x, side), source, place, None, matrices[0], seen, None, None, None, *found, 1.0, False)
    return Gradients(g_x, g_matrices, g_shifts, memory)
