"""The single files at the top of the package: locks, random states, devices, checks, and the public names."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glem_augment import distributed
from glem_augment.augment.state import RandomState
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


def test_ranks_and_workers_draw_differently_and_resume_from_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(rank: int, worker: int | None, state: dict[str, Any] | None = None) -> Tensor:
        monkeypatch.setattr("glem_augment.augment.state.rank", lambda otherwise=0: rank)
        info = None if worker is None else type("Info", (), {"seed": 0, "id": worker})()
        monkeypatch.setattr("glem_augment.augment.state.get_worker_info", lambda: info)
        random = RandomState(5)
        if state is not None:
            random.restore(state)
        return torch.cat([torch.rand(4, generator=random.generator()) for _ in range(4)])

    streams = [draws(r, w) for r in (0, 1, 7) for w in (None, 0, 1)]
    for i, a in enumerate(streams):
        assert len(a.unique()) == 16 and all(not torch.isin(a, b).any() for b in streams[:i])
    assert torch.equal(draws(1, None, {"seed": 5, "calls": 2})[:8], streams[3][8:])
    assert torch.equal(draws(1, 1, {"seed": 5, "calls": 1, "workers": [0, 1]})[:8], streams[5][8:])
    signs = [torch.rand(4, generator=RandomState(seed).generator()) for seed in (5, -5)]
    assert not torch.isin(*signs).any()


@pytest.mark.parametrize(("seed", "earlier"), [(3, [0.3511712, 0.6318962]), (-5, [0.822013, 0.0290282])])
def test_draws_are_those_of_earlier_versions(seed: int, earlier: list[float]) -> None:
    random = RandomState(seed)
    assert [torch.rand(1, generator=random.generator()).item() for _ in range(2)] == pytest.approx(earlier, abs=1e-6)


def test_states_are_saved_restored_and_checked() -> None:
    random = RandomState(np.int64(3))
    random.generator()
    assert random.state() == {"seed": 3, "calls": 1}
    later = RandomState(9)
    later.restore(random.state())
    assert torch.equal(torch.rand(3, generator=later.generator()), torch.rand(3, generator=random.generator()))
    with pytest.raises(TypeError, match="seed must be an int"):
        RandomState(0.5)  # type: ignore[arg-type]
    torch.manual_seed(0)
    first, second = RandomState(None), RandomState(None)
    torch.manual_seed(0)
    assert first.seed == RandomState(None).seed != second.seed


def test_the_rank_travels_with_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    here = RandomState(0)
    monkeypatch.setattr("glem_augment.augment.state.rank", lambda otherwise=0: 3)
    sent = pickle.dumps(here)
    wanted = torch.rand(3, generator=here.generator())
    monkeypatch.undo()  # a spawned process knows no rank
    assert torch.equal(torch.rand(3, generator=pickle.loads(sent).generator()), wanted)


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
