"""`glem` commands in processes of their own, which tests kill and starve; see test_faults.

The processes are forked from one that has imported everything, so that each costs a fraction of a second.
"""

from __future__ import annotations

import io
import itertools
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import glem_augment.cli as cli
from glem_augment import io as glem_io
from glem_augment.training import Trainer

_CONTEXT = multiprocessing.get_context("forkserver")
# Installed packages only: where the tests are, the server does not know.
_HEAVY = ("evaluation", "synthetic.export", "training.trainer", "cli.generate", "cli.train")
_CONTEXT.set_forkserver_preload(["pytest", *(f"glem_augment.{name}" for name in _HEAVY)])
DIED = 9


def run(argv: list[str], log: Path, die_at: int | None = None) -> int | None:
    """The exit code of `glem ARGV` in a new process, -N for signal N.

    Args:
        log: gets the text that the command prints.
        die_at: end the process, as abruptly as SIGKILL would, in place of this operation (counted from 0) on a file.
    """
    process = _CONTEXT.Process(target=_child, args=(argv, str(log), die_at))
    process.start()
    process.join(100)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode


def _child(argv: list[str], path: str, die_at: int | None) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's lock holds a semaphore, which killed processes would leave behind
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    Trainer.checkpoint_seconds = math.inf
    if die_at is not None:
        die_before(die_at, lambda: os._exit(DIED), [*writing_operations(), *naming_operations()])
    code = cli.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


Operation = tuple[Any, str]  # owner, attribute


class RawFile(io.FileIO):
    """A file whose `write` can be replaced."""


def _open(path: Path, mode: str, **text: Any) -> Any:
    """`open`, with a `RawFile` below for `atomic_write`."""
    if "x" not in mode:
        return open(path, mode, **text)
    buffer = io.BufferedWriter(RawFile(path, mode.replace("b", "")))
    return io.TextIOWrapper(buffer, **text) if text else buffer


glem_io.open = _open  # type: ignore[attr-defined]


def writing_operations() -> list[Operation]:
    """What writes, flushes and renames files; any of them may find the disk full."""
    written = [(RawFile, "write"), (Path, "write_bytes"), (os, "write")]
    return [*written, (os, "fsync"), (os, "replace"), (os, "link")]


def naming_operations() -> list[Operation]:
    """What makes folders and takes files away."""
    return [(os, "mkdir"), (os, "unlink")]


def die_before(count: int, die: Callable[[], Any], operations: list[Operation]) -> Callable[[], int]:
    """Have `die` called in place of operation number `count`; returns how many there have been so far.

    In place of a write: in its middle, when half of the bytes are written.
    """
    numbers, seen = itertools.count(), [0]

    def wrap(real: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            number = next(numbers)  # atomic: exports write from several threads
            seen[0] = max(seen[0], number + 1)
            if number != count:
                return real(*args, **options)
            if writes:
                data = bytes(args[1])
                real(args[0], data[: len(data) // 2])
            return die()

        return operation

    for owner, name in operations:
        setattr(owner, name, wrap(getattr(owner, name), name.startswith("write")))
    return lambda: seen[0]
