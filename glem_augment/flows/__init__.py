"""The bijection between images and latents. Classes play no part here."""

from glem_augment.flows.affine import AffineCoupling
from glem_augment.flows.build import build_flow, flow_facts
from glem_augment.flows.check import check_flow
from glem_augment.flows.coupling import Coupling, register_coupling
from glem_augment.flows.flow import Flow, register_flow
from glem_augment.flows.linear import FlatIdentity
from glem_augment.flows.matexp_coupling import MatExpCoupling
from glem_augment.flows.multiscale import MultiscaleFlow
from glem_augment.flows.presets import PRESETS, create_flow, resolve_preset

__all__ = [
    "PRESETS",
    "AffineCoupling",
    "Coupling",
    "FlatIdentity",
    "Flow",
    "MatExpCoupling",
    "MultiscaleFlow",
    "build_flow",
    "check_flow",
    "create_flow",
    "flow_facts",
    "register_coupling",
    "register_flow",
    "resolve_preset",
]
