"""Where a model is wanted, its name will do."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from glem_augment.model import GLEM

__all__ = ["WeightsVersion", "as_model", "on_device", "weights_version"]


def as_model(model: GLEM | str | os.PathLike[str]) -> GLEM:
    """``model`` itself, or the one that ``GLEM.from_pretrained`` finds under that name: a folder, ``bundled:NAME``, or
    ``org/name[@revision]`` on the Hub.

    Raises:
        TypeError: neither. ModelFileError: see ``GLEM.from_pretrained``.
    """
    if isinstance(model, GLEM):
        return model
    if isinstance(model, str):
        return GLEM.from_pretrained(model)
    if isinstance(model, os.PathLike):
        return GLEM.from_pretrained(Path(model))
    raise TypeError(f"model must be a GLEM or the name of one, got {type(model).__name__}")


def on_device(model: GLEM, device: torch.device | str | None) -> GLEM:
    """``model`` where it is there already, or ``device`` is None; else a copy there."""
    if device is None:
        return model
    device = torch.device(device)
    if device == model.device or (device.type == "cpu" == model.device.type):
        return model
    if device == torch.device("cuda") and model.device == torch.device("cuda", torch.cuda.current_device()):
        return model
    return copy.deepcopy(model).to(device)


class WeightsVersion:
    """The state of weights and buffers at a moment, to be compared with a later one: equal as long as none of them was
    replaced, given another memory or type, or written to, within this process.

    A write through ``.data``, or by a fused optimizer, which torch does not count, goes unseen. Nothing is kept alive.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensors: Iterable[Tensor], *others: object) -> None:
        states = [(t, (t.dtype, 0 if t.is_inference() else t._version), t.data_ptr()) for t in tensors]
        self._states = [state for _, state, _ in states]
        self._addresses = [address for _, _, address in states]
        self._tensors = [weakref.ref(t) for t, _, _ in states]
        self._others = [weakref.ref(thing) for thing in others]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightsVersion):
            return NotImplemented
        if self._states != other._states or len(self._others) != len(other._others):
            return False
        both = (self._tensors + self._others, other._tensors + other._others)
        objects = [(a(), b()) for a, b in zip(*both, strict=True)]
        if any(a is not b or a is None for a, b in objects):
            return False
        moved = [t for (t, _), a, b in zip(objects, self._addresses, other._addresses, strict=False) if a != b]
        # On its way to another process a tensor goes into shared memory, unchanged.
        return all(isinstance(t, Tensor) and t.device.type == "cpu" and t.is_shared() for t in moved)


def weights_version(*modules: nn.Module, others: Iterable[object] = ()) -> WeightsVersion:
    """The present state of the modules' weights and buffers, and which ``others`` there are."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return WeightsVersion(tensors, *others)
