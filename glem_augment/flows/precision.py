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
_before: dict[str, Standing] = {}
_EXACT = ("ieee", "none")


def _forget() -> None:
    """In a forked process there are no other threads; the lock may have been held by one."""
    global _lock
    _lock = threading.Lock()
    _inside.clear()
    _before.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Old:
    """torch's older settings under the interface of those that came with 2.9: "ieee", "tf32", ... as there."""

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


_OLD = {name: _Old(name) for name in ("matmul", "conv")}


def _old_hold() -> bool:
    """Whether the older settings, which all of torch understands, are in force: the caller has set none of the newer
    ones by hand. Then the two are, or would be, at odds, and reading an older one is an error."""
    if {torch.backends.fp32_precision, torch.backends.cudnn.fp32_precision} != {"none"}:
        return False
    try:
        return all(switch.fp32_precision is not None for switch in _OLD.values())
    except RuntimeError:
        return False


def _switches(device_type: str) -> list[Any]:
    """Of matrix products and convolutions."""
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch >= 2.9
    if device_type == "cuda":
        return [torch.backends.cuda.matmul, torch.backends.cudnn.conv] if new and not _old_hold() else [*_OLD.values()]
    if not new:
        return [_OLD["matmul"]]
    # The older setting of products does not tell what oneDNN does, and there is none of its convolutions.
    return [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv] if device_type == "cpu" else []


# Switches and how they stand: "ieee" or "none" (the same), "tf32", "bf16", ...
Standing = list[tuple[Any, str]]


def standing(device_type: str) -> Standing:
    """How exact float32 is at this moment, for ``restore``."""
    return now([(switch, "") for switch in _switches(device_type)])


def now(switches: Standing) -> Standing:
    """How the same switches stand at this moment."""
    return [(switch, switch.fp32_precision) for switch, _ in switches]


def restore(switches: Standing) -> None:
    """Switches that stand so already are not touched."""
    for switch, value in switches:
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
            _before[device_type] = standing(device_type)
            restore([(switch, value if value in _EXACT else "ieee") for switch, value in _before[device_type]])
        _inside[device_type] = _inside.get(device_type, 0) + 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _inside[device_type] -= 1
            if not _inside[device_type]:
                restore(_before.pop(device_type))
