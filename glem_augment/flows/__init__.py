"""The bijection between images and latents. Classes play no part here."""

from glem_augment.flows.custom import CustomFlow
from glem_augment.flows.layers import Flow
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.presets import PRESETS, build_flow, create_flow, resolve_preset

__all__ = ["PRESETS", "CustomFlow", "Flow", "MultiscaleFlow", "build_flow", "create_flow", "resolve_preset"]
