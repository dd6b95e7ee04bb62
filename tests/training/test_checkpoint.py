"""Checkpoints: damaged and hostile ones, and those of other runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import tiny_trainer, toy_data

from glem_augment.errors import TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.model.files import CHECKPOINT
from glem_augment.training.checkpoint import data_fingerprint, load_checkpoint


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-executed",)


def test_damaged_and_hostile_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = tiny_trainer(tmp_path)
    trainer.save_checkpoint()
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"hello", b"\x80\x04\x95", os.urandom(1000)):
        path.write_bytes(damaged)
        with pytest.raises(TrainingError, match=CHECKPOINT):
            load_checkpoint(tmp_path)
    for state in ({**trainer.state(), "x": Hostile()}, [1], {}):
        torch.save(state, path)
        with pytest.raises(TrainingError, match=CHECKPOINT):
            load_checkpoint(tmp_path)
    assert not (tmp_path / "was-executed").exists()


def test_resuming_needs_a_run_with_the_same_settings_and_data(tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny_trainer(out, resume=True).save_checkpoint()  # a run may have been killed before its first checkpoint
    with pytest.raises(TrainingError, match=CHECKPOINT):
        tiny_trainer(out)
    with pytest.raises(TrainingError, match="batch_size: 24 then, 30 now"):
        tiny_trainer(out, resume=True, batch_size=30)
    with pytest.raises(TrainingError, match="other data"):
        tiny_trainer(out, toy_data(100), resume=True)
    tiny_trainer(out, resume=True, sample_every=3, workers=0, lr=1e-3)


def test_other_labels_names_or_pixels_are_other_data() -> None:
    data = toy_data()
    x, y = data.tensor(), data.targets
    changed = x.clone()
    changed[-1, 0, 0, 0] += 1
    others = [(x, np.roll(y, 1), data.classes), (x, y, ["class0", "class2"]), (changed, y, data.classes)]
    assert data_fingerprint(ImageData.from_tensors(x, y, data.classes)) == data_fingerprint(data)
    assert len({data_fingerprint(data), *(data_fingerprint(ImageData.from_tensors(*each)) for each in others)}) == 4


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a counter is missing": lambda state: state.pop("bad_steps"),
    "a tensor is missing": lambda state: state["model"].pop("latent_classes.gaussians.mu"),
    "no optimizer": lambda state: state.update(flow_optimizer=None),
    "a setting is unknown": lambda state: state["settings"].update(unknown=1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    state = tiny_trainer(tmp_path).state()
    CHANGES[what](state)
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match=str(tmp_path)):
        tiny_trainer(tmp_path, resume=True)
