"""True float32 for the bijective path, whatever the caller has chosen for its own networks.

TF32 and bf16 break the inverse: 24 orthogonal layers there and back lose 4e-6 in float32, 9e-3 in TF32 and 8e-2 in
bf16, where one uint8 step is 4e-3. Subnets may opt into less inside, see ``subnets``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Torch's switches are the process's: threads that are inside at the same time share one change of them.
_lock = threading.Lock()
_inside: dict[str, int] = {}
_before: dict[str, list[str]] = {}
_EXACT = ("ieee", "none")


def _forget() -> None:
    """In a forked process there are no other threads; the lock may have been held by one."""
    global _lock
    _lock = threading.Lock()
    _inside.clear()
    _before.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Legacy:
    """torch before 2.9, under the interface of what came then; there "ieee" and "tf32" are all there is to tell."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def fp32_precision(self) -> str:
        if self._name == "conv":
            return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
        value = torch.get_float32_matmul_precision()
        return "ieee" if value == "highest" else value

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        if self._name == "conv":
            torch.backends.cudnn.allow_tf32 = value != "ieee"
        else:
            torch.set_float32_matmul_precision("highest" if value == "ieee" else value)


def _switches(device_type: str) -> list[Any]:
    """Of matrix products and convolutions. Since torch 2.9 the old ones raise an error where the new ones were set by
    hand, so the new ones are used, which never do."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return [_Legacy("matmul"), _Legacy("conv")] if device_type == "cuda" else [_Legacy("matmul")]
    if device_type == "cuda":
        return [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    return [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv] if device_type == "cpu" else []


def get_switches(device_type: str) -> list[str]:
    """How exact float32 is now, for ``set_switches``: "ieee" or "none" (the same), "tf32", "bf16", ..."""
    return [switch.fp32_precision for switch in _switches(device_type)]


def set_switches(device_type: str, values: list[str]) -> None:
    """What ``get_switches`` returned. Switches that stand so already are not touched."""
    for switch, value in zip(_switches(device_type), values, strict=True):
        if switch.fp32_precision != value:
            switch.fp32_precision = value


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Run what is inside in true float32: neither TF32 nor autocast, whatever the caller's settings.

    Args:
        device_type: "cpu", "cuda", ...
    """
    with _lock:
        if not _inside.get(device_type):
            _before[device_type] = get_switches(device_type)
            set_switches(device_type, [v if v in _EXACT else "ieee" for v in _before[device_type]])
        _inside[device_type] = _inside.get(device_type, 0) + 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _inside[device_type] -= 1
            if not _inside[device_type]:
                set_switches(device_type, _before.pop(device_type))
