"""What type checkers see of the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glem_augment.checks import PRESET_NAMES
from glem_augment.flows import PRESETS

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_a_users_script_is_checked_and_its_mistakes_are_found() -> None:
    pytest.importorskip("mypy")
    # In the folder of the configuration, so that the cache of `make lint` serves.
    command = [sys.executable, "-m", "mypy", "tests/user_script.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_types_name_every_preset() -> None:
    assert set(PRESET_NAMES) == set(PRESETS)
