"""The flows that ``backbones.py`` compares, the recipe they share, and what their networks cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glem_augment.flows import build_flow, resolve_preset
from glem_augment.flows.coupling import Coupling

PRESET = "mef_tiny"
BASE: dict[str, Any] = {"depth": [8, 8], "width": [48, 64], "blocks": [1, 1]}
RECIPE: dict[str, Any] = dict(
    preset=PRESET, objective="hybrid", beta=0.3, ce_scale=0.2, batch_size=32, lr=0.01, min_lr=1e-4, schedule="cosine",
    m_steps=20, sigma_lr_scale=5.0, refit_beta=0.0, modes_rank=0, val_fraction=0.0, sample_every=0,
    checkpoint_minutes=1e6,
)  # fmt: skip
AFFINE = {"coupling": "affine", "activation": "relu"}  # the cheapest coupling and activation
# What is scaled to the base's FLOPs keeps the proportions of its widths.
WIDTH_STEP, LARGEST_WIDTH = 8, 512
# name -> changed settings; those of the recipe are told from those of the flow by their names.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "affine": {"coupling": "affine"},
    "affine, relu": {**AFFINE},
    "affine, relu, narrow": {**AFFINE, "width": [32, 40]},
    "affine, relu, narrow then wide": {**AFFINE, "width": [32, 64]},
    "affine, relu, bottleneck": {**AFFINE, "subnet": "bottleneck", "width": [64, 96]},
    "affine, relu, bottleneck, cifar10.yaml": {**AFFINE, "subnet": "bottleneck", "width": [64, 128]},
    "affine, relu, depthwise": {**AFFINE, "subnet": "depthwise", "width": [64, 96]},
    "affine, relu, depth 4": {**AFFINE, "depth": [4, 4], "width": [64, 88]},
    "affine, relu, 3 levels": {**AFFINE, "depth": [8, 8, 8], "width": [40, 56, 72], "blocks": [1, 1, 1]},
    "affine, relu, lr 0.005": {**AFFINE, "lr": 0.005},
    "affine, relu, depth 16, narrow": {**AFFINE, "depth": [16, 16], "width": [24, 32]},
    "affine, bound 1": {"coupling": "affine", "bound": 1.0},
    "bound 1": {"bound": 1.0},
    "actnorm per channel": {"actnorm": "channel"},
    "depth 4 =": {"depth": [4, 4]},
    "depth 6 =": {"depth": [6, 6]},
    "depth 12 =": {"depth": [12, 12]},
    "depth 16 =": {"depth": [16, 16]},
    "depth 12+4 =": {"depth": [12, 4]},
    "depth 4+12 =": {"depth": [4, 12]},
    "narrow": {"width": [32, 40]},
    "wide": {"width": [72, 96]},
    "2 blocks =": {"blocks": [2, 2]},
    "3 levels =": {"depth": [8, 6, 4], "width": [48, 64, 64], "blocks": [1, 1, 1]},
    "silu": {"activation": "silu"},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "bottleneck": {"subnet": "bottleneck", "width": [64, 96]},
    "bottleneck =": {"subnet": "bottleneck"},
    "bottleneck, 3 blocks =": {"subnet": "bottleneck", "blocks": [3, 3]},
    "bottleneck, depth 16 =": {"subnet": "bottleneck", "depth": [16, 16]},
    "depthwise": {"subnet": "depthwise", "width": [64, 96]},
    "depthwise =": {"subnet": "depthwise"},
    "depthwise, 3 blocks =": {"subnet": "depthwise", "blocks": [3, 3]},
    "depthwise, silu =": {"subnet": "depthwise", "activation": "silu"},
    "transformer =": {"subnet": "transformer"},
    "transformer, lr 0.003 =": {"subnet": "transformer", "lr": 0.003},
    "transformer, 3 blocks, lr 0.003 =": {"subnet": "transformer", "blocks": [3, 3], "lr": 0.003},
    "patch 4 =": {"patch": 4, "depth": [16], "width": [64], "blocks": [1]},
    "patch 4, transformer, lr 0.003 =": {
        "patch": 4, "depth": [16], "width": [64], "blocks": [2], "subnet": "transformer", "lr": 0.003,
    },
}  # fmt: skip


def count_flops(module: torch.nn.Module, x: Tensor) -> int:
    """FLOPs of one forward pass: convolutions, matrix products, attention (which only the plain form shows)."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


def network_flops(spec: dict[str, Any]) -> int:
    """FLOPs of all networks in the couplings, for one image."""
    channels, height, width = spec["image_shape"]
    side, total = spec["patch"], 0
    flow = build_flow({**spec, "depth": [1] * len(spec["depth"])})
    couplings = [module for module in flow.modules() if isinstance(module, Coupling)]
    for depth, coupling in zip(spec["depth"], couplings, strict=True):
        height, width, side = height // side, width // side, 2
        total += depth * count_flops(coupling.net, torch.zeros(1, coupling.half, height, width))
    return total


def flow_spec(name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The resolved settings of a variant for images of ``shape``. Raises ValueError where it can't have that size."""
    changes = {key: value for key, value in VARIANTS[name].items() if key not in RECIPE}
    spec = resolve_preset(PRESET, shape, **{**BASE, **changes})
    if not name.endswith("="):
        return spec
    target = network_flops(resolve_preset(PRESET, shape, **BASE))
    first = spec["width"][0]

    def scaled(steps: int) -> dict[str, Any]:
        ratio = steps * WIDTH_STEP / first
        return {**spec, "width": [max(1, round(w * ratio / WIDTH_STEP)) * WIDTH_STEP for w in spec["width"]]}

    low, high = 1, LARGEST_WIDTH // WIDTH_STEP
    while low < high:  # the first that costs no less than the base
        middle = (low + high) // 2
        low, high = (low, middle) if network_flops(scaled(middle)) >= target else (middle + 1, high)
    near = [scaled(steps) for steps in (max(1, low - 1), low)]
    return min(near, key=lambda s: abs(math.log(network_flops(s) / target)))


def settings_of(name: str) -> dict[str, Any]:
    """The variant's changes of the recipe."""
    return {key: value for key, value in VARIANTS[name].items() if key in RECIPE}
