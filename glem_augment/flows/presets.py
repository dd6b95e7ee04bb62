"""Named flow sizes."""

from __future__ import annotations

import math
from typing import Any

from glem_augment.checks import check_choice
from glem_augment.flows.build import DEFAULTS, build_flow, check_spec, is_flow
from glem_augment.flows.flow import Flow
from glem_augment.names import Preset
from glem_augment.parts import find, kinds, options

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
    # The best per CPU second of eleven (docs/what_was_tried.md).
    "glow_fast": dict(
        coupling="affine", depth=[8, 8], blocks=[1, 1], width=[64, 96], bound=2.0, subnet="bottleneck",
        activation="relu",
    ),
    # For latents of an autoencoder, which are small already: two levels, the first without a squeeze. The best for its
    # steps on average over the shapes in benchmarks/results/models.md.
    "latent": dict(
        coupling="affine", depth=[3, 3], blocks=[1, 1], width=[128, 128], bound=2.0, subnet="bottleneck",
        activation="relu", patch=1, whiten=None,
    ),
    "identity": dict(coupling="identity"),
}  # fmt: skip
# `whiten=None` whitens up to so many numbers. Beyond, two levels do better without (benchmarks/results/models.md).
_WHITEN_UP_TO = 512


def preset_names() -> tuple[str, ...]:
    """The presets, and the flows that are registered by a name."""
    return *PRESETS, *(kind for kind in kinds("flow") if kind not in PRESETS)


def resolve_preset(name: str, image_shape: tuple[int, int, int], **overrides: Any) -> dict[str, Any]:
    """The resolved settings of the flow that `create_flow` makes of these arguments. ValueError: see `create_flow`."""
    check_choice("preset", name, preset_names())
    spec: dict[str, Any] = {"preset": name, "image_shape": [int(v) for v in image_shape]}
    spec |= PRESETS.get(name, {"coupling": name})
    if is_flow(spec["coupling"]):
        spec |= options(find("flow", spec["coupling"]), "flow")
    else:
        before, coupling = options(find("coupling", spec["coupling"]), "coupling"), overrides.get("coupling")
        after = before if coupling is None or is_flow(coupling) else options(find("coupling", coupling), "coupling")
        for key in set(before) - set(after):
            spec.pop(key, None)
        for key, value in {**after, "actnorm": "element", **DEFAULTS}.items():
            spec.setdefault(key, value)
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


def create_flow(name: Preset | str, image_shape: tuple[int, int, int], **overrides: Any) -> Flow:
    """A new flow of a named size.

    Args:
        name: one of `PRESETS`, or a name from `register_flow`.
        image_shape: (C, H, W); any C, with H and W divisible by 2^levels (patch * 2^(levels - 1)).
        overrides: settings of the preset to change, e.g. `depth=[4, 4]`.

            - One number per level: `depth` (steps), `blocks` and `width` (of the subnets).
            - `coupling`: "matexp", "affine", or a name from `register_coupling`, and its options: `bound` of log-scales
              or of ||S||, and `rank` of wide couplings for "matexp".
            - `subnet`: "residual", "bottleneck". `activation`: "elu", "relu".
            - `actnorm`: "element", "channel".
            - `patch`: side of the pixel blocks that the first level makes channels, 1, 2 or 4; later levels: 2.

    Raises:
        ValueError: no such preset or option, a value out of range, or a size that the levels do not divide.

    >>> z, logdet = create_flow("glow_tiny", (3, 8, 8))(torch.zeros(2, 3, 8, 8))
    >>> z.shape, logdet.shape
    (torch.Size([2, 192]), torch.Size([2]))
    """
    return build_flow(resolve_preset(name, image_shape, **overrides))
