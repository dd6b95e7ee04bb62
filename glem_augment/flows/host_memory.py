"""What keeps pages of memory from being asked of the kernel, and cleared by it, again and again."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glem_augment.flows.ordinary import is_ordinary

# Linux only.
_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
# The largest block (with what malloc and alignment add) whose release still moves glibc's thresholds.
_LARGEST = 32 * 2**20 - 8192


def keep_freed_memory() -> None:
    """Make glibc reuse freed blocks of up to 32 MiB for the next tensors.

    At first glibc asks the kernel for every block of more than 128 KiB and gives it back when it is freed, so each
    intermediate result of a flow touches new pages, which the kernel has to clear: more than a quarter of the time of
    sampling from a small flow (benchmarks/host_memory.py). Freeing one large block raises the limit for the life of the
    process ("M_MMAP_THRESHOLD" in mallopt(3)); at most 64 MiB of free memory stay with the process then. The block's
    pages are never touched. Where a user has set these limits, or the C library is another one, nothing changes.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")


def empty_of_huge_pages(like: Tensor) -> Tensor:
    """A new tensor in the shape of another, not filled; if large, of pages of 2 MiB where Linux has them.

    What is too large to be kept comes from the kernel every time and is cleared page by page when it is first written
    to. In pages of 4 KiB that takes longer than computing the gradients of a thousand class Gaussians. The setting
    "madvise" (or "always") of /sys/kernel/mm/transparent_hugepage/enabled allows it, the default of most systems.
    """
    fresh = like.new_empty(like.shape)
    # In this order: torch.compile can't follow what finds madvise.
    if is_ordinary(fresh) and fresh.nbytes > _LARGEST and (advise := _madvise()) is not None:
        lead = -fresh.data_ptr() % mmap.PAGESIZE
        advise(fresh.data_ptr() + lead, fresh.nbytes - lead, _HUGE_PAGES)  # a refusal changes nothing
    return fresh


@cache
def _madvise() -> Any:
    """madvise(2), or None where it or huge pages are unknown."""
    function = getattr(ctypes.CDLL(None), "madvise", None) if _HUGE_PAGES is not None else None
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
