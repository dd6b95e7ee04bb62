"""Named sizes, their settings, and refused configs: a hostile config must not get memory or time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from glem_augment.flows import build_flow, create_flow, resolve_preset
from glem_augment.flows.build import check_spec

SMALL = dict(depth=[1, 2], blocks=[1, 1], width=[6, 8])


def test_the_parameters_of_the_published_size() -> None:
    with torch.device("meta"):
        flow = create_flow("mef_cifar", (3, 32, 32))
    assert sum(p.numel() for p in flow.parameters()) == pytest.approx(37_683_752, rel=0.01)


def test_specs_name_the_subnet_and_older_ones_mean_the_published_one() -> None:
    spec = resolve_preset("mef_tiny", (1, 8, 8), **SMALL)
    assert (spec["subnet"], spec["activation"], spec["patch"]) == ("residual", "elu", 2)
    assert set(resolve_preset("identity", (1, 8, 8))) == {"preset", "image_shape", "coupling"}
    assert [resolve_preset("latent", (32, side, side))["whiten"] for side in (4, 8)] == [512, 0]
    older = {key: value for key, value in spec.items() if key not in ("subnet", "activation", "patch")}
    flow, x = build_flow(spec), torch.rand(4, 1, 8, 8)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    before = build_flow(older)
    before.load_state_dict(flow.state_dict())
    assert torch.equal(before(x)[0], flow(x)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"subnet": "resnet"}, {"patch": True}, {"patch": 4, "image_shape": [3, 8, 12]},
        {"depth": [256, 256], "blocks": [64, 64]}, {"depth": [1] * 9}, {"width": [10**9, 8]}, {"width": [6]},
        {"bound": math.nan}, {"bound": 8.5}, {"rank": 65}, {"rank": "3"}, {"coupling": ["matexp"]},
        {"image_shape": [3, 8192, 8]}, {"image_shape": [8, 8]}, {"whiten": 193}, {"expansion": 10**9},
    ],
)  # fmt: skip
def test_hostile_specs_are_refused_by_the_name_of_the_setting(change: dict[str, Any]) -> None:
    spec = {**resolve_preset("mef_tiny", (3, 8, 8), **SMALL), **change}
    name = "height" if change.get("image_shape", [])[1:] in ([8, 12], [6, 10]) else next(iter(change))
    with pytest.raises(ValueError, match=name) as caught:
        check_spec(spec)
    assert len(str(caught.value)) < 500


def test_unknown_names_and_options_say_what_there_is() -> None:
    for message, refused in (
        ("mef_tiny", lambda: create_flow("mef_huge", (3, 8, 8))),
        ("deepness.*depth", lambda: create_flow("mef_tiny", (3, 8, 8), deepness=[1, 1])),
        ("subnet", lambda: create_flow("identity", (1, 8, 8), subnet="residual")),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
