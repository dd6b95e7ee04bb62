"""The parts of a convolutional network, for code that runs it in the place of its modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from glem_augment.flows.activations import Activation


class Plan(NamedTuple):
    """What of a network is not a tensor."""

    convolutions: tuple[tuple, ...]  # of every layer: stride, padding, dilation, groups
    blocks: tuple[tuple[bool, ...], ...]  # of every layer of a block: whether the activation stands before it


_settings = operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode")


class Parts:
    """A network ``tail(act(...))`` of head, blocks ``x + layers(x)``, activation and tail.

    Attributes:
        act, head, blocks, tail: see ``take_apart``.
        weights: weight and bias of every layer, in their order; a bias may be None.
        in_question: the weights whose kind tells that of all: where all are parameters, the first, since convolutions
            take no others beside it.
        plan: all else of them.
    """

    def __init__(self, act: Activation, head: nn.Conv2d, blocks: list[list[tuple[bool, nn.Conv2d]]], tail: nn.Conv2d):
        self.act, self.head, self.blocks, self.tail = act, head, blocks, tail
        self._layers = layers = [head, *(layer for block in blocks for _, layer in block), tail]
        self.weights: list[Tensor | None] = [layer._parameters[name] for layer in layers for name in ("weight", "bias")]
        there = [p for p in self.weights if p is not None]
        self.in_question = there[:1] if all(type(p) is nn.Parameter for p in there) else there
        self._settings = list(map(_settings, layers))
        self.plan = Plan(
            tuple(settings[:4] for settings in self._settings),
            tuple(tuple(before for before, _ in block) for block in blocks),
        )

    def are_set_as_they_were(self) -> bool:
        """Whether all layers still do what ``plan`` says."""
        return list(map(_settings, self._layers)) == self._settings


def take_apart(
    act: Activation, head: nn.Module, blocks: list[list[tuple[bool, nn.Module]]], tail: nn.Module
) -> Parts | None:
    """The parts of a network; None if a layer is no convolution, or more: with weights computed from others.

    Args:
        act: of all blocks, and before the tail.
        head, tail: layers.
        blocks: of every layer whether the activation stands before it, and the layer.
    """
    known = all(
        type(layer) is nn.Conv2d and {"weight", "bias"} <= set(layer._parameters) and layer.padding_mode == "zeros"
        for layer in (head, *(layer for block in blocks for _, layer in block), tail)
    )
    return Parts(act, head, blocks, tail) if known else None  # type: ignore[arg-type]


class _Found(NamedTuple):
    parts: Parts | None
    inside: list[nn.Module]  # all modules in the network
    tables: list[dict]  # of their modules and parameters,
    entries: list  # and what was in these

    def holds(self) -> bool:
        now = list(chain.from_iterable(map(dict.values, self.tables)))
        return (
            len(now) == len(self.entries)
            and all(map(operator.is_, now, self.entries))
            and (self.parts is None or self.parts.are_set_as_they_were())
        )


class KnownParts:
    """The parts of a network, as long as nobody wants to know of the calls of its modules.

    Every pass asks for them. They are taken apart again only where a module or a weight has been exchanged.
    """

    def __init__(self) -> None:
        self._found: _Found | None = None

    def __getstate__(self) -> dict:
        return {"_found": None}  # a copy has modules of its own

    def of(self, network: nn.Module, find: Callable[[], Parts | None]) -> Parts | None:
        """None where it is to be had from the modules alone.

        Args:
            network: whose hooks are not looked at.
            find: makes its parts; None if it is none that could be taken apart.
        """
        found = self._found  # another thread may put a new one in its place at any time
        if found is None or not found.holds():
            modules = list(network.modules())
            tables = [table for module in modules for table in (module._modules, module._parameters)]
            entries = list(chain.from_iterable(map(dict.values, tables)))
            self._found = found = _Found(find(), modules[1:], tables, entries)
        return None if found.parts is None or have_hooks(found.inside) else found.parts


def have_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody wants to know of the calls of one of them, or of those of all modules."""
    return _has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )
