"""Copies between devices, eval mode for a while, and whether a model has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


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
    """A value that changes when a parameter or buffer of the modules is replaced or written to, in this process.

    It tells whether a copy of the modules, for example on another device, is still up to date. Writes that torch does
    not count go unseen: through `.data`, by a fused optimizer, or to tensors made under `inference_mode`.
    """
    tensors = (t for module in modules for t in chain(module.parameters(), module.buffers()))
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)
