"""Locks between processes that share memory, and waiting for one that a killed process may have kept."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

# Longer than this nobody holds a lock of ours: they are taken for copies and sums only.
LOCK_SECONDS = 30.0


def shared_lock(how: str) -> tuple[Any, bool]:
    """A lock, and whether it works between processes.

    Args:
        how: "fork" (it can't be sent to processes that are started otherwise) or "spawn" (it works for all).
    """
    if how in multiprocessing.get_all_start_methods():
        with contextlib.suppress(ImportError, OSError):  # no semaphores here
            return multiprocessing.get_context(how).Lock(), True
    return threading.Lock(), False


@contextlib.contextmanager
def locked(lock: Any, what: str, fix: str) -> Iterator[None]:
    """Hold ``lock``.

    Raises:
        RuntimeError: it is not to be had; it says ``what`` is locked, and the ``fix``.
    """
    if not lock.acquire(timeout=LOCK_SECONDS):
        raise RuntimeError(f"{what} locked by a process that was killed: {fix}")
    try:
        yield
    finally:
        lock.release()
