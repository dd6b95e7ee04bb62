"""Compiled steps: the same function as the ordinary ones, captured whole, and not compiled again for a short batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from glem_augment.flows import affine_native, compiled, create_flow, expm_native, frozen
from glem_augment.flows.bijection import Bijection
from glem_augment.flows.compiled import Step
from glem_augment.flows.expm_coupling import expm_coupling
from glem_augment.flows.expm_op import expm_coupling_op
from glem_augment.flows.level import step_forward, step_inverse


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


def test_flows_of_one_process_have_a_limit_each() -> None:
    torch._dynamo.reset()
    for width in range(4, 10):
        x = torch.rand(2, 1, 4, 4) - 0.5
        flow = create_flow("mef_tiny", (1, 4, 4), depth=[1], blocks=[1], width=[width])
        flow.initialise(x)
        flow.compile_steps(backend="eager")
        for batch in (x, x[:1]):
            _passes(flow, batch)
        with torch.no_grad():
            flow.eval().inverse(flow(x)[0])


def test_beyond_the_limit_of_compilations_it_goes_on_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_KINDS_PER_LEVEL", 1)
    torch._dynamo.reset()
    flow, x = _flow("matexp", depth=[1, 1])
    expected = _passes(flow, x)
    with torch._dynamo.config.patch(cache_size_limit=1):
        flow.compile_steps(backend="eager")
        with pytest.warns(UserWarning, match="go on uncompiled"):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    got = flow(x.clone().requires_grad_(grad))
    torch.testing.assert_close(got[0], expected[0].detach(), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_copies_start_uncompiled_and_reversible_training_uses_compiled_steps() -> None:
    flow, x = _flow("matexp")
    expected = _passes(flow, x)
    flow.compile_steps(backend="eager")
    assert copy.deepcopy(flow).levels[0]._compiled_forward is None
    flow.set_memory("reversible")
    for got, want in zip(_passes(flow, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * max(1.0, float(want.abs().max())))


@pytest.mark.skipif(not frozen._is_supported(), reason="this torch has no oneDNN convolutions")
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("coupling", ["matexp", "affine"])
@pytest.mark.parametrize(("subnet", "width"), [("residual", 96), ("residual", 8), ("transformer", 96)])
def test_a_frozen_flow_leaves_compiled_steps_where_it_is_faster_without(
    subnet: str, width: int, coupling: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and not expm_native.has_kernel(2, 1.0):
        pytest.skip("no C++ compiler here")
    for module in () if kernels else (expm_native, affine_native):
        monkeypatch.setattr(module, "has_kernel", lambda *args: False)
    flow, x = _flow(coupling, subnet=subnet, width=[width] * 2)
    called: list[str] = []

    def spy(plain: Step) -> Step:
        def run(*args: object) -> tuple[Tensor, Tensor]:
            called.append(plain.__name__)
            return plain(*args)

        return run

    for level in flow.levels:
        level.use_compiled(spy(step_forward), spy(step_inverse))
    steps = ["step_forward"] * 5 + ["step_inverse"] * 5

    def both_ways() -> list[str]:
        called.clear()
        flow.inverse(flow(x)[0])
        return list(called)

    with torch.no_grad():
        assert both_ways() == steps  # an optimizer may write to the weights
        flow.requires_grad_(False)
        assert both_ways() == ([] if subnet == "residual" and (kernels or width == 96) else steps)
    assert both_ways() == steps  # a gradient may be asked for
    flow.requires_grad_(True)
    if coupling == "matexp":  # affine levels are one operation, compiled or not
        both_ways()  # lets go of what was kept of frozen weights
        assert both_ways() == ([] if subnet == "residual" and kernels else steps)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.01])  # a series of small S is shorter, in fewer segments
@pytest.mark.parametrize(("n", "bound"), [(2, 2.0), (2, 0.7), (3, 1.0), (4, 3.0), (12, 1.0), (12, 2.0)])
def test_the_operator_is_the_function(n: int, bound: float, size: float, inverse: bool) -> None:
    torch.manual_seed(0)
    x2 = torch.randn(n, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    params = (size * torch.randn(3, n * n + n, 4, 5, dtype=torch.float64)).contiguous(memory_format=torch.channels_last)
    params.requires_grad_()
    results = []
    for function in (expm_coupling, expm_coupling_op):
        y2, logdet = function(x2, params, bound, inverse)
        weights = torch.linspace(-1, 1, y2.numel(), dtype=torch.float64).view(y2.shape)
        grads = torch.autograd.grad((y2 * weights).sum() + logdet.square().sum(), (x2, params))
        results.append((y2, logdet, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    # Schema, fake tensors (shapes and strides), autograd registration, ahead-of-time tracing.
    torch.library.opcheck(torch.ops.glem_augment.expm_coupling.default, (x2, params, bound, inverse))


@pytest.mark.skipif(not expm_native.has_kernel(2, 1.0), reason="no C++ compiler here")
@pytest.mark.parametrize("coupling", [pytest.param("matexp", marks=pytest.mark.slow), "affine"])
def test_the_real_compiler(coupling: str) -> None:
    flow, x = _flow(coupling, depth=[2], blocks=[1], width=[8])  # a level takes it a quarter of a minute
    _agrees(flow, x, "inductor")
