"""Settings of a flow that make its training faster or smaller without changing what it learns."""

from __future__ import annotations

import torch
from torch import nn

from glem_augment.flows import MultiscaleFlow
from glem_augment.training.config import TrainConfig


def set_for_training(flow: nn.Module, config: TrainConfig) -> None:
    """Apply ``precision``, ``memory`` and ``compile`` to the flow that is trained; the identity flow has none of them.

    Call it after the average was made from the flow, so that the average keeps the ordinary path.
    """
    if not isinstance(flow, MultiscaleFlow):
        return
    flow.set_autocast(torch.bfloat16 if config.precision == "bf16" else None)
    flow.set_memory(config.memory)
    if config.compile:
        flow.compile_steps()


def set_for_use(flow: nn.Module) -> None:
    """Float32, and activations kept. A compiled flow stays compiled: its results are the same."""
    if isinstance(flow, MultiscaleFlow):
        flow.set_autocast(None)
        flow.set_memory("stored")
