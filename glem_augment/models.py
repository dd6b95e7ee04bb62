"""Where a model is wanted, its name will do."""

from __future__ import annotations

import copy
import os
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from glem_augment.model.glem import GLEM

__all__ = ["WeightsVersion", "as_model", "fingerprint", "on_device"]


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
    """The state of the weights and buffers of modules at a moment, to be compared with a later one: equal as long as
    none of them was replaced, given another memory or type, or written to, within this process.

    A write through ``.data``, or by a fused optimizer, which torch does not count, goes unseen. Nothing is kept alive.

    Args:
        modules: whose weights and buffers. others: objects that must be the same ones.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *modules: nn.Module, others: Iterable[object] = ()) -> None:
        tensors = _tensors_of(modules)
        self._types, self._versions = [t.dtype for t in tensors], _versions_of(tensors)
        self._addresses = [t.data_ptr() for t in tensors]
        self._objects = [weakref.ref(thing) for thing in (*tensors, *others)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightsVersion):
            return NotImplemented
        states = (self._types, self._versions, len(self._objects))
        if states != (other._types, other._versions, len(other._objects)):
            return False
        objects = [reference() for reference in self._objects]
        if any(a is None or a is not b() for a, b in zip(objects, other._objects, strict=True)):
            return False
        # On its way to another process a tensor goes into shared memory, unchanged.
        addresses = zip(objects, self._addresses, other._addresses, strict=False)  # others, at the end, have none
        return all(a == b or (t.device.type == "cpu" and t.is_shared()) for t, a, b in addresses)


def fingerprint(module: nn.Module) -> int:
    """A number, 0 or more, by which another process tells whether its module has the same weights and buffers: a
    checksum of up to 4,096 entries of each, spread evenly. Not proof against somebody who means to deceive, as
    `hub.weights_sha256` is, which reads all of them."""
    found = 0
    for t in _tensors_of([module]):
        flat = t.detach().flatten()
        part = flat[:: max(1, len(flat) // 4096)].cpu().contiguous()
        found = zlib.crc32(part.view(torch.uint8).numpy(), found)
    return found


def _versions_of(tensors: Iterable[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # those made under inference_mode have none
        return [0 if t.is_inference() else t._version for t in tensors]


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights and buffers, always in the same order: as torch's own walks, which also make names, in a fifth of their
    time. Every block of images asks for them."""
    found, waiting, seen = [], list(modules), set()
    for module in waiting:  # which grows
        if module is None or module in seen:
            continue
        seen.add(module)
        # Most have none of one kind or the other.
        for kind in (module._parameters, module._buffers):
            if kind:
                found += kind.values()
        if module._modules:
            waiting += module._modules.values()
    return [t for t in found if t is not None]
