"""Copies between devices, and whether a model has changed."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def move(value: Tensor, device: torch.device | str) -> Tensor:
    """`value` on `device`; from the CPU to CUDA through pinned memory, so that the host does not wait."""
    device = torch.device(device)
    if value.device.type == "cpu" and device.type == "cuda" and value.numel():
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def check_worker_device(device: torch.device) -> None:
    """Raise a RuntimeError in a forked process that was given a model on CUDA, which it cannot use."""
    if device.type == "cuda" and not torch.cuda.is_initialized():
        raise RuntimeError(
            f"the flow is on {device}, which a forked DataLoader worker cannot use: move it first with "
            "model.to('cpu'), or use num_workers=0, or multiprocessing_context='spawn'"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; afterwards each sub-module is in the mode that it was in.

    The flags are set one by one: `train()` would wake sub-modules that the user keeps in eval mode.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weights_key(*modules: nn.Module) -> tuple[tuple[int, int], ...]:
    """A value that changes when a parameter or buffer of the modules is replaced, moved or written to.

    It tells whether a copy of the modules, for example on another device, is still up to date. Writes that torch does
    not count go unseen: through `.data`, by a fused optimizer, or to tensors made under `inference_mode`.
    """
    tensors = (t for module in modules for t in chain(module.parameters(), module.buffers()))
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


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
