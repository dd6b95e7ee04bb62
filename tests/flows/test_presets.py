"""Named sizes, their settings, and refused configs: a hostile config must not get memory or time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from glem_augment.checks import PRESET_NAMES
from glem_augment.flows import PRESETS, build_flow, create_flow, resolve_preset
from glem_augment.flows.build import check_spec

SMALL = dict(depth=[1, 2], blocks=[1, 1], width=[6, 8])


def test_the_types_name_every_preset() -> None:
    assert set(PRESET_NAMES) == set(PRESETS)


@pytest.mark.parametrize(("preset", "published"), [("mef_cifar", 37_683_752), ("mef_glem", 42_815_440)])
def test_parameter_counts_of_the_published_sizes(preset: str, published: int) -> None:
    with torch.device("meta"):
        flow = create_flow(preset, (3, 32, 32))
    assert sum(p.numel() for p in flow.parameters()) == pytest.approx(published, rel=0.01)


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


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"subnet": "resnet"}, r"subnet must be one of residual, bottleneck, got 'resnet'"),
    ({"activation": "gelu"}, "activation must be one of elu, relu, got 'gelu'"),
    ({"patch": 8}, "patch must be one of"),
    ({"patch": True}, "patch must be one of"),
    ({"patch": 4, "image_shape": [3, 8, 12]}, "levels and patch 4 needs height and width divisible by 8, got 8x12"),
    ({"depth": [256, 256], "blocks": [64, 64]}, "depth times blocks, summed over the levels, may be at most 2048"),
    ({"depth": [1] * 9}, "depth must be a list .*at most 8"),
    ({"width": [10**9, 8]}, "width must be a list of whole numbers"),
    ({"width": [6]}, "one entry per level"),
    ({"bound": True}, "bound must be a finite number, got 'True'"),
    ({"bound": math.nan}, "bound must be a finite number"),
    ({"bound": 8.5}, r"bound must lie in \(0, 8\], got 8.5"),
    ({"rank": 65}, "rank must be a whole number"),
    ({"rank": "3"}, "rank must be a whole number, got '3'"),
    ({"actnorm": "pixel"}, "actnorm must be 'element' or 'channel'"),
    ({"coupling": ["matexp"]}, "needs the coupling .*matexp.*import the module that registers it"),
    ({"coupling": "matex"}, "needs the coupling 'matex': import .* did you mean matexp"),
    ({"coupling": "affine"}, r"unknown settings \['rank'\]"),
    ({"image_shape": [3, 8192, 8]}, "image_shape must be"),
    ({"image_shape": [3, 6, 10]}, "divisible by 4, got 6x10; resize to 8x8"),
    ({"expansion": 10**9}, r"unknown settings \['expansion'\]"),
    ({"coupling": "identity"}, r"unknown settings \['activation', .*; known are \['coupling', 'image_shape'"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_hostile_specs_are_refused(change: dict[str, Any], message: str) -> None:
    spec = {**resolve_preset("mef_tiny", (3, 8, 8), **SMALL), **change}
    for refuse in (check_spec, build_flow):
        with pytest.raises(ValueError, match=message) as caught:
            refuse(spec)
        assert len(str(caught.value)) < 500


def test_unknown_names_and_options_say_what_there_is() -> None:
    for message, refused in (
        ("mef_tiny", lambda: create_flow("mef_huge", (3, 8, 8))),
        (r"no option \['deepness'\].*depth", lambda: create_flow("mef_tiny", (3, 8, 8), deepness=[1, 1])),
        (r"no option \['subnet'\]", lambda: create_flow("identity", (1, 8, 8), subnet="residual")),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
