"""The single files at the top of the package: locks, random states, devices, checks, and the public names."""

from __future__ import annotations

import copy
import math
import multiprocessing
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from glem_augment import distributed
from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.io import lock_folder
from glem_augment.tensors import weights_key

HOLD = """
import os, sys, time
from pathlib import Path
from glem_augment.io import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2:] and not os.fork():
        time.sleep(5)
        sys.exit()
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_locked_by_one_process_at_a_time_and_free_after_a_kill(tmp_path: Path) -> None:
    """Also where workers, forked while the process held the lock, outlive it."""
    run, fork = tmp_path / "run", "fork" in multiprocessing.get_all_start_methods()
    command = [sys.executable, "-c", HOLD, str(run), *["and fork"] * fork]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(BlockingIOError, match="another process is at work in .*run"), lock_folder(run):
        pass
    process.kill()
    process.wait()
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        with suppress(BlockingIOError), lock_folder(run):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the lock is still held")
    with lock_folder(run), lock_folder(run):
        pass
    assert not run.exists()  # nothing came of it
    with pytest.raises(ZeroDivisionError), lock_folder(run):
        (run / "result").write_text("")
        1 / 0  # noqa: B018
    assert [path.name for path in run.iterdir()] == ["result"]


def test_a_key_of_weights_notices_writes_and_replacements() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    seen = [weights_key(model)]
    assert weights_key(model) == seen[0]
    for change in (
        lambda: nn.init.ones_(model[0].weight),
        lambda: model(torch.randn(4, 2)),  # running statistics
        lambda: setattr(model[0], "bias", nn.Parameter(torch.zeros(3))),
        lambda: model.load_state_dict(copy.deepcopy(model).state_dict()),
    ):
        change()
        assert weights_key(model) not in seen
        seen.append(weights_key(model))


def test_checks_name_the_value_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="source .*'gaussian', 'rfcm'.*'x'"):
        check_choice("source", "x", ("gaussian", "rfcm"))
    assert check_number("p", np.float32(0.5), 0, 1) == 0.5 and check_whole("rank", np.int64(3), 1) == 3
    for value, high, open_low in ((1.5, 1, False), (0, 1, True), (-1, math.inf, False), (math.nan, 1, False)):
        with pytest.raises(ValueError, match=f"p .*{value}"):
            check_number("p", value, 0, high, open_low)
    with pytest.raises(ValueError, match="rank .*0"):
        check_whole("rank", 0, 1)
    for bad in (True, "3", 2.0j):
        with pytest.raises(TypeError, match="rank"):
            check_whole("rank", bad, 1)
        with pytest.raises(TypeError, match="p must"):
            check_number("p", bad, 0, 1)


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = distributed.tqdm
    monkeypatch.setattr(distributed, "tqdm", lambda *args, **options: real(*args, **{**options, "delay": 0}))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert list(distributed.progress_bar("work", range(3))) == [0, 1, 2]
        assert ("work" in capsys.readouterr().err) == terminal
