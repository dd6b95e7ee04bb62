"""Checkpoints of strangers: whole files, checksums and all, that say what can't be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import write_images
from test_training import tiny_config, tiny_trainer, toy_data
from torch import Tensor

from glem_augment.cli.main import main
from glem_augment.errors import TrainingError
from glem_augment.training import TrainConfig
from glem_augment.training import checkpoint as statefile
from glem_augment.training.checkpoint import NEWEST, check_same_run, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def hostile(
    facts: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Facts and tensors of which one thing is wrong, and what that is."""
    for key in facts:
        rest = {k: v for k, v in facts.items() if k != key}
        if key not in ("init_from", "flow"):  # which older versions did not write
            yield f"without {key}", rest, tensors
        for value in (None, -1, -0.5, True, "x", [], {}, 1e300, 10**30, [[1, 2]], {"a": 1}):
            if value != facts[key]:
                yield f"{key}={value}", {**facts, key: value}, tensors
    for name, tensor in list(tensors.items())[::5]:
        yield f"without {name}", facts, {k: v for k, v in tensors.items() if k != name}
        shapes = {"flat": tensor.new_zeros(7, 3), "scalar": tensor.new_zeros(()), "none": tensor.new_zeros(0)}
        for what, value in shapes.items():
            if value.shape != tensor.shape and name != "run/losses":
                yield f"{name} {what}", facts, {**tensors, name: value}
        if tensor.is_floating_point():
            yield f"{name} nan", facts, {**tensors, name: torch.full_like(tensor, math.nan)}
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
    facts, tensors = statefile.from_bytes((tmp_path / "made" / NEWEST).read_bytes())
    out, data, tried = tmp_path / "run", toy_data(), 0
    out.mkdir()
    other = tiny_trainer(tmp_path / "other", data, epochs=1)
    for what, bad_facts, bad_tensors in hostile(facts, tensors):
        (out / NEWEST).write_bytes(statefile.to_bytes(bad_facts, bad_tensors))
        tried += 1
        try:
            checkpoint = load_checkpoint(out)
            check_same_run(checkpoint, other.config, other.fingerprint, data.name)
            other.restore(checkpoint)
        except TrainingError as error:
            assert str(out) in str(error), what
        else:
            pytest.fail(f"{what} was taken")
    assert tried > 150
    (out / NEWEST).write_bytes(statefile.to_bytes(facts, tensors))
    assert tiny_trainer(out, data, resume=True, epochs=1).step == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flow_options", {"depth": [10**9, 1], "width": [8, 8]}),
        ("flow_options", {"__class__": 1}),
        ("preset", "../../etc"),
        ("preset", 7),
        ("epochs", 10**12),
        ("m_steps", 10**12),
        ("workers", 10**9),
        ("threads", 10**9),
        ("seed", 10**40),
        ("modes_rank", 10**9),
        ("psi", [1e308, "x"]),
        ("milestones", {"a": 1}),
        ("unknown", 1),
        ("batch_size", 1.5),
    ],
)
def test_the_command_refuses_settings_of_strangers_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    write_images(tmp_path / "images", ("a", "b"), (8, 8), 4)
    out = tmp_path / "run"
    out.mkdir()
    config = {**TrainConfig(flow_options={"depth": [1, 1], "width": [8, 8]}).to_dict(), key: value}
    (out / NEWEST).write_bytes(statefile.to_bytes({"config": config, "step": 1}, {"model/x": torch.zeros(1)}))
    (out / "run.json").write_text(json.dumps({"image_size": [10**6, 10**6], "channels": "x", "init": 5, "split": []}))
    assert main(["train", str(tmp_path / "images"), "--out", str(out), "--resume", "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glem: error: "), lines
    assert key in lines[0] or str(value) in lines[0] or next(iter(value), "") in lines[0]  # type: ignore[call-overload]


def test_a_setting_that_a_checkpoint_does_not_know_was_at_its_default(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    facts, tensors = trainer.state()
    del facts["config"]["ce_scale"]
    (out / NEWEST).write_bytes(statefile.to_bytes(facts, tensors))
    assert tiny_trainer(out, resume=True).step == 0
    with pytest.raises(TrainingError, match=r"ce_scale: 1\.0 then, 0\.5 now"):
        tiny_trainer(out, resume=True, ce_scale=0.5)


def test_a_state_file_is_a_function_of_the_state(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    facts, tensors = trainer.state()
    data = statefile.to_bytes(facts, tensors)
    again, values = statefile.from_bytes(data)
    assert again == json.loads(json.dumps(facts)) and values.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in values.items())
    assert statefile.to_bytes(again, dict(reversed(values.items()))) == data
    with pytest.raises(ValueError, match="JSON"):
        statefile.to_bytes({"loss": math.nan}, {})
    assert tiny_config().to_dict() == again["config"]
