"""Settings are checked by name, survive JSON and become options; each method learns what it says."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import rows, tiny_trainer, toy_data

from glem_augment.cli.train import add_settings, checked, given
from glem_augment.training import TrainConfig
from glem_augment.training.config import METHODS, SETTINGS, method

# ---- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(objective="gan"), "objective must be one of 'glem', 'saturating', 'mle', 'hybrid', 'ib'"),
        (dict(joint=1), "joint must be True or False"),
        (dict(objective="mle", beta=0.1), "mle.*use 'hybrid'"),
        (dict(objective="glem", joint=True), "joint=True has no M-step"),
        (dict(augment=("cutmix",)), "cutmix"),
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(m_steps=10**6, epochs=11), "m_steps must be such that there are at most 10000000 in all"),
        (dict(lr=0), "lr must be finite and above 0"),
        (dict(bits=9), "bits must be at most 8"),
        (dict(psi=(1, 2)), "psi must be a list of 3 numbers"),
        (dict(psi=(1, 2, 0)), "psi must be three positive numbers"),
        (dict(flow_options=[1]), "flow_options must be a table"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**bad)


def test_defaults_follow_the_objective() -> None:
    def resolved(**settings: Any) -> tuple[Any, ...]:
        config = TrainConfig(**settings)
        return config.beta, config.ce_scale, config.joint, config.random_init, config.psi

    paper = (False, None, (0.5, 0.2, 0.05))
    assert TrainConfig() == TrainConfig(objective="hybrid") == method("hybrid-joint")
    assert resolved() == (0.3, 0.1, True, (0.1, 0.0), None)
    assert resolved(beta=0.8, random_init=None, psi=(1, 1, 1)) == (0.8, 0.1, True, None, (1.0, 1.0, 1.0))
    assert resolved(objective="hybrid", joint=False) == (0.3, 0.2, *paper)
    assert resolved(objective="ib") == (0.3, 0.2, *paper)
    assert all(resolved(objective=name) == (0.0, 1.0, *paper) for name in ("glem", "saturating", "mle"))
    assert TrainConfig(**TrainConfig(objective="glem").to_dict()) == TrainConfig(objective="glem")  # a checkpoint's


# ---- the command line ------------------------------------------------------------------------------------------------


def test_every_setting_is_an_option_and_a_line_of_a_file(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    assert "--lr X" in parser.format_help() and "--ce-scale" not in parser.format_help()  # --help-all shows it
    words = {
        "flow_options": (["--flow", "depth=[1,2]", "--flow", "rank=2"], {"depth": [1, 2], "rank": 2}),
        "psi": (["--psi", "none"], None),
        "random_init": (["--random-init", "1", "5"], (1.0, 5.0)),
        "augment": (["--augment", "flip, crop"], ("flip", "crop")),
        "autoencoder": (["--autoencoder", "taef2"], "taef2"),
        "joint": (["--joint"], True),
    }  # fmt: skip
    for name, about in SETTINGS.items():
        kind = about["kind"]
        most = min(about.get("high", 1), 4096)
        argv, wanted = words.get(name, ([f"--{name.replace('_', '-')}", str(most)], most))
        if isinstance(kind, tuple):
            argv, wanted = [argv[0], kind[-1]], kind[-1]
        assert given(parser.parse_args(argv)) == {name: wanted}, name
        written = argv[1] if len(argv) == 2 else wanted
        assert checked({name: list(written) if isinstance(written, tuple) else written}, "file") == {name: wanted}
    with pytest.raises(ValueError, match="file: lr can't be 'fast'"):
        checked({"lr": "fast"}, "file")
    with pytest.raises(ValueError, match="file: unknown training settings \\['milestones'\\]"):
        checked({"milestones": [0.5]}, "file")


# ---- methods ---------------------------------------------------------------------------------------------------------

# The means and the variances; the other methods learn both.
LEARNS = {
    "only-mu": (True, False), "only-sigma": (False, True), "random": (False, False), "flowgmm": (False, False),
    "ib-inn": (True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", ["mef_tiny", "identity"])
def test_every_method_trains_and_learns_what_it_says(name: str, preset: str, tmp_path: Path) -> None:
    """Also on the identity flow, which has no weights."""
    options = dict(depth=[1, 1], blocks=[1, 1], width=[4, 4]) if preset == "mef_tiny" else {}
    settings = {**METHODS[name], "epochs": 1, "preset": preset, "flow_options": options, "modes_rank": 0}
    trainer = tiny_trainer(tmp_path / "run", toy_data(k=3), **settings)
    mu, s = trainer.model.gaussians.mu.clone(), trainer.model.gaussians.s.clone()
    weights = [p.clone() for p in trainer.model.flow.parameters()]
    gaussians = trainer.fit().gaussians
    assert (not torch.equal(gaussians.mu, mu), not torch.equal(gaussians.s, s)) == LEARNS.get(name, (True, True))
    after = list(trainer.model.flow.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(weights[-2:], after[-2:], strict=True))
    if name in ("flowgmm", "ib-inn"):
        assert torch.equal(gaussians.variance(), torch.ones_like(gaussians.s))  # identity covariance
    if name == "flowgmm":
        assert float(mu.detach().std()) == pytest.approx(1.0, abs=0.15)  # N(0, I)
    if name == "random":
        assert float(gaussians.s.std()) == pytest.approx(5.0, abs=0.75)
    assert trainer.m_done == (0 if trainer.config.joint or trainer.config.learn == "none" else 1)
    assert all(math.isfinite(v) for row in rows(tmp_path / "run") for v in row.values() if isinstance(v, float))
