"""Compiled steps: the same function as the ordinary ones, with one compilation however many steps a level has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from glem_augment.flows import MultiscaleFlow, create_flow
from glem_augment.flows.level import step_forward


def flow_and_images(coupling: str, **options: object) -> tuple[MultiscaleFlow, Tensor]:
    torch.manual_seed(0)
    settings = dict(coupling=coupling, depth=[1], blocks=[1], width=[8], actnorm="channel", bound=1.0)
    flow = create_flow("mef_tiny", (2, 8, 8), **{**settings, **options})
    x = torch.rand(64, 2, 8, 8) - 0.5
    flow.initialise(x)
    for parameter in flow.parameters():
        if parameter.dim() == 4 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return flow, x[:6]


def passes(flow: MultiscaleFlow, x: Tensor) -> list[Tensor]:
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


@pytest.mark.parametrize("coupling", ["matexp", "affine"])
def test_compiled_steps_agree_and_copies_start_uncompiled(coupling: str) -> None:
    flow, x = flow_and_images(coupling)
    expected = passes(flow, x)
    torch._dynamo.reset()
    counters.clear()
    flow.compile_steps(backend="eager")
    assert_agree(passes(flow, x), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert copy.deepcopy(flow).levels[0].step_forward is step_forward
    flow.compile_steps(False)
    assert all(map(torch.equal, passes(flow, x), expected))


def test_more_steps_need_no_more_graphs_and_reversible_training_uses_them() -> None:
    counts = []
    for depth in ([2], [3]):
        flow, x = flow_and_images("affine", depth=depth)
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
    flow, x = flow_and_images(coupling)
    expected, short = passes(flow, x), passes(flow, x[:3])
    torch._dynamo.reset()
    flow.compile_steps()
    assert_agree(passes(flow, x), expected)
    assert_agree(passes(flow, x[:3]), short)
