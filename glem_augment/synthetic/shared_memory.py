"""Arrays in memory that a process shares with those that it starts, forked or not, and a lock to hold meanwhile."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Mapping
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np

from glem_augment.locks import FileLock, locked, shared_lock

Layout = Mapping[str, tuple[tuple[int, ...], type]]


class SharedArrays:
    """Zeros of given shapes and types, by name in `arrays`.

    The memory needs no room in /dev/shm (64 MB in a container, where a DataLoader needs it too), and costs nothing
    until it is written to. On Linux it is a file that has no name: processes that are forked share it, and so do those
    that are started otherwise ("spawn", "forkserver") and get the owner by pickling. Elsewhere only forked ones do;
    and where there is no fork, nobody.

    Args:
        layout: shape and type of every array.

    Raises:
        OSError, ValueError, OverflowError, MemoryError: the system refuses that much memory.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = dict(layout)
        # A file is given any size; here the system says whether it has as much.
        anonymous = mmap.mmap(-1, self._size())
        self._file = _file_without_name()
        if self._file is not None:
            anonymous.close()
            self._open()
            return
        self._lock, shared = shared_lock("fork")
        self._map(anonymous if shared else bytearray(self._size()))

    @property
    def can_be_sent(self) -> bool:
        """Whether a process that is being started now, and not forked, can share it."""
        return self._file is not None and get_spawning_popen() is not None

    def locked(self, what: str, fix: str) -> contextlib.AbstractContextManager[None]:
        """Keep all other processes and threads that ask for the same out: see `_locks.locked`."""
        return locked(self._lock, what, fix)

    def __getstate__(self) -> dict[str, Any]:
        if not self.can_be_sent:
            raise TypeError("memory can be shared only with a process that is being started")
        return {"layout": self._layout, "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layout, self._file = state["layout"], state["file"].detach()
        self._open()

    def _open(self) -> None:
        assert self._file is not None
        weakref.finalize(self, os.close, self._file).atexit = False
        os.ftruncate(self._file, self._size())
        self._lock = FileLock(self._file)
        self._map(mmap.mmap(self._file, self._size()))

    def _size(self) -> int:
        return max(1, sum(_padded(*entry) for entry in self._layout.values()))

    def _map(self, memory: mmap.mmap | bytearray) -> None:
        self.arrays, start = {}, 0
        for name, (shape, kind) in self._layout.items():
            self.arrays[name] = np.ndarray(shape, kind, buffer=memory, offset=start)
            start += _padded(shape, kind)


def _padded(shape: tuple[int, ...], kind: type) -> int:
    """Bytes of an array, so that the next one begins with a cache line."""
    return -(-math.prod(shape) * np.dtype(kind).itemsize // 64) * 64


def _file_without_name() -> int | None:
    """The descriptor of a file in memory that can be locked; None where the system has none."""
    if not hasattr(os, "memfd_create") or not FileLock.exists():
        return None
    file = None
    try:
        file = os.memfd_create("glem-augment")
        lock = FileLock(file)
        lock.acquire()
        lock.release()
        return file
    except OSError:  # an old kernel, or one that is told not to
        if file is not None:
            os.close(file)
        return None
