"""Frozen convolutional networks on a CPU: the same numbers in fewer passes over memory.

Encoding and decoding run networks whose weights no longer change. ``FrozenRun`` keeps a second copy of these, in the
blocks in which oneDNN reads them (``nn.Conv2d`` puts them in order in every call), adds a block's input in the same
pass as the convolution before it, and has ELU in one pass or three. It is for float32 results on a CPU: gradients,
compilation, autocast, other devices and dtypes are the modules' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glem_augment.flows.activations import LOG2_E, fast_elu_in_bits
from glem_augment.flows.layers import frozen_state
from glem_augment.flows.network_parts import Parts
from glem_augment.flows.ordinary import is_ordinary
from glem_augment.flows.processor import mkl_is_fast


class _Packed(NamedTuple):
    """A convolution, its weight in oneDNN's blocks."""

    weight: Tensor
    bias: Tensor | None
    geometry: tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """``out``, to which the convolution of ``x`` has been added."""
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, self.weight, self.bias, *self.geometry, "add", 1, None, [], None
        )


def _pack(layer: nn.Module, shape: list[int], weight: float, bias: float) -> _Packed:
    """``layer`` for images [B, C, H, W] of about ``shape``, its weight and bias times these."""
    geometry = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        layer.weight * weight, *geometry, [shape[0], layer.in_channels, *shape[2:]]
    )
    return _Packed(packed, None if layer.bias is None else layer.bias * bias, geometry)


class _Steps(NamedTuple):
    """``Parts``, packed."""

    network: Parts  # that they were made from,
    state: tuple  # and what its weights were
    act: Callable[..., Tensor]  # of features, and whether these may be overwritten
    head: _Packed
    blocks: list[list[tuple[bool, _Packed]]]
    tail: _Packed


class FrozenRun:
    """Runs a network whose weights are frozen, where that is the faster way.

    With ELU all features are kept in bits, i.e. multiplied by log2(e), where exp2 is the faster function: the head
    brings them there, the tail takes them back, and in between nothing changes but the biases.
    """

    def __init__(self) -> None:
        self._steps: _Steps | None = None

    def __getstate__(self) -> dict:
        return {"_steps": None}  # weights in blocks can be neither copied nor stored

    def is_used(self) -> bool:
        """Whether it has run."""
        return self._steps is not None

    def __call__(self, x: Tensor, parts: Callable[[], Parts | None]) -> Tensor | None:
        """The network's result, or None where it is to be had from the modules.

        Args:
            x: [B, C, H, W] in channels_last format.
            parts: gives those of the network: others where one has been exchanged, None where they can't be told.
        """
        if not may_run_frozen(x):
            if self._steps is not None and _is_trained(self._steps.network):
                self._steps = None  # an optimizer may write to the weights and leave no trace
            return None
        network = parts()
        if network is None:
            return None
        if _is_trained(network):
            self._steps = None
            return None
        state = frozen_state(*(p for p in network.weights if p is not None))
        if state is None:
            return None
        steps = self._steps  # another thread may put new ones in their place at any time
        if steps is None or steps.network is not network or steps.state != state:
            # Tensors made under inference_mode could be of no use outside.
            with torch.inference_mode(False), torch.no_grad():
                self._steps = steps = _take_apart(network, state, list(x.shape))
        h = steps.head(x)
        for block in steps.blocks:
            u = h
            for before, layer in block[:-1]:
                # The features of the stream are used again, and nothing else is.
                u = layer(steps.act(u, owned=u is not h) if before else u)
            before, layer = block[-1]
            h = layer.add_to(h, steps.act(u, owned=u is not h) if before else u)
        return steps.tail(steps.act(h, owned=True))


def _is_trained(network: Parts) -> bool:
    return any(p is not None and p.requires_grad for p in network.weights)


def _take_apart(network: Parts, state: tuple, shape: list[int]) -> _Steps:
    in_bits = network.act.name == "elu" and not mkl_is_fast()
    unit = LOG2_E if in_bits else 1.0
    return _Steps(
        network,
        state,
        fast_elu_in_bits if in_bits else network.act,
        _pack(network.head, shape, unit, unit),
        [[(before, _pack(layer, shape, 1.0, unit)) for before, layer in block] for block in network.blocks],
        _pack(network.tail, shape, 1 / unit, 1.0),
    )


def may_run_frozen(x: Tensor) -> bool:
    """Whether a network whose weights are frozen may run on ``x`` in this way."""
    return _is_plain(x) and _is_supported()


def _is_plain(x: Tensor) -> bool:
    """Whether nothing is asked of ``x`` but a result in float32 on a CPU."""
    return (
        is_ordinary(x)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    )


@cache
def _is_supported() -> bool:
    """Whether this torch has oneDNN's operations, which are no public ones, in the form used here."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(False), torch.no_grad():
        # Not nn.Conv2d's own weights, which are drawn: a resumed training would draw others than an undisturbed one.
        layer = nn.utils.skip_init(nn.Conv2d, 2, 2, 3, padding=1)
        for p in layer.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        x = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
        try:
            packed = _pack(layer, list(x.shape), 1.0, 1.0)
            plain, added = packed(x), packed.add_to(x.clone(), x)
        except (AttributeError, RuntimeError, TypeError):
            return False
        expected = layer(x)
        return torch.allclose(plain, expected, atol=1e-5) and torch.allclose(added, x + expected, atol=1e-5)
