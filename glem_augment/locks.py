"""Locks between processes that share memory, waiting for one that a killed process may have kept, a folder of one's
own, and whether the process that made a folder is gone."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Longer than this nobody holds a lock of ours: they are taken for copies and sums only.
LOCK_SECONDS = 30.0
# In a folder that a process works in, see `marked`.
_MARK = ".glem-lock"


def shared_lock(how: str) -> tuple[Any, bool]:
    """A lock, and whether it works between processes.

    Args:
        how: "fork" (it can't be sent to processes that are started otherwise) or "spawn" (it works for all).
    """
    if how in multiprocessing.get_all_start_methods():
        with contextlib.suppress(ImportError, OSError):  # no semaphores here
            return multiprocessing.get_context(how).Lock(), True
    return threading.Lock(), False


class FileLock:
    """A lock between processes, and between the threads of each, that the system takes back from a killed one.

    Args:
        file: descriptor of an open file that all of them have. None of them may close another descriptor of it as long
            as it is used: that would give the lock back.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        # Of every process its own: a thread that holds it while another one forks is not there in the child.
        self._threads: dict[int, threading.Lock] = {}

    @staticmethod
    def exists() -> bool:
        """Whether the system has locks of files."""
        return fcntl is not None

    def acquire(self, timeout: float = -1) -> bool:
        """Whether it is held now. Threads wait for each other for so many seconds, and processes until it is free."""
        threads = self._threads.setdefault(os.getpid(), threading.Lock())
        if not threads.acquire(timeout=timeout):
            return False
        try:
            self._lock_file()
        except BaseException:
            threads.release()
            raise
        return True

    def release(self) -> None:
        """Give it back."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
        finally:
            self._threads[os.getpid()].release()

    def _lock_file(self) -> None:
        while True:
            try:
                return fcntl.lockf(self._file, fcntl.LOCK_EX)
            except OSError as error:
                # The system takes two processes for deadlocked whose threads wait for two locks of ours crosswise.
                if error.errno != errno.EDEADLK:
                    raise
                time.sleep(1e-3)


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
