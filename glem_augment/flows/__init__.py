"""The bijection between images and latents. Classes play no part here."""

from glem_augment.flows.check import check_flow
from glem_augment.flows.layers import Flow
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.presets import PRESETS, build_flow, create_flow, resolve_preset

__all__ = ["PRESETS", "Flow", "MultiscaleFlow", "build_flow", "check_flow", "create_flow", "resolve_preset"]
