"""True float32 inside a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

# Torch's switches are global. Threads that are in `full_precision` at the same time share one change of them.
_lock = threading.Lock()
_inside = 0
_undo: list[Callable[[], None]] = []
_EXACT = ("ieee", "none")


def _newer_switches() -> list[Any]:
    """The switches of torch 2.9 and later, which kernels follow."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return []
    has: Any = torch.backends  # its types lack the new attributes
    return [has.cuda.matmul, has.cudnn.conv, has.cudnn.rnn, has.mkldnn.matmul, has.mkldnn.conv]


def _make_exact() -> None:
    """Make float32 exact, and note how to undo it."""
    newer = [(switch, switch.fp32_precision) for switch in _newer_switches()]
    # The settings before torch 2.9 combine several newer ones, and can't be read where these differ.
    with suppress(RuntimeError):
        matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        if matmul != "highest":
            torch.set_float32_matmul_precision("highest")
            _undo.append(partial(torch.set_float32_matmul_precision, matmul))
        if tf32:
            torch.backends.cudnn.allow_tf32 = False
            _undo.append(partial(setattr, torch.backends.cudnn, "allow_tf32", True))
    for switch, _ in newer:
        if switch.fp32_precision not in _EXACT:
            switch.fp32_precision = "ieee"
    # Put back last, because an older setting overwrites several newer ones.
    _undo.extend(partial(_restore, *entry) for entry in newer)


def _restore(switch: Any, value: str) -> None:
    if switch.fp32_precision != value:
        switch.fp32_precision = value


@torch.compiler.disable
def _enter() -> None:
    global _inside
    with _lock:
        if not _inside:
            _make_exact()
        _inside += 1


@torch.compiler.disable
def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        while _undo and not _inside:
            _undo.pop(0)()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Run the block in true float32: neither TF32 nor autocast, whatever the caller's settings.

    TF32 and bf16 break the inverse. 24 orthogonal layers there and back lose 4e-6 in float32, 9e-3 in TF32 and 8e-2 in
    bf16. One uint8 step is 4e-3. Subnets may opt into less, see `flows.subnets.Subnet`.
    """
    _enter()
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        _leave()
