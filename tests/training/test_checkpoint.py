"""Checkpoints: damaged ones, full disks, other runs, and whole files of strangers that say what can't be."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import tiny_trainer, toy_data
from torch import Tensor

from glem_augment.data.dataset import ImageData
from glem_augment.errors import TrainingError
from glem_augment.training import checkpoint as checkpoint_module
from glem_augment.training.checkpoint import (
    GOOD,
    NEWEST,
    PREVIOUS,
    check_same_run,
    data_fingerprint,
    from_bytes,
    load_checkpoint,
    to_bytes,
)


@pytest.mark.parametrize("how", ["write", "fsync", "rename"])
def test_a_full_disk_names_the_checkpoint_and_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    x, y = next(iter(trainer.data.batches(trainer.split.nf, 24)))
    for _ in range(2):
        trainer.save_checkpoint(good=True)
        trainer.e_step(x, y)
        trainer.step += 1
    newest, before = out / NEWEST, {name: (out / name).read_bytes() for name in (NEWEST, PREVIOUS, GOOD)}
    assert before[NEWEST] == before[GOOD] != before[PREVIOUS]

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if how == "write":
            patch.setattr("glem_augment.io._RawFile.write", full)
        elif how == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left") as caught:
            trainer.save_checkpoint()
    assert caught.value.errno == errno.ENOSPC and str(newest) in str(caught.value)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob(".*tmp"))
    assert tiny_trainer(out, resume=True).step == 1
    trainer.save_checkpoint()  # there is space again
    assert load_checkpoint(out).step == 2 and (out / PREVIOUS).read_bytes() == before[NEWEST]
    assert not list(out.glob(".*tmp"))


def test_damaged_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    trainer.save_checkpoint()
    path = out / NEWEST
    assert sorted(p.name for p in out.iterdir()) == [NEWEST, "metrics.jsonl"]
    whole = path.read_bytes()
    for length in (0, 1, 4, 100, *range(0, len(whole), len(whole) // 25), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    for place in (0, 9, 100, *range(8, len(whole), len(whole) // 25), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    for foreign in (b"hello", b"\x80\x04\x95", b"PK\x03\x04" + b"\0" * 100, b"{}", os.urandom(1000)):
        path.write_bytes(foreign)
        with pytest.raises(TrainingError, match=NEWEST):
            load_checkpoint(out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "VERSION", 99)
        path.write_bytes(to_bytes(*trainer.state()))
    with pytest.raises(TrainingError, match="format 99, this version reads"):
        load_checkpoint(out)
    path.write_bytes(to_bytes({"step": 1}, {}))
    with pytest.raises(TrainingError, match="no settings"):
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
    tiny_trainer(out, resume=True, checkpoint_minutes=7.0, sample_every=3, workers=0, refit_beta=0.0)


def test_other_labels_names_or_pixels_are_other_data() -> None:
    data = toy_data()
    x, y = data.tensor(), data.targets
    changed = x.clone()
    changed[-1, 0, 0, 0] += 1
    others = [
        ImageData.from_tensors(x, np.roll(y, 1), data.classes),
        ImageData.from_tensors(x, y, ["class0", "class2"]),
        ImageData.from_tensors(changed, y, data.classes),
    ]
    assert data_fingerprint(ImageData.from_tensors(x, y, data.classes)) == data_fingerprint(data)
    assert len({data_fingerprint(each) for each in [data, *others]}) == 4


def hostile(
    facts: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Facts and tensors of which one thing is wrong, and what that is."""
    for key in facts:
        rest = {k: v for k, v in facts.items() if k != key}
        yield f"without {key}", rest, tensors
        for value in (None, -1, True, "x", [], 1e300, 10**30, {"a": 1}):
            if value != facts[key]:
                yield f"{key}={value}", {**facts, key: value}, tensors
    for name, tensor in list(tensors.items())[::15]:
        yield f"without {name}", facts, {k: v for k, v in tensors.items() if k != name}
        shapes = {"flat": tensor.new_zeros(7, 3), "scalar": tensor.new_zeros(()), "none": tensor.new_zeros(0)}
        for what, value in shapes.items():
            if value.shape != tensor.shape and name != "run/losses":
                yield f"{name} {what}", facts, {**tensors, name: value}
        if tensor.is_floating_point():
            yield f"{name} nan", facts, {**tensors, name: torch.full_like(tensor, math.nan)}
    for key, value in (
        ("preset", "../../etc"), ("preset", 7), ("epochs", 10**12), ("m_steps", 10**12), ("workers", 10**9),
        ("threads", 10**9), ("seed", 10**40), ("modes_rank", 10**9), ("psi", [1e308, "x"]), ("milestones", {"a": 1}),
        ("unknown", 1), ("batch_size", 1.5), ("flow_options", 1),
    ):  # fmt: skip
        yield f"config {key}={value}", {**facts, "config": {**facts["config"], key: value}}, tensors
    for name in (
        "x",
        "model/x",
        "average/x",
        "flow_optimizer/99/step",
        "flow_optimizer/0/__class__",
        "m_optimizer/a/b",
    ):
        yield f"with {name}", facts, {**tensors, name: torch.zeros(3)}


def test_checkpoints_that_say_what_can_not_be_are_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "made", epochs=1)
    trainer.fit()
    facts, tensors = from_bytes((tmp_path / "made" / NEWEST).read_bytes())
    out, data, tried = tmp_path / "run", toy_data(), 0
    out.mkdir()
    other = tiny_trainer(tmp_path / "other", data, epochs=1)
    for what, bad_facts, bad_tensors in hostile(facts, tensors):
        (out / NEWEST).write_bytes(to_bytes(bad_facts, bad_tensors))
        tried += 1
        try:
            checkpoint = load_checkpoint(out)
            check_same_run(checkpoint, other.config, other.fingerprint, data.name)
            other.restore(checkpoint)
        except TrainingError as error:
            assert str(out) in str(error), what
        else:
            pytest.fail(f"{what} was taken")
    assert tried > 90
    (out / NEWEST).write_bytes(to_bytes(facts, tensors))
    assert tiny_trainer(out, data, resume=True, epochs=1).step == 4


@pytest.mark.parametrize("flow", [{"depth": [10**9, 1]}, {"__class__": 1}, "x", {"image_shape": [1, 10**6, 10**6]}])
def test_a_checkpoint_of_an_impossible_flow_is_refused(tmp_path: Path, flow: Any) -> None:
    out = tmp_path / "run"
    facts, tensors = tiny_trainer(out).state()
    changed = {**json.loads(facts["flow"]), **flow} if isinstance(flow, dict) else flow
    (out / NEWEST).write_bytes(to_bytes({**facts, "flow": json.dumps(changed)}, tensors))
    with pytest.raises(TrainingError, match=f"{NEWEST} describes no flow that can be built|does not fit this run"):
        tiny_trainer(out, resume=True)


def test_a_state_file_is_a_function_of_the_state(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    facts, tensors = trainer.state()
    data = to_bytes(facts, tensors)
    again, values = from_bytes(data)
    assert again == json.loads(json.dumps(facts)) and values.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in values.items())
    assert to_bytes(again, dict(reversed(values.items()))) == data
    with pytest.raises(ValueError, match="JSON"):
        to_bytes({"loss": math.nan}, {})
    assert trainer.config.to_dict() == again["config"]
