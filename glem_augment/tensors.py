"""Tensors on devices: copies, temporary modes of modules, a key of a model's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. It is pinned on the way to a GPU, so that the host does not wait for the GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def usable(device: torch.device | str) -> torch.device:
    """A device on which tensors can be made, with the number that "cuda" stands for. ValueError: it can't be used."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        if reason.startswith("Expected one of"):
            reason = "there is no such device"
        raise ValueError(f"device {str(device)!r} can't be used here ({reason}): give cpu, cuda or cuda:N") from None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the `with` block; afterwards each sub-module has its earlier mode.

    The flags are set one by one: `train()` would also change sub-modules that the user keeps in eval mode.
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
    """A value that changes when a parameter or buffer of the modules is replaced or written to, in this process.

    Equal keys mean that a copy of the modules is up to date. Writes that torch does not count are missed: through
    `.data`, by a fused optimizer, or to tensors made under `inference_mode`.
    """
    tensors = (t for module in modules for t in chain(module.parameters(), module.buffers()))
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """The modules with frozen parameters inside the `with` block."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
