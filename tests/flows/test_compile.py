"""Compiled steps: the same function as the ordinary ones, with one compilation however many steps a level has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_reversible import flow_and_images
from torch import Tensor
from torch._dynamo.utils import counters

from glem_augment.flows import Flow, MultiscaleFlow
from glem_augment.flows.multiscale import step_forward


def flow_of_one_level(coupling: str, **options: Any) -> tuple[MultiscaleFlow, Tensor]:
    settings = dict(coupling=coupling, depth=[1], blocks=[1], width=[8], bound=1.0)
    return flow_and_images("actnorm per channel", torch.float32, 6, **{**settings, **options})


def passes(flow: Flow, x: Tensor) -> list[Tensor]:
    """Latents, log-determinants, decoded images, and every gradient."""
    flow.zero_grad()
    z, logdet = flow(x)
    (z.square().sum() - logdet.sum()).backward()
    with torch.no_grad():
        back, _ = flow.inverse(z)
    return [z.detach(), logdet.detach(), back, *(p.grad.clone() for p in flow.parameters())]


def assert_agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * max(1.0, float(want.abs().max())))


def test_compiled_steps_agree_and_copies_start_uncompiled() -> None:
    flow, x = flow_of_one_level("matexp")
    expected = passes(flow, x)
    torch._dynamo.reset()
    counters.clear()
    flow.compile_steps(backend="eager")
    assert_agree(passes(flow, x), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert copy.deepcopy(flow).levels[0].step_forward is step_forward


def test_more_steps_need_no_more_graphs_and_reversible_training_uses_them() -> None:
    counts = []
    for depth in ([2], [3]):
        flow, x = flow_of_one_level("affine", depth=depth)
        expected = passes(flow, x)
        torch._dynamo.reset()
        counters.clear()
        flow.compile_steps(backend="eager")
        flow.set_memory("reversible")
        assert_agree(passes(flow, x), expected)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["matexp", "affine"])
def test_the_real_compiler(coupling: str) -> None:
    flow, x = flow_of_one_level(coupling)
    expected, short = passes(flow, x), passes(flow, x[:3])
    torch._dynamo.reset()
    flow.compile_steps()
    assert_agree(passes(flow, x), expected)
    assert_agree(passes(flow, x[:3]), short)
