"""A flow made from its description, which may come from a stranger's file."""

from __future__ import annotations

import inspect
import itertools
import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from glem_augment.flows.flow import Flow
from glem_augment.flows.layers import ActNorm, Mixing1x1
from glem_augment.flows.linear import WhitenedFlow
from glem_augment.flows.multiscale import Level, MultiscaleFlow
from glem_augment.flows.subnets import ACTIVATIONS, SUBNETS, Subnet
from glem_augment.parts import CUSTOM, check_options, find, kind_of, kinds, options, recorded

# Far above any use. The limits keep a hostile config from demanding absurd amounts of memory or time.
_LARGEST = {"image_shape": 4096, "depth": 256, "blocks": 64, "width": 4096}
_MOST_LEVELS, _MOST_BLOCKS = 8, 2048
_CHOICES: dict[str, tuple[int | str, ...]] = {
    "patch": (1, 2, 4), "actnorm": ("element", "channel"), "subnet": SUBNETS, "activation": tuple(ACTIVATIONS),
}  # fmt: skip
# A saved flow may lack these keys.
DEFAULTS = {"subnet": "residual", "activation": "elu", "patch": 2}


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether `value` is an int, and no bool, from `least` to `most`."""
    return type(value) is int and least <= value <= most


def is_flow(coupling: object) -> bool:
    """Whether what a config calls `coupling` is a whole flow, not a coupling in a multi-scale flow."""
    return isinstance(coupling, str) and (coupling == CUSTOM or coupling in kinds("flow"))


def check_spec(spec: dict[str, Any]) -> None:
    """Raise ValueError, naming the value, where `spec` does not describe a flow that can be built."""
    coupling: Any = spec.get("coupling")
    room = "flow" if is_flow(coupling) else "coupling"
    kind: Any = None if coupling == CUSTOM else find(room, coupling)
    lists = ["image_shape"] if room == "flow" else list(_LARGEST)
    extra = {"module"} if kind is None else set(options(kind, room))
    known = {"preset", "coupling", "whiten", *lists, *extra, *(() if room == "flow" else _CHOICES)}
    _require(known.issuperset(spec), f"the flow has unknown settings; known are {sorted(known)}", sorted(spec))
    if kind is not None:
        check_options(kind, room, {name: spec[name] for name in extra & set(spec)})
    for key in lists:
        value, most = spec.get(key), _LARGEST[key]
        good = isinstance(value, list | tuple) and 1 <= len(value) <= _MOST_LEVELS
        good = good and all(is_whole(v, 1, most) for v in value)  # type: ignore[union-attr]
        _require(good, f"{key} must be a list of whole numbers from 1 to {most}", value)
    shape, whiten = spec["image_shape"], spec.get("whiten", 0)
    _require(len(shape) == 3, "image_shape must be (channels, height, width)", shape)
    _require(is_whole(whiten, 0, math.prod(shape)), f"whiten must be from 0 to {math.prod(shape)} directions", whiten)
    if room == "coupling":
        full = {**DEFAULTS, **options(kind, room), **spec}
        _check_levels(full)
        kind.check(full)


def _check_levels(spec: dict[str, Any]) -> None:
    """ValueError: levels that can't be built, or do not divide the images; `spec` has all settings."""
    levels = {len(spec[key]) for key in ("depth", "blocks", "width")}
    _require(len(levels) == 1, "depth, blocks and width must have one entry per level", levels)
    total = sum(depth * blocks for depth, blocks in zip(spec["depth"], spec["blocks"], strict=True))
    _require(total <= _MOST_BLOCKS, f"depth times blocks, over all levels, may be at most {_MOST_BLOCKS}", total)
    for key, choices in _CHOICES.items():
        value = spec.get(key)
        good = type(value) is type(choices[0]) and value in choices
        _require(good, f"{key} must be one of {', '.join(map(str, choices))}", value)
    patch, (channels, height, width) = spec["patch"], spec["image_shape"]
    _require(patch * channels % 2 == 0, "without a squeeze (patch 1) the number of channels must be even", channels)
    factor = patch * 2 ** (len(spec["depth"]) - 1)
    if height % factor or width % factor:
        near = [max(1, round(v / factor)) * factor for v in (height, width)]
        raise ValueError(
            f"a flow of {len(spec['depth'])} levels with patch {patch} needs height and width divisible by {factor}, "
            f"got {height}x{width}; resize to {near[0]}x{near[1]}, or use fewer levels"
        )


def _require(good: bool, demand: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{demand}, got {str(value)[:80]!r}")


def flow_facts(flow: Flow, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The description of a user's flow: its registered name and its options, or "custom" and its class."""
    about: dict[str, Any] = {"image_shape": [int(side) for side in image_shape]}
    if (kind := kind_of("flow", flow)) is None:
        return {**about, "coupling": CUSTOM, "module": type(flow).__qualname__}
    return {"preset": kind, **about, "coupling": kind, **recorded(flow)}


def flow_class(spec: dict[str, Any]) -> type[Flow] | None:
    """The class of the flow that a description means; None: a user's class."""
    if spec["coupling"] == CUSTOM:
        return None
    if spec.get("whiten"):
        return WhitenedFlow
    return kinds("flow").get(spec["coupling"], MultiscaleFlow)


def build_flow(spec: dict[str, Any]) -> Flow:
    """The flow of a description that `check_spec` accepts. ValueError: it is the user's class."""
    if spec.get("whiten"):
        return WhitenedFlow(build_flow({**spec, "whiten": 0}), spec["whiten"])
    channels, height, width = image_shape = tuple(spec["image_shape"])
    if spec["coupling"] == CUSTOM:
        raise ValueError(f"its flow is the user's class {str(spec.get('module'))[:80]}; pass an instance as module=")
    room = "flow" if is_flow(spec["coupling"]) else "coupling"
    kind: Any = find(room, spec["coupling"])
    given = {key: spec.get(key, default) for key, default in options(kind, room).items()}
    if room == "flow":
        # A user's constructor may compute with its tensors, so they are not on the meta device.
        with nullcontext() if kind.__module__.startswith(__package__) else torch.device("cpu"):
            return kind(image_shape, **given)
    full = {**DEFAULTS, **spec}
    levels, side, numbers, names = [], full["patch"], itertools.count(), inspect.signature(kind.__init__).parameters
    for depth, blocks, net_width in zip(spec["depth"], spec["blocks"], spec["width"], strict=True):
        channels, height, width = side * side * channels, height // side, width // side
        net = dict(width=net_width, blocks=blocks, activation=full["activation"])
        norm = partial(ActNorm, channels, height, width, spec["actnorm"])
        about = dict(channels=channels, subnet=partial(Subnet, full["subnet"], **net), shape=(channels, height, width))
        steps = []
        for _ in range(depth):
            known = {**about, "index": next(numbers)}
            taken = {name: value for name, value in known.items() if name in names}
            steps.append((norm(), Mixing1x1(channels), kind(**taken, **given)))
        levels.append(Level(steps, (channels, height, width), side))
        channels, side = channels // 2, 2  # half of the channels leave
    return MultiscaleFlow(image_shape, levels)
