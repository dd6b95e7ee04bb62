"""The bijection between images and latents. Nothing here knows of classes."""

from glem_augment.flows.custom import CustomFlow
from glem_augment.flows.jet import JetFlow
from glem_augment.flows.layers import Bijection, FlatIdentity, Flow
from glem_augment.flows.matexp import expm_apply
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.presets import PRESETS, build_flow, create_flow, resolve_preset

__all__ = [
    "PRESETS",
    "Bijection",
    "CustomFlow",
    "FlatIdentity",
    "Flow",
    "JetFlow",
    "MultiscaleFlow",
    "build_flow",
    "create_flow",
    "expm_apply",
    "resolve_preset",
]
