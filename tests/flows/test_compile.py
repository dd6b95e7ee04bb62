"""Compiled steps: the same function as the ordinary ones, captured whole, and not compiled again for a short batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from glem_augment.flows import create_flow
from glem_augment.flows.layers import Bijection
from glem_augment.flows.level import step_forward


def _flow(coupling: str, **overrides: object) -> tuple[Bijection, Tensor]:
    torch.manual_seed(0)
    # On 2x8x8, S is 4x4 in the first level (planes of pixels) and 8x8 in the second (batched products). Networks with
    # ELU would train as one node, uncompiled.
    settings = dict(coupling=coupling, depth=[3, 2], blocks=[1, 1], width=[8, 8], actnorm="channel", bound=1.0)
    if overrides.get("subnet") is None:
        settings["activation"] = "silu"
    flow = create_flow("mef_tiny", (2, 8, 8), **{**settings, **overrides})
    x = torch.rand(128, 2, 8, 8) - 0.5
    flow.initialise(x)
    for parameter in flow.parameters():
        if parameter.dim() == 4 and not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.05)
    return flow, x[:6]


def _passes(flow: Bijection, x: Tensor) -> list[Tensor]:
    """Latents, log-determinants, decoded images, and every gradient."""
    flow.zero_grad()
    z, logdet = flow(x)
    (z.square().sum() - logdet.sum()).backward()
    with torch.no_grad():
        plain, _ = flow(x)
        back, _ = flow.inverse(plain)
    return [z.detach(), logdet.detach(), plain, back, *(p.grad.clone() for p in flow.parameters())]


def _agrees(flow: Bijection, x: Tensor, backend: str) -> None:
    expected, short = _passes(flow, x), _passes(flow, x[:3])
    torch._dynamo.reset()
    counters.clear()
    flow.compile_steps(backend=backend)
    for got, want in zip(_passes(flow, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * max(1.0, float(want.abs().max())))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not counters["graph_break"]
    for got, want in zip(_passes(flow, x[:3]), short, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * max(1.0, float(want.abs().max())))
    assert counters["stats"]["unique_graphs"] == graphs  # nothing was compiled for the short batch
    flow.compile_steps(False)
    for got, want in zip(_passes(flow, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("coupling", ["matexp", "affine"])
def test_compiled_steps_agree_and_are_captured_whole(coupling: str) -> None:
    flow, x = _flow(coupling)
    _agrees(flow, x, "aot_eager")


def test_more_steps_need_no_more_graphs() -> None:
    counts = []
    for depth in ([2, 2], [5, 4]):
        flow, x = _flow("matexp", depth=depth)
        torch._dynamo.reset()
        counters.clear()
        flow.compile_steps(backend="eager")
        _passes(flow, x)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


def test_many_levels_stay_below_the_limit_of_compilations() -> None:
    x = torch.rand(4, 2, 32, 32) - 0.5
    flow = create_flow("mef_tiny", (2, 32, 32), coupling="affine", depth=[2] * 5, blocks=[1] * 5, width=[4] * 5)
    flow.initialise(x)
    torch._dynamo.reset()
    flow.compile_steps(backend="eager")
    _passes(flow, x)


def test_copies_start_uncompiled_and_reversible_training_uses_compiled_steps() -> None:
    flow, x = _flow("matexp")
    expected = _passes(flow, x)
    flow.compile_steps(backend="eager")
    assert copy.deepcopy(flow).levels[0].step_forward is step_forward
    flow.set_memory("reversible")
    for got, want in zip(_passes(flow, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("coupling", [pytest.param("matexp", marks=pytest.mark.slow), "affine"])
def test_the_real_compiler(coupling: str) -> None:
    flow, x = _flow(coupling, depth=[2], blocks=[1], width=[8])  # a level takes it a quarter of a minute
    _agrees(flow, x, "inductor")
