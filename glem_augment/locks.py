"""Locks between processes that share memory, waiting for one that a killed process may have kept, a folder of one's
own, and whether the process that made a folder is gone."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of ``folder``, which is made if missing.

    A kill leaves an empty file behind, and no lock. Where the system or the file system has no locks of files, nothing
    is kept out.

    Raises:
        BlockingIOError: another process is in there. OSError: the folder can't be written.
    """
    path, file = folder / ".lock", None
    while file is None:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
        if not _lock_file(file):
            file.close()
            raise BlockingIOError(f"another process is at work in {folder}: wait for it, or choose another folder")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the one before has just removed it: whoever comes next would lock a file of that name anew
        file = None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            folder.rmdir()  # goes only where nothing came of it
        file.close()


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Mark a new ``folder`` as in use, for `abandoned`; a kill ends that, and leaves the mark behind.

    Where the system or the file system has no locks of files, there is no mark.

    Raises:
        OSError: the folder can't be written.
    """
    path = folder / f"{_MARK}.{secrets.token_hex(4)}"
    with open(path, "ab") as file:
        # Locked before it has its name, under which nobody then finds it free. Flock: threads of one process keep each
        # other out too, and children that outlive a killed process only put off that it is found.
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.replace(path, folder / _MARK)
        yield


def abandoned(folder: Path) -> bool:
    """Whether ``folder`` was `marked` by a process that is gone; False where that can't be known."""
    if fcntl is None:
        return False
    try:
        with open(folder / _MARK, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_file(file: IO[bytes]) -> bool:
    """Whether it is locked now, or can't be at all."""
    if fcntl is None:
        return True
    try:
        # Not flock: workers, which may outlive a killed process by seconds, would hold that too.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a network file system without locks
    return True
