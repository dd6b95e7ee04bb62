"""Memory that stays with the process between two layers."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource, torch
from glem_augment import GLEM
torch.set_num_threads(1)
model, classes = GLEM.from_pretrained("bundled:fashion-mnist"), torch.arange(32) % 10
for _ in range(2):
    model.sample(classes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    model.sample(classes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
LARGE = """
import resource, sys, torch
from glem_augment.flows import host_memory
from glem_augment.gaussians import ClassGaussians
if sys.argv[1] == "without":
    host_memory._HUGE_PAGES = None
gaussians = ClassGaussians(1000, 9000)
result = gaussians.log_prob(torch.zeros(2, 9000)).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
result.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert gaussians.mu.grad.isfinite().all() and gaussians.s.grad.isfinite().all()
"""
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What glibc starts with, held there.
SMALL = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def fresh_pages(environment: dict[str, str]) -> int:
    """Pages that the kernel had to provide for three batches of samples, in a process of its own."""
    return int(subprocess.check_output([sys.executable, "-c", CHILD], env=_without_limits() | environment, text=True))


def _without_limits() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_layers_reuse_memory_unless_the_user_has_set_the_limits() -> None:
    # How many pages a fault brings is up to the kernel.
    assert 10 * fresh_pages({}) < fresh_pages(SMALL)


@pytest.mark.skipif(
    mmap.PAGESIZE != 4096 or not TRANSPARENT.exists() or "[madvise]" not in TRANSPARENT.read_text(),
    reason="huge pages are not had by asking, or are larger",
)
def test_large_gradients_come_on_huge_pages() -> None:
    """Twice 36 MB: 18,000 pages of 4 KiB, or 34 of 2 MiB and what does not fill one."""
    command, kept = [sys.executable, "-c", LARGE], _without_limits()
    fresh = [int(subprocess.check_output([*command, how], env=kept, text=True)) for how in ("with", "without")]
    assert 3 * fresh[0] < fresh[1]
