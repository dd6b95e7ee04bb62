"""Tasks for many images on several threads, with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from glem_augment.distributed import progress_bar

_BLOCK = 32  # images per task of the decoding threads


def usable_cpus() -> int:
    """How many CPUs this process may run on, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_threads(task: Callable[[int], None], count: int, title: str, threads: int = 8) -> None:
    """Run `task(i)` for i < count on up to `threads` threads; the first error, in the order of i, stops the rest.

    PIL and torch release the GIL while they decode.
    """

    def block(start: int) -> int:
        stop = min(start + _BLOCK, count)
        for i in range(start, stop):
            task(i)
        return stop - start

    bar = progress_bar(title, total=count)
    with bar, ThreadPoolExecutor(min(threads, usable_cpus())) as pool:
        for done in pool.map(block, range(0, count, _BLOCK)):
            bar.update(done)
