"""Named flow sizes, and how a flow is built from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from glem_augment.checks import Preset
from glem_augment.flows.coupling import AffineCoupling, Coupling, MatExpCoupling
from glem_augment.flows.jet import JetFlow
from glem_augment.flows.layers import ActNorm, FlatIdentity, Flow, Mixing1x1
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.subnets import ACTIVATIONS, CONV_SUBNETS, SUBNETS, Subnet

# depth, blocks and width hold one number per level.
PRESETS: dict[str, dict[str, Any]] = {
    # A CPU trains it in an hour or two at 28x28; two levels, so that 28x28 divides.
    "mef_tiny": dict(coupling="matexp", depth=[8, 8], blocks=[1, 1], width=[48, 64], actnorm="element", bound=2.0),
    "mef_small": dict(
        coupling="matexp", depth=[8, 6, 4], blocks=[2, 2, 2], width=[64, 96, 96], actnorm="element", bound=2.0
    ),
    # The configuration published for 32x32 images: 37.68 M parameters (Xiao & Liu 2020).
    "mef_cifar": dict(
        coupling="matexp", depth=[8, 4, 2], blocks=[8, 8, 8], width=[128, 128, 128], actnorm="element", bound=1.0
    ),
    # The GLEM authors' later configuration: 42.8 M parameters.
    "mef_glem": dict(
        coupling="matexp", depth=[8, 8, 8], blocks=[8, 4, 2], width=[128, 128, 128], actnorm="element", bound=1.0
    ),
    "glow_tiny": dict(coupling="affine", depth=[8, 8], blocks=[1, 1], width=[48, 64], actnorm="channel", bound=2.0),
    # The best per CPU second of those in benchmarks/results/backbones.md.
    "glow_fast": dict(
        coupling="affine",
        depth=[8, 8],
        blocks=[1, 1],
        width=[64, 96],
        actnorm="element",
        bound=2.0,
        subnet="bottleneck",
        activation="relu",
    ),  # fmt: skip
    # Patches and transformers; a CPU trains it at 32x32.
    "jet_tiny": dict(coupling="jet", depth=[10], blocks=[1], width=[128], heads=4, patch=4),
    # The configuration published for ImageNet at 64x64: 207 M parameters (Kolesnikov et al. 2024).
    "jet_imagenet64": dict(coupling="jet", depth=[32], blocks=[2], width=[512], heads=8, patch=4),
    "identity": dict(coupling="identity"),
}
# Far above any use; a hostile config must not be able to ask for absurd amounts of memory or time.
_LARGEST = {"depth": 256, "blocks": 64, "width": 4096, "levels": 8, "side": 4096, "rank": 64, "total": 2048}
_PATCHES, _MOST_TOKENS = (2, 4, 6, 8), 128 * 128  # even: every level then has an even number of channels
_COUPLINGS = ("matexp", "affine", "jet", "identity", "custom")
# What a flow saved before these keys existed was made with.
_DEFAULTS = {"subnet": "residual", "activation": "elu", "patch": 2}
_KEYS = {
    "preset", "image_shape", "coupling", "depth", "blocks", "width", "actnorm", "bound", "rank", "heads", "module",
    *_DEFAULTS,
}  # fmt: skip


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # a bool is no number here


def resolve_preset(name: str, image_shape: tuple[int, int, int], **overrides: Any) -> dict[str, Any]:
    """The numbers of preset `name` for images of `image_shape` (C, H, W), with `overrides` applied.

    Raises:
        ValueError: unknown preset or option, lists of unequal length, or a height or width that the levels cannot
            divide; the message names the sizes that would work.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    spec: dict[str, Any] = {"preset": name, "image_shape": [int(v) for v in image_shape], **PRESETS[name]}
    if spec["coupling"] == "matexp":
        spec.setdefault("rank", 3)
    if spec["coupling"] in ("matexp", "affine"):
        for key, value in _DEFAULTS.items():
            spec.setdefault(key, value)
    if overrides.get("subnet") == "transformer":  # It always has GELU.
        spec.pop("activation", None)
    unknown = set(overrides) - set(spec)
    if unknown:
        allowed = sorted(set(spec) - {"preset", "image_shape"})
        raise ValueError(f"preset {name!r} has no option {sorted(unknown)}; it has {allowed}")
    spec.update(overrides)
    check_spec(spec)
    return spec


