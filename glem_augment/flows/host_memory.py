"""What keeps the C library from giving memory back to the kernel between two layers."""

from __future__ import annotations

import torch

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
