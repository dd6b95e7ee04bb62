"""Settings are checked by name, survive JSON and become options."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from glem_augment.cli.train import add_settings, given
from glem_augment.training import TrainConfig
from glem_augment.training.config import SETTINGS, check_setting

# ---- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(objective="gan"), "objective must be one of 'hybrid', 'mle', 'glem'"),
        (dict(objective="mle", beta=0.1), "mle.*use 'hybrid'"),
        (dict(augment=("cutmix",)), "cutmix"),
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(lr=0), "lr must be finite and above 0"),
        (dict(bits=9), "bits must be at most 8"),
        (dict(flow_options=[1]), "flow_options must be a table"),
        (dict(lr="fast"), "lr must be a number, got 'fast'"),
        (dict(epoch=3), "epoch"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**bad)


def test_defaults_follow_the_objective() -> None:
    assert TrainConfig() == TrainConfig(objective="hybrid", preset="glow_fast", beta=0.3)
    assert all(TrainConfig(objective=name).beta == 0 for name in ("mle", "glem"))
    assert TrainConfig(**TrainConfig(objective="glem").to_dict()) == TrainConfig(objective="glem")  # a checkpoint's


# ---- the command line ------------------------------------------------------------------------------------------------


def test_every_setting_is_an_option_and_a_line_of_a_file() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=dict)
    add_settings(parser)
    words = {
        "flow_options": (["--flow", "depth=[1,2]", "--flow", "rank=2"], {"depth": [1, 2], "rank": 2}),
        "augment": (["--augment", "flip, crop"], ("flip", "crop")),
        "autoencoder": (["--autoencoder", "taef2"], "taef2"),
    }  # fmt: skip
    for name, about in SETTINGS.items():
        kind = about["kind"]
        most = min(about.get("high", 1), 4096)
        argv, wanted = words.get(name, ([f"--{name.replace('_', '-')}", str(most)], most))
        if isinstance(kind, tuple):
            argv, wanted = [argv[0], kind[-1]], kind[-1]
        found = given(parser.parse_args(argv))
        assert list(found) == [name] and check_setting(name, found[name]) == wanted, name
        assert check_setting(name, list(wanted) if isinstance(wanted, tuple) else wanted) == wanted
    assert check_setting("augment", "none") == () and len(check_setting("augment", "paper")) == 4