def check_spec(spec: dict[str, Any]) -> None:
    """Raise ValueError, naming the value, where `spec` does not describe a flow that can be built."""
    unknown = sorted(str(key)[:40] for key in set(spec) - _KEYS)
    if unknown:
        raise ValueError(f"the flow has unknown settings {unknown[:5]}; this version knows {sorted(_KEYS)}")
    shape = spec.get("image_shape")
    if not (
        isinstance(shape, list | tuple) and len(shape) == 3 and all(_is_whole(v, 1, _LARGEST["side"]) for v in shape)
    ):
        raise ValueError(
            f"image_shape must be (channels, height, width), each 1 to {_LARGEST['side']}, got {str(shape)[:80]}"
        )
    if spec.get("coupling") not in _COUPLINGS:
        raise ValueError(f"coupling must be one of {_COUPLINGS}, got {str(spec.get('coupling'))[:80]!r}")
    if spec["coupling"] in ("identity", "custom"):
        return
    lists: dict[str, Any] = {key: spec.get(key) for key in ("depth", "blocks", "width")}
    for key, value in lists.items():
        good = isinstance(value, list | tuple) and value and all(_is_whole(v, 1, _LARGEST[key]) for v in value)
        if not good or len(value) > _LARGEST["levels"]:
            raise ValueError(
                f"{key} must be a list of whole numbers from 1 to {_LARGEST[key]}, one per level (at most "
                f"{_LARGEST['levels']}), got {str(value)[:80]}"
            )
    if len({len(v) for v in lists.values()}) != 1:
        raise ValueError(f"depth, blocks and width must have one entry per level each, got {lists}")
    total = sum(depth * blocks for depth, blocks in zip(lists["depth"], lists["blocks"], strict=True))
    if total > _LARGEST["total"]:
        raise ValueError(f"depth times blocks, summed over the levels, may be at most {_LARGEST['total']}, got {total}")
    patch = spec.get("patch", _DEFAULTS["patch"])
    if type(patch) is not int or patch not in _PATCHES:
        raise ValueError(f"patch must be one of {_PATCHES}, got {str(patch)[:80]!r}")
    levels, (_, height, width) = len(lists["depth"]), shape
    if spec["coupling"] == "jet" and levels != 1:
        raise ValueError(f"a Jet has no levels: depth, blocks and width hold one number each, got {lists}")
    # Halves of a Jet's tokens are equal where rows and columns of patches are even.
    factor = patch * 2 ** (1 if spec["coupling"] == "jet" else levels - 1)
    if height % factor or width % factor:
        near = [max(1, round(v / factor)) * factor for v in (height, width)]
        raise ValueError(
            f"a flow of {levels} levels{'' if patch == 2 else f' and patch {patch}'} needs height and width divisible "
            f"by {factor}, got {height}x{width}; resize to {near[0]}x{near[1]}, or use fewer levels"
        )
    tokens = (height // patch) * (width // patch)
    if (spec["coupling"] == "jet" or spec.get("subnet") == "transformer") and tokens > _MOST_TOKENS:
        raise ValueError(
            f"a transformer would attend to {tokens} pixels or patches, at most {_MOST_TOKENS} are allowed; raise "
            f"patch, or choose another subnet ({', '.join(CONV_SUBNETS)})"
        )
    if spec["coupling"] == "jet":
        heads = spec.get("heads")
        if not _is_whole(heads, 1, lists["width"][0]) or lists["width"][0] % heads:
            raise ValueError(f"heads must divide the width {lists['width'][0]}, got {str(heads)[:80]!r}")
        return
    if spec.get("actnorm") not in ("element", "channel"):
        raise ValueError(f"actnorm must be 'element' or 'channel', got {str(spec.get('actnorm'))[:80]!r}")
    bound = spec.get("bound")
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound <= 8:
        raise ValueError(f"bound must lie in (0, 8], got {str(bound)[:80]!r}")
    if not _is_whole(spec.get("rank", 3), 1, _LARGEST["rank"]):
        raise ValueError(f"rank must be a whole number from 1 to {_LARGEST['rank']}, got {str(spec['rank'])[:80]!r}")
    _check_subnet(spec)


def _check_subnet(spec: dict[str, Any]) -> None:
    kind = spec.get("subnet", _DEFAULTS["subnet"])
    if kind not in SUBNETS:
        raise ValueError(f"subnet must be one of {', '.join(SUBNETS)}, got {str(kind)[:80]!r}")
    if spec.get("activation", _DEFAULTS["activation"]) not in list(ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {str(spec['activation'])[:80]!r}")


def build_flow(spec: dict[str, Any]) -> Flow:
    """Build the flow that `spec` (see `resolve_preset`) describes. Raises ValueError where it cannot be."""
    check_spec(spec)
    channels, height, width = image_shape = tuple(spec["image_shape"])
    if spec["coupling"] == "identity":
        return FlatIdentity(image_shape)
    if spec["coupling"] == "custom":
        raise ValueError(f"its flow is a module of the user's ({str(spec.get('module'))[:80]}); pass it as module=")
    if spec["coupling"] == "jet":
        (depth,), (blocks,), (net_width,) = (spec[key] for key in ("depth", "blocks", "width"))
        return JetFlow(image_shape, depth, net_width, blocks, spec["heads"], spec["patch"])
    full = {**_DEFAULTS, **spec}
    patch = side = full["patch"]
    levels = []
    for depth, blocks, net_width in zip(spec["depth"], spec["blocks"], spec["width"], strict=True):
        channels, height, width = side * side * channels, height // side, width // side
        side = 2
        net = dict(width=net_width, blocks=blocks, size=(height, width), activation=full["activation"])
        subnet = partial(Subnet, full["subnet"], **net)
        norm = partial(ActNorm, channels, height, width, spec["actnorm"])
        coupling: Callable[[], Coupling] = partial(MatExpCoupling, channels, subnet, spec["bound"], spec.get("rank", 3))
        if spec["coupling"] == "affine":
            coupling = partial(AffineCoupling, channels, subnet, spec["bound"])
        levels.append([(norm(), Mixing1x1(channels), coupling()) for _ in range(depth)])
        channels //= 2
    return MultiscaleFlow(image_shape, levels, patch)


def create_flow(name: Preset, image_shape: tuple[int, int, int], **overrides: Any) -> Flow:
    """A new flow of a named size.

    Args:
        name: one of `PRESETS`.
        image_shape: (C, H, W); any C, with H and W divisible by 2^levels (patch * 2^(levels - 1)).
        overrides: settings of the preset to change, e.g. `depth=[4, 4]`: `coupling` ("matexp", "affine"),
            `depth` (steps), `blocks` and `width` (of the subnets), one number per level each, `actnorm`
            ("element", "channel"), `bound` (of a coupling's log-scales), `rank` (of wide couplings, for `mef_*`
            alone), `subnet` ("residual", "bottleneck", "depthwise", "transformer"), `activation` of the first
            three ("elu", "silu", "relu", "gelu"), `patch` (side of the pixel blocks that the first level makes
            channels; later levels: 2).

    Raises:
        ValueError: no such preset or option, a value out of range, or a size that the levels do not divide.

    >>> z, logdet = create_flow("glow_tiny", (3, 8, 8))(torch.zeros(2, 3, 8, 8))
    >>> z.shape, logdet.shape
    (torch.Size([2, 192]), torch.Size([2]))
    """
    return build_flow(resolve_preset(name, image_shape, **overrides))
