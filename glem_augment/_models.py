"""Where a model is wanted, its name will do."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import nn

from glem_augment.model import GLEM

__all__ = ["as_model", "on_device", "weights_version"]


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


def weights_version(*modules: nn.Module) -> int:
    """A number that is another one after any weight or buffer was replaced or written to, within this process.

    Not after a write through ``.data``, nor by a fused optimizer, which torch does not count.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return hash(tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors))
