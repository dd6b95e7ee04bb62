"""What runs on a GPU, run on a device that refuses operands of two devices: see `fake_device`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch can't have a backend in Python",
)
@pytest.mark.parametrize(
    "parts",
    [
        ["waits"],
        pytest.param(["moves", "parts", "waits", "autoencoder", "synthetic", "training"], marks=pytest.mark.slow),
    ],
    ids=["short", "all"],
)
def test_everything_stays_on_its_device_and_an_augmented_batch_waits_for_it_once(parts: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "fake_device.py"), *parts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if " " not in line] == ["mixtures", *parts]
