"""Named flow sizes, and how a flow is built from its numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from glem_augment.checks import Preset, check_choice
from glem_augment.flows.coupling import COUPLINGS, WITHOUT_COUPLINGS, find_coupling
from glem_augment.flows.layers import ActNorm, FlatIdentity, Flow, Mixing1x1, WhitenedFlow
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.stationary import StationaryFlow
from glem_augment.flows.subnets import ACTIVATIONS, CONV_SUBNETS, SUBNETS, Subnet

# depth, blocks and width hold one number per level.
PRESETS: dict[str, dict[str, Any]] = {
    # A CPU trains it in an hour or two at 28x28; two levels, so that 28x28 divides.
    "mef_tiny": dict(coupling="matexp", depth=[8, 8], blocks=[1, 1], width=[48, 64], bound=2.0),
    "mef_small": dict(coupling="matexp", depth=[8, 6, 4], blocks=[2, 2, 2], width=[64, 96, 96], bound=2.0),
    # The configuration published for 32x32 images: 37.68 M parameters (Xiao & Liu 2020).
    "mef_cifar": dict(coupling="matexp", depth=[8, 4, 2], blocks=[8, 8, 8], width=[128, 128, 128], bound=1.0),
    # The GLEM authors' later configuration: 42.8 M parameters.
    "mef_glem": dict(coupling="matexp", depth=[8, 8, 8], blocks=[8, 4, 2], width=[128, 128, 128], bound=1.0),
    "glow_tiny": dict(coupling="affine", depth=[8, 8], blocks=[1, 1], width=[48, 64], bound=2.0, actnorm="channel"),
    # The best per CPU second in benchmarks/results/backbones.md.
    "glow_fast": dict(
        coupling="affine",
        depth=[8, 8],
        blocks=[1, 1],
        width=[64, 96],
        bound=2.0,
        subnet="bottleneck",
        activation="relu",
    ),
    # For latents of an autoencoder, which are small already: two levels, the first without a squeeze. The best for its
    # steps on average over the shapes in benchmarks/results/latent_flows.md.
    "latent": dict(
        coupling="affine",
        depth=[3, 3],
        blocks=[1, 1],
        width=[128, 128],
        bound=2.0,
        subnet="bottleneck",
        activation="relu",
        patch=1,
        whiten=None,
    ),
    "identity": dict(coupling="identity"),
    # Public coordinates of private sets.
    "stationary": dict(coupling="stationary"),
}
# `whiten=None` whitens up to so many numbers. Beyond, two levels do better without (latent_flows.md).
_WHITEN_UP_TO = 512
# Far above any use. The limits keep a hostile config from demanding absurd amounts of memory or time.
_LARGEST = {"depth": 256, "blocks": 64, "width": 4096, "levels": 8, "side": 4096, "total": 2048}
_PATCHES, _MOST_TOKENS = (1, 2, 4), 128 * 128
# A saved flow may lack these keys.
_DEFAULTS = {"subnet": "residual", "activation": "elu", "patch": 2}
_KEYS_OF_ALL = {"preset", "image_shape", "coupling", "whiten"}
_KEYS = {*_KEYS_OF_ALL, "depth", "blocks", "width", "actnorm", *_DEFAULTS}


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether `value` is an int, and no bool, from `least` to `most`."""
    return type(value) is int and least <= value <= most


def resolve_preset(name: str, image_shape: tuple[int, int, int], **overrides: Any) -> dict[str, Any]:
    """The resolved settings of the flow that `create_flow` makes of these arguments. ValueError: see `create_flow`."""
    check_choice("preset", name, tuple(PRESETS))
    spec: dict[str, Any] = {"preset": name, "image_shape": [int(v) for v in image_shape], **PRESETS[name]}
    if spec["coupling"] not in WITHOUT_COUPLINGS:
        before, coupling = COUPLINGS[spec["coupling"]], overrides.get("coupling", spec["coupling"])
        after = before if coupling in WITHOUT_COUPLINGS else find_coupling(coupling)
        for key in set(before.options) - set(after.options):
            spec.pop(key, None)
        for key, value in {**after.options, "actnorm": "element", **_DEFAULTS}.items():
            spec.setdefault(key, value)
    if overrides.get("subnet") == "transformer":  # It always has GELU.
        spec.pop("activation", None)
    unknown = set(overrides) - set(spec) - {"whiten"}
    if unknown:
        allowed = sorted((set(spec) | {"whiten"}) - {"preset", "image_shape"})
        raise ValueError(f"preset {name!r} has no option {sorted(unknown)}; it has {allowed}")
    spec.update(overrides)
    if "whiten" in spec and spec["whiten"] is None:
        dim = math.prod(spec["image_shape"])
        spec["whiten"] = dim if dim <= _WHITEN_UP_TO else 0
    check_spec(spec)
    return spec


