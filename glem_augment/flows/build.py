"""A flow made from its description, which may come from a stranger's file."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from glem_augment.flows.coupling import SETTINGS, WITHOUT_COUPLINGS, find_coupling
from glem_augment.flows.flow import Flow
from glem_augment.flows.layers import ActNorm, Mixing1x1
from glem_augment.flows.linear import FlatIdentity, WhitenedFlow
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.stationary import StationaryFlow
from glem_augment.flows.subnets import ACTIVATIONS, SUBNETS, Subnet

# Far above any use. The limits keep a hostile config from demanding absurd amounts of memory or time.
_LARGEST = {"depth": 256, "blocks": 64, "width": 4096, "levels": 8, "side": 4096, "total": 2048}
_PATCHES = (1, 2, 4)
# A saved flow may lack these keys.
DEFAULTS = {"subnet": "residual", "activation": "elu", "patch": 2}
_KEYS_OF_ALL = {"preset", "image_shape", "coupling", "whiten"}


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether `value` is an int, and no bool, from `least` to `most`."""
    return type(value) is int and least <= value <= most


def check_spec(spec: dict[str, Any]) -> None:
    """Raise ValueError, naming the value, where `spec` does not describe a flow that can be built."""

    def require(good: bool, demand: str, value: Any) -> None:
        if not good:
            raise ValueError(f"{demand}, got {str(value)[:80]!r}")

    coupling: Any = spec.get("coupling")
    kind = None if coupling in WITHOUT_COUPLINGS else find_coupling(coupling)
    known = _KEYS_OF_ALL | ({"module"} if coupling == "custom" else set())
    if kind is not None:
        known = _KEYS_OF_ALL | SETTINGS | set(kind.options)
    unknown = sorted(str(key)[:40] for key in set(spec) - known)
    if unknown:
        raise ValueError(f"the flow has unknown settings {unknown[:5]}; known are {sorted(known)}")
    shape: Any = spec.get("image_shape")
    side = _LARGEST["side"]
    good = isinstance(shape, list | tuple) and len(shape) == 3 and all(is_whole(v, 1, side) for v in shape)
    require(good, f"image_shape must be (channels, height, width), each 1 to {side}", shape)
    whiten = spec.get("whiten", 0)
    require(is_whole(whiten, 0, math.prod(shape)), f"whiten must be from 0 to {math.prod(shape)} directions", whiten)
    if kind is None:
        return
    lists: dict[str, Any] = {key: spec.get(key) for key in ("depth", "blocks", "width")}
    for key, value in lists.items():
        most, good = _LARGEST[key], isinstance(value, list | tuple) and 1 <= len(value) <= _LARGEST["levels"]
        good = good and all(is_whole(v, 1, most) for v in value)
        levels = f"one per level (at most {_LARGEST['levels']})"
        require(good, f"{key} must be a list of whole numbers from 1 to {most}, {levels}", value)
    require(len({len(v) for v in lists.values()}) == 1, "depth, blocks and width must have one entry per level", lists)
    total = sum(depth * blocks for depth, blocks in zip(lists["depth"], lists["blocks"], strict=True))
    limit = _LARGEST["total"]
    require(total <= limit, f"depth times blocks, summed over the levels, may be at most {limit}", total)
    patch = spec.get("patch", DEFAULTS["patch"])
    require(type(patch) is int and patch in _PATCHES, f"patch must be one of {_PATCHES}", patch)
    count, (channels, height, width) = len(lists["depth"]), spec["image_shape"]
    require(patch * channels % 2 == 0, "without a squeeze (patch 1) the number of channels must be even", channels)
    factor = patch * 2 ** (count - 1)
    if height % factor or width % factor:
        near = [max(1, round(v / factor)) * factor for v in (height, width)]
        raise ValueError(
            f"a flow of {count} levels{'' if patch == 2 else f' and patch {patch}'} needs height and width divisible "
            f"by {factor}, got {height}x{width}; resize to {near[0]}x{near[1]}, or use fewer levels"
        )
    actnorm = spec.get("actnorm")
    require(actnorm in ("element", "channel"), "actnorm must be 'element' or 'channel'", actnorm)
    kind.check({**kind.options, **spec})
    for key, choices in (("subnet", SUBNETS), ("activation", tuple(ACTIVATIONS))):
        value = spec.get(key, DEFAULTS[key])
        require(value in choices, f"{key} must be one of {', '.join(choices)}", value)


def build_flow(spec: dict[str, Any]) -> Flow:
    """Build the flow that `spec` (see `resolve_preset`) describes. Raises ValueError where it cannot be."""
    check_spec(spec)
    if spec.get("whiten"):
        return WhitenedFlow(build_flow({**spec, "whiten": 0}), spec["whiten"])
    channels, height, width = image_shape = tuple(spec["image_shape"])
    if spec["coupling"] == "identity":
        return FlatIdentity(image_shape)
    if spec["coupling"] == "stationary":
        return StationaryFlow(image_shape)
    if spec["coupling"] == "custom":
        raise ValueError(f"its flow is the user's class {str(spec.get('module'))[:80]}; pass an instance as module=")
    full = {**DEFAULTS, **spec}
    kind: Any = find_coupling(spec["coupling"])
    options = {key: spec.get(key, default) for key, default in kind.options.items()}
    levels, side = [], full["patch"]
    for depth, blocks, net_width in zip(spec["depth"], spec["blocks"], spec["width"], strict=True):
        channels, height, width = side * side * channels, height // side, width // side
        side = 2
        net = dict(width=net_width, blocks=blocks, activation=full["activation"])
        norm = partial(ActNorm, channels, height, width, spec["actnorm"])
        coupling = partial(kind, channels, partial(Subnet, full["subnet"], **net), **options)
        levels.append([(norm(), Mixing1x1(channels), coupling()) for _ in range(depth)])
        channels //= 2
    return MultiscaleFlow(image_shape, levels, full["patch"])
