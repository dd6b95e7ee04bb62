"""True float32 for the bijective path, whatever the caller has chosen for its own networks.

TF32 and bf16 break the inverse: 24 orthogonal layers there and back lose 4e-6 in float32, 9e-3 in TF32 and 8e-2 in
bf16, where one uint8 step is 4e-3. Subnets may opt into less inside, see ``subnets``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Torch's switches are the process's: all that is inside at the same time, in whatever thread and on whatever device,
# shares one change of them. What runs on a CPU alone, whose switches mostly stand as they should, needs none.
_lock = threading.Lock()
_inside = 0
_undo: list[Callable[[], None]] = []
_own = threading.local()  # depth: how often this thread is inside
_EXACT = ("ieee", "none")
_HAS_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_CPU = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv) if _HAS_NEW else ()


def _in_child() -> None:
    """In a forked process only the thread that forked goes on; the lock may have been held by another."""
    global _lock, _inside
    _lock = threading.Lock()
    _inside = getattr(_own, "depth", 0)
    if not _inside:
        _switch_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _switches() -> list[Any]:
    """Of matrix products and convolutions, as they came with torch 2.9: these are what kernels go by."""
    if not _HAS_NEW:
        return []
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv]


def _older() -> tuple[str, bool] | None:
    """The settings of matrix products and convolutions before 2.9, which all of torch still reads; None where the
    caller has set newer ones by hand: then the two are, or would be, at odds, and reading an older one is an error."""
    try:
        new = _switches()
        if new and {torch.backends.fp32_precision, torch.backends.cudnn.fp32_precision} != {"none"}:
            return None
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _switch() -> None:
    """Make float32 exact, and note how to undo it. Switches that are exact are not touched."""
    before = []
    for switch in _switches():
        value = switch.fp32_precision
        if value not in _EXACT:
            switch.fp32_precision = "none"
            inherited = switch.fp32_precision == value
            switch.fp32_precision = value
            before.append((switch, value, "none" if inherited else value))
        else:
            before.append((switch, value, value))
    older = _older()
    if older is not None:
        product, convolution = older
        if product != "highest":
            _undo.append(lambda: torch.set_float32_matmul_precision(product))
            torch.set_float32_matmul_precision("highest")
        if convolution:
            _undo.append(lambda: setattr(torch.backends.cudnn, "allow_tf32", True))
            torch.backends.cudnn.allow_tf32 = False
    for switch, _, _ in before:
        if switch.fp32_precision not in _EXACT:
            switch.fp32_precision = "ieee"
    # Put back last: an older setting stands for several newer ones, which may have stood otherwise.
    _undo.extend(_put_back(*entry) for entry in before)


def _put_back(switch: Any, value: str, own: str) -> Callable[[], None]:
    def undo() -> None:
        if switch.fp32_precision != value:
            switch.fp32_precision = own

    return undo


def _switch_back() -> None:
    while _undo:
        _undo.pop(0)()


def _stands_exact() -> bool:
    """Whether a CPU's float32 is as it is; the switches of other devices may stand as they like."""
    if not _HAS_NEW:
        return torch.get_float32_matmul_precision() == "highest"
    return all(switch.fp32_precision in _EXACT for switch in _CPU)


def _enter(times: int, on_cpu: bool = False) -> bool:
    """Whether this is to be left again: not where there was nothing to do, for code that runs ``on_cpu`` alone."""
    global _inside
    with _lock:
        if not _inside:
            if on_cpu and _stands_exact():
                return False
            _switch()
        _inside += times
    _own.depth = getattr(_own, "depth", 0) + times
    return True


def _leave(times: int) -> None:
    global _inside
    with _lock:
        _inside -= times
        if not _inside:
            _switch_back()
    _own.depth -= times


class full_precision:  # noqa: N801 - used like a function
    """Run what is inside in true float32: neither TF32 nor autocast, whatever the caller's settings.

    A class and not a generator, and nothing is done that need not be: small flows pass here often.

    Args:
        device_type: "cpu", "cuda", ...: where autocast is off, and what the switches are set for.
    """

    __slots__ = ("_autocast", "_device_type", "_entered")

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        kind = self._device_type
        self._autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else None
        enter = _ENTER_UNCOMPILED if torch.compiler.is_compiling() else _enter
        self._entered = enter(1, kind == "cpu")
        if self._autocast is not None:
            self._autocast.__enter__()

    def __exit__(self, *error: object) -> None:
        try:
            if self._autocast is not None:
                self._autocast.__exit__(*error)
        finally:
            if self._entered:
                (_LEAVE_UNCOMPILED if torch.compiler.is_compiling() else _leave)(1)


@contextmanager
def callers_precision() -> Iterator[None]:
    """Inside ``full_precision``: the caller's own switches for a while, for a network of the caller's. As long as other
    threads are inside, exact all the same. Autocast stays as it is."""
    depth = getattr(_own, "depth", 0)
    if not depth:
        yield
        return
    _leave(depth)
    try:
        yield
    finally:
        _enter(depth)


# A compiler must not follow what happens to the process.
_ENTER_UNCOMPILED, _LEAVE_UNCOMPILED = torch.compiler.disable(_enter), torch.compiler.disable(_leave)