def check_spec(spec: dict[str, Any]) -> None:
    """Raise ValueError, naming the value, where `spec` does not describe a flow that can be built."""

    def require(good: bool, demand: str, value: Any) -> None:
        if not good:
            raise ValueError(f"{demand}, got {str(value)[:80]!r}")

    coupling: Any = spec.get("coupling")
    kind = None if coupling in WITHOUT_COUPLINGS else find_coupling(coupling)
    known = _KEYS_OF_ALL | ({"module"} if coupling == "custom" else set())
    if kind is not None:
        known = _KEYS | set(kind.options)
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
    patch = spec.get("patch", _DEFAULTS["patch"])
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
    tokens = (height // patch) * (width // patch)
    if spec.get("subnet") == "transformer" and tokens > _MOST_TOKENS:
        raise ValueError(
            f"a transformer would attend to {tokens} pixels or patches, at most {_MOST_TOKENS} are allowed; raise "
            f"patch, or choose another subnet ({', '.join(CONV_SUBNETS)})"
        )
    actnorm = spec.get("actnorm")
    require(actnorm in ("element", "channel"), "actnorm must be 'element' or 'channel'", actnorm)
    kind.check({**kind.options, **spec})
    for key, choices in (("subnet", SUBNETS), ("activation", tuple(ACTIVATIONS))):
        value = spec.get(key, _DEFAULTS[key])
        require(value in choices, f"{key} must be one of {', '.join(choices)}", value)
    given = spec.get("activation") if spec.get("subnet") == "transformer" else None
    require(given is None, "the transformer always has GELU: leave activation out", given)


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
    full = {**_DEFAULTS, **spec}
    kind: Any = find_coupling(spec["coupling"])
    options = {key: spec.get(key, default) for key, default in kind.options.items()}
    levels, side = [], full["patch"]
    for depth, blocks, net_width in zip(spec["depth"], spec["blocks"], spec["width"], strict=True):
        channels, height, width = side * side * channels, height // side, width // side
        side = 2
        net = dict(width=net_width, blocks=blocks, size=(height, width), activation=full["activation"])
        norm = partial(ActNorm, channels, height, width, spec["actnorm"])
        coupling = partial(kind, channels, partial(Subnet, full["subnet"], **net), **options)
        levels.append([(norm(), Mixing1x1(channels), coupling()) for _ in range(depth)])
        channels //= 2
    return MultiscaleFlow(image_shape, levels, full["patch"])


def create_flow(name: Preset, image_shape: tuple[int, int, int], **overrides: Any) -> Flow:
    """A new flow of a named size.

    Args:
        name: one of `PRESETS`.
        image_shape: (C, H, W); any C, with H and W divisible by 2^levels (patch * 2^(levels - 1)).
        overrides: settings of the preset to change, e.g. `depth=[4, 4]`.

            - One number per level: `depth` (steps), `blocks` and `width` (of the subnets).
            - `coupling`: "matexp", "affine", or a name from `register_coupling`, and its options: `bound` of log-scales
              or of ||S||, and `rank` of wide couplings for "matexp".
            - `subnet`: "residual", "bottleneck", "transformer". `activation`, but for transformers: "elu", "relu".
            - `actnorm`: "element", "channel".
            - `patch`: side of the pixel blocks that the first level makes channels, 1, 2 or 4; later levels: 2.

    Raises:
        ValueError: no such preset or option, a value out of range, or a size that the levels do not divide.

    >>> z, logdet = create_flow("glow_tiny", (3, 8, 8))(torch.zeros(2, 3, 8, 8))
    >>> z.shape, logdet.shape
    (torch.Size([2, 192]), torch.Size([2]))
    """
    return build_flow(resolve_preset(name, image_shape, **overrides))
