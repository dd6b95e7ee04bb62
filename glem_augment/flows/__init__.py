"""The bijection between images and latents. Nothing here knows of classes."""

from glem_augment.flows.coupling import AffineCoupling, MatExpCoupling
from glem_augment.flows.layers import ActNorm, Bijection, FlatIdentity, Mixing1x1, Squeeze
from glem_augment.flows.matexp import expm_apply, expm_apply_low_rank, taylor_plan
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.presets import PRESETS, build_flow, create_flow, resolve_preset

__all__ = [
    "PRESETS",
    "ActNorm",
    "AffineCoupling",
    "Bijection",
    "FlatIdentity",
    "MatExpCoupling",
    "Mixing1x1",
    "MultiscaleFlow",
    "Squeeze",
    "build_flow",
    "create_flow",
    "expm_apply",
    "expm_apply_low_rank",
    "resolve_preset",
    "taylor_plan",
]
