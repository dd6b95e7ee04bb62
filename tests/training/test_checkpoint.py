"""Checkpoints: damaged ones, full disks, other runs, and whole files that do not fit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import tiny_trainer, toy_data
from torch import Tensor

from glem_augment.errors import TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.training import checkpoint as checkpoint_module
from glem_augment.training.checkpoint import NEWEST, data_fingerprint, from_bytes, load_checkpoint, to_bytes


def test_damaged_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    trainer.save_checkpoint()
    path = out / NEWEST
    assert sorted(p.name for p in out.iterdir()) == [NEWEST, "metrics.jsonl"]
    whole = path.read_bytes()
    places = (0, 1, 4, 9, 100, *range(8, len(whole), len(whole) // 25), len(whole) - 1)
    cut = [whole[:place] for place in places]
    flipped = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
    for damaged in (*cut, *flipped, bytes(len(whole)), b"hello", b"\x80\x04\x95", os.urandom(1000)):
        path.write_bytes(damaged)
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_FORMAT", b"other")
        path.write_bytes(to_bytes(*trainer.state()))
    with pytest.raises(TrainingError, match="damaged, or was written by another version, which can finish that run"):
        load_checkpoint(out)


def test_resuming_needs_a_run_with_the_same_settings_and_data(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="without --resume"):
        tiny_trainer(out, resume=True)
    tiny_trainer(out).save_checkpoint()
    with pytest.raises(TrainingError, match="already holds a run"):
        tiny_trainer(out)
    with pytest.raises(TrainingError, match="lr: 0.005 then, 0.1 now"):
        tiny_trainer(out, resume=True, lr=0.1)
    with pytest.raises(TrainingError, match="other data"):
        tiny_trainer(out, toy_data(100), resume=True)
    tiny_trainer(out, resume=True, sample_every=3, workers=0)


def test_other_labels_names_or_pixels_are_other_data() -> None:
    data = toy_data()
    x, y = data.tensor(), data.targets
    changed = x.clone()
    changed[-1, 0, 0, 0] += 1
    others = [(x, np.roll(y, 1), data.classes), (x, y, ["class0", "class2"]), (changed, y, data.classes)]
    assert data_fingerprint(ImageData.from_tensors(x, y, data.classes)) == data_fingerprint(data)
    assert len({data_fingerprint(data), *(data_fingerprint(ImageData.from_tensors(*each)) for each in others)}) == 4


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "a fact is missing": lambda facts, tensors: facts.pop("lr_scale"),
    "a tensor is missing": lambda facts, tensors: tensors.pop("model/latent_classes.gaussians.mu"),
    "a tensor is unknown": lambda facts, tensors: tensors.update({"model/x": torch.zeros(3)}),
    "a parameter is unknown": lambda facts, tensors: tensors.update({"m_optimizer/7/exp_avg": torch.zeros(3)}),
    "a moment has another shape": lambda facts, tensors: tensors.update({"m_optimizer/0/exp_avg": torch.zeros(7, 3)}),
    "no random state": lambda facts, tensors: tensors.pop("run/rng"),
    "a setting is unknown": lambda facts, tensors: facts["config"].update(unknown=1),
    "a setting is impossible": lambda facts, tensors: facts["config"].update(preset="../../etc"),
    "the flow is huge": lambda facts, tensors: facts.update(flow=facts["flow"].replace("[1, 1]", "[1000000000, 1]")),
    "the flow is none": lambda facts, tensors: facts.update(flow='"x"'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    trainer = tiny_trainer(tmp_path)
    facts, tensors = trainer.state()
    CHANGES[what](facts, tensors)
    (tmp_path / NEWEST).write_bytes(to_bytes(facts, tensors))
    with pytest.raises(TrainingError, match=str(tmp_path)):
        tiny_trainer(tmp_path, resume=True)


def test_a_state_file_is_a_function_of_the_state(tmp_path: Path) -> None:
    facts, tensors = tiny_trainer(tmp_path / "run").state()
    data = to_bytes(facts, tensors)
    again, values = from_bytes(data)
    assert again == json.loads(json.dumps(facts)) and values.keys() == tensors.keys()
    assert to_bytes(again, dict(reversed(values.items()))) == data
    with pytest.raises(ValueError, match="JSON"):
        to_bytes({"loss": math.nan}, {})
