"""The single files at the top of the package: random states, devices, checks, and the public names."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from glem_augment import distributed
from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.tensors import weights_key


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
