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
    ("bad", "words"),
    [
        (dict(objective="gan"), "objective.*'gan'"),
        (dict(objective="mle", beta=0.1), "mle.*beta"),
        (dict(augment=("cutmix",)), "cutmix"),
        (dict(lr=0), "lr"),
        (dict(bits=9), "bits"),
        (dict(flow_options=[1]), "flow_options"),
        (dict(lr="fast"), "lr.*'fast'"),
        (dict(latent_noise=0.1), "latent_noise"),  # without an autoencoder
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
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
    assert check_setting("seed", "9007199254740993") == 2**53 + 1  # a float would round it
    assert check_setting("augment", "none") == () and len(check_setting("augment", "paper")) == 4
