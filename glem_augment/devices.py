"""Copies between devices that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def move(value: Tensor, device: torch.device | str) -> Tensor:
    """`value` on `device`; from the CPU to CUDA through pinned memory, so that the host does not wait."""
    device = torch.device(device)
    if value.device.type == "cpu" and device.type == "cuda" and value.numel():
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
