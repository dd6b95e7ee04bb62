"""Memory that stays with the process between two layers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

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
# What glibc starts with, held there.
SMALL = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def fresh_pages(environment: dict[str, str]) -> int:
    """Pages that the kernel had to provide for three batches of samples, in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return int(subprocess.check_output([sys.executable, "-c", CHILD], env=kept | environment, text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_layers_reuse_memory_unless_the_user_has_set_the_limits() -> None:
    # How many pages a fault brings is up to the kernel.
    assert 10 * fresh_pages({}) < fresh_pages(SMALL)
