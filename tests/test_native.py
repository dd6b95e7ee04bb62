"""The C++ kernels: torch's numbers, only where nothing else is asked, and no trouble where they can't be built."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from glem_augment import create_flow
from glem_augment.flows import affine_native, elu_native, expm_native, expm_op, expm_triton, generators
from glem_augment.flows.activations import fast_elu
from glem_augment.flows.affine_coupling import affine_coupling
from glem_augment.flows.elu_native import LOG2_E
from glem_augment.flows.expm_coupling import expm_coupling, expm_coupling_backward
from glem_augment.flows.generators import exp_of_generators
from glem_augment.flows.native import threads_for

needs_a_compiler = pytest.mark.skipif(not expm_native.has_kernel(2, 1.0), reason="no C++ compiler here")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Torch's operations alone."""
    for kernels in (expm_native, affine_native, elu_native):
        monkeypatch.setattr(kernels, "serves", lambda *args: False)
    return monkeypatch


def arguments(n: int, batch: int = 3, size: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x2 = torch.randn(n, batch, 5, 7, generator=g)
    params = size * torch.randn(batch, n * n + n, 5, 7, generator=g)
    return x2.requires_grad_(), params.contiguous(memory_format=torch.channels_last).requires_grad_()


def results(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> list[Tensor]:
    """Of the coupling, of its gradients, and of undoing it."""
    y2, logdet = expm_coupling(x2, params, bound, inverse)
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in (y2, logdet)]
    grads = torch.autograd.grad((y2, logdet), (x2, params), weights)
    undone = expm_coupling_backward(y2.detach(), params.detach(), *weights, bound)
    return [y2.detach(), logdet.detach(), *grads, *undone]


def close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for result, want in zip(got, wanted, strict=True):
        assert result.shape == want.shape
        error = float((result.double() - want.double()).abs().max())
        assert error <= tolerance * float(want.abs().max().clamp_min(1)), error


@needs_a_compiler
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bound", [0.7, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 12, 13, 24])
def test_it_computes_what_torch_does(n: int, bound: float, inverse: bool) -> None:
    for size in (0.0, 1e-4, 0.1, 3.0):
        x2, params = arguments(n, size=size)
        assert expm_native.serves(x2, params, bound)
        got = results(x2, params, bound, inverse)
        wanted = results(*(t.detach().double().requires_grad_() for t in (x2, params)), bound, inverse)
        close(got[:2], wanted[:2], 1e-6 * max(1.0, bound))
        # A derivative lacks one term more than the series. Undoing multiplies rounding by up to e^bound.
        close(got[2:4], wanted[2:4], 2e-5)
        close(got[4:], wanted[4:], 2e-5 + 4e-7 * math.exp(bound))


@needs_a_compiler
def test_any_layout_and_no_images_at_all() -> None:
    x2, params = arguments(4)
    wanted = results(x2, params, 1.0, False)
    other = [x2.detach().transpose(2, 3).contiguous().transpose(2, 3), params.detach().contiguous()]
    for got, want in zip(results(*(t.requires_grad_() for t in other), 1.0, False), wanted, strict=True):
        assert torch.equal(got, want)
    y2, logdet = expm_coupling(torch.empty(4, 0, 5, 7), torch.empty(0, 20, 5, 7), 1.0)
    assert y2.shape == (4, 0, 5, 7) and logdet.shape == (0,)


@needs_a_compiler
def test_shapes_that_do_not_fit_are_an_error() -> None:
    x2, params = (t.detach() for t in arguments(3))
    g, g_logdet = torch.ones_like(x2), torch.ones(3)
    for wrong in (params[:, :-1], params[:2], params[..., :-1], params[None]):
        with pytest.raises(ValueError, match="are not those of x2"):
            expm_coupling(x2, wrong, 1.0)
    for wrong in ((g[:2], g_logdet), (g, g_logdet[:2]), (g[..., :-1], g_logdet)):
        with pytest.raises(ValueError, match="are not those of x2"):
            expm_coupling_backward(x2, params, *wrong, 1.0)


@needs_a_compiler
def test_a_lost_pixel_is_lost_alone() -> None:
    x2, params = (t.detach() for t in arguments(3))
    wanted = expm_coupling(x2, params, 1.0)
    lost, params = params.clone(), params.clone()
    lost[1, 0, 2, 3] = float("nan")
    y2, logdet = expm_coupling(x2, lost, 1.0)
    there = torch.isnan(y2).any(0)
    assert there[1, 2, 3] and int(there.sum()) == 1
    assert torch.isnan(logdet).tolist() == [False, True, False]
    torch.testing.assert_close(y2[:, ~there], wanted[0][:, ~there], rtol=1e-6, atol=1e-6)
    far = x2.clone()
    far[0, 0, 0, 0] = float("inf")
    assert not torch.isfinite(expm_coupling(far, params, 1.0)[0][:, 0, 0, 0]).any()


@needs_a_compiler
def test_the_number_of_threads_changes_nothing() -> None:
    x2, params = arguments(6, batch=64)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert threads_for(10**9) == count and threads_for(1000) == 1
            found.append(results(x2, params, 1.0, False))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@needs_a_compiler
def test_threads_of_the_caller_may_share_it() -> None:
    x2, params = arguments(4, batch=16)
    wanted = results(x2, params, 1.0, False)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: results(x2, params, 1.0, False), range(16)):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@needs_a_compiler
def test_only_where_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x2, params = (t.detach() for t in arguments(3))
    wanted = expm_coupling(x2, params, 1.0)

    def fail(*args: object) -> None:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(expm_native, "couple", fail)
    with pytest.raises(AssertionError, match="was called"):
        expm_coupling(x2, params, 1.0)
    assert expm_coupling(x2.double(), params.double(), 1.0)[0].dtype == torch.float64
    assert expm_coupling(x2.to("meta"), params.to("meta"), 1.0)[0].device.type == "meta"
    assert not expm_native.serves(x2, params, 8.5)  # nine segments
    with forward_ad.dual_level():
        assert not expm_native.serves(x2, params, 1.0)

    def traced(p: Tensor) -> Tensor:
        assert not expm_native.serves(x2, p, 1.0)
        return p

    torch.func.vmap(traced)(params[None])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(params)
        assert not expm_native.serves(mode.from_tensor(x2), fake, 1.0)
    assert not expm_native.serves(x2, fake, 1.0)
    assert torch.isfinite(wanted[0]).all()


@needs_a_compiler
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [3, 12])
def test_the_operator_for_compiled_flows(n: int, inverse: bool) -> None:
    x2, params = arguments(n)
    torch.library.opcheck(torch.ops.glem_augment.expm_kernel.default, (x2, params, 1.0, inverse))
    got = torch.ops.glem_augment.expm_kernel(x2, params, 1.0, inverse)
    assert all(torch.equal(a, b) for a, b in zip(got, expm_coupling(x2, params, 1.0, inverse), strict=True))
    assert expm_op._has_kernels("cpu", 1.0) and not expm_op._has_kernels("meta", 1.0)


def test_without_triton_torch_does_the_work_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLEM_TRITON", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "glem_augment.flows.expm_triton_programs", raising=False)
    expm_triton._programs.cache_clear()
    with pytest.warns(UserWarning, match="GLEM_TRITON is set, but there is no Triton.*pip install"):
        assert not expm_triton.has_kernel(3, 1.0)
    assert not expm_triton.has_kernel(3, 1.0)
    expm_triton._programs.cache_clear()


# ---- the affine coupling ---------------------------------------------------------------------------------------------


def affine_arguments(n: int, batch: int = 3, size: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x2, params = torch.randn(n, batch, 5, 7, generator=g), size * torch.randn(batch, 2 * n, 5, 7, generator=g)
    return x2.requires_grad_(), params.contiguous(memory_format=torch.channels_last).requires_grad_()


def affine_results(x2: Tensor, params: Tensor, bound: float, inverse: bool) -> list[Tensor]:
    """Of the coupling, of its gradients, and of undoing it."""
    y2, logdet = affine_coupling(x2, params, bound, inverse)
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in (y2, logdet)]
    grads = torch.autograd.grad((y2, logdet), (x2, params), weights)
    undone = affine_coupling(y2.detach(), params.detach(), bound, not inverse)
    return [y2.detach(), logdet.detach(), *grads, *undone]


@needs_a_compiler
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bound", [0.7, 2.0, 5.0])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 12, 24, 96])
def test_the_affine_kernel_computes_what_torch_does(n: int, bound: float, inverse: bool) -> None:
    for size in (0.0, 1e-4, 1.0, 5.0):
        x2, params = affine_arguments(n, size=size)
        assert affine_native.serves(x2, params)
        got = affine_results(x2, params, bound, inverse)
        wanted = affine_results(*(t.detach().double().requires_grad_() for t in (x2, params)), bound, inverse)
        close(got[:2], wanted[:2], 1e-6)
        # Undoing multiplies what is lost by up to e^bound, and gradients meet that once more.
        close(got[2:], wanted[2:], 1e-6 * math.exp(bound))


@needs_a_compiler
def test_the_affine_kernel_takes_any_number() -> None:
    x2, params = (t.detach() for t in affine_arguments(2))
    wanted = affine_coupling(x2, params, 2.0)
    lost = params.clone()
    lost[1, 0, 2, 3] = float("nan")
    y2, logdet = affine_coupling(x2, lost, 2.0)
    assert torch.isnan(y2).nonzero().tolist() == [[0, 1, 2, 3]]
    assert torch.isnan(logdet).tolist() == [False, True, False]
    assert torch.equal(y2[1], wanted[0][1])
    for value, scale in ((1e30, 2.0), (float("inf"), 2.0), (-1e30, -2.0), (-float("inf"), -2.0)):
        far = torch.zeros(1, 2, 1, 1)
        far[0, 0] = value
        y2, logdet = affine_coupling(torch.ones(1, 1, 1, 1), far, 2.0)
        assert float(logdet) == scale and math.isclose(float(y2), math.exp(scale), rel_tol=3e-7)
        one = torch.ones(1, 1, 1, 1)
        grads = affine_native.couple_backward(one, torch.ones(1), one, far, 2.0, False)
        assert float(grads[1][0, 0]) == pytest.approx(0, abs=1e-15) and torch.isfinite(grads[0]).all()


@needs_a_compiler
def test_the_affine_kernel_and_layouts_threads_shapes_and_no_images() -> None:
    x2, params = affine_arguments(6, batch=64)
    wanted = affine_results(x2, params, 2.0, False)
    other = [x2.detach().transpose(2, 3).contiguous().transpose(2, 3), params.detach().contiguous()]
    before = torch.get_num_threads()
    try:
        for count, pair in ((1, (x2, params)), (2, (x2, params)), (1, [t.requires_grad_() for t in other])):
            torch.set_num_threads(count)
            for got, want in zip(affine_results(*pair, 2.0, False), wanted, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)
    x2, params, g, g_logdet = x2.detach(), params.detach(), torch.ones_like(x2), torch.ones(64)
    for wrong in (params[:, :-1], params[:2], params[..., :-1], params[None]):
        with pytest.raises(ValueError, match="are not those of x2"):
            affine_coupling(x2, wrong, 2.0)
    for wrong in ((g[:2], g_logdet), (g, g_logdet[:2]), (g[..., :-1], g_logdet)):
        with pytest.raises(ValueError, match="are not those of x2"):
            affine_native.couple_backward(*wrong, x2, params, 2.0, False)
    y2, logdet = affine_coupling(torch.empty(4, 0, 5, 7), torch.empty(0, 8, 5, 7), 2.0)
    assert y2.shape == (4, 0, 5, 7) and logdet.shape == (0,)
    assert not affine_native.has_kernel(97) and not affine_native.serves(x2.double(), params.double())


@needs_a_compiler
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_affine_coupling_can_be_differentiated_again(frozen: bool, inverse: bool) -> None:
    def second(x2: Tensor, params: Tensor) -> list[Tensor]:
        leaves = [x2.detach().requires_grad_()]
        leaves += [] if frozen else [params.detach().requires_grad_()]
        y2, logdet = affine_coupling(leaves[0], params.detach() if frozen else leaves[1], 2.0, inverse)
        first = torch.autograd.grad(y2.pow(3).sum() + logdet.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in first), leaves))

    x2, params = affine_arguments(3)
    close(second(x2, params), second(x2.double(), params.double()), 1e-5)
    y2, _ = affine_coupling(x2, params, 2.0, inverse)
    rows = torch.eye(4, y2.numel()).view(4, *y2.shape)
    batched = torch.autograd.grad(y2, (x2, params), rows, is_grads_batched=True, retain_graph=True)
    for index, row in enumerate(rows):
        alone = torch.autograd.grad(y2, (x2, params), row, retain_graph=True)
        close([t[index] for t in batched], list(alone), 1e-6)


# ---- ELU -------------------------------------------------------------------------------------------------------------


@needs_a_compiler
@pytest.mark.parametrize("unit", [1.0, LOG2_E])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4099])
def test_elus_of_any_number(size: int, unit: float) -> None:
    x = torch.linspace(-30, 3, size) if size > 1 else torch.full((size,), -0.5)
    before, wanted = x.clone(), unit * F.elu(x.double() / unit)
    assert elu_native.serves(x)
    y = elu_native.elu(x, unit)
    # Near zero, too, where e^x - 1 as a difference has lost its digits.
    torch.testing.assert_close(y.double(), wanted, rtol=4e-7, atol=1e-38)
    assert torch.equal(x, before) and torch.equal(elu_native.elu(x, unit, owned=True), y) and torch.equal(x, y)


@needs_a_compiler
def test_elus_keep_layouts_and_leave_the_rest_to_torch() -> None:
    x = torch.randn(3, 5, 4, 7)
    for same in (x, x.contiguous(memory_format=torch.channels_last)):
        y = elu_native.elu(same)
        assert y.stride() == same.stride()
        torch.testing.assert_close(y, F.elu(x), rtol=1e-6, atol=1e-7)
    for other in (x.transpose(2, 3), x[:, ::2], x.double(), x.to(torch.bfloat16), x.to("meta")):
        assert not elu_native.serves(other)
    with torch.no_grad():
        torch.testing.assert_close(fast_elu(x[:, ::2]), F.elu(x[:, ::2]), rtol=1e-6, atol=1e-6)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, -1e30, 1e38, torch.nan])
    torch.testing.assert_close(elu_native.elu(special), F.elu(special), rtol=0, atol=0, equal_nan=True)
    many, before = torch.randn(200_003), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(elu_native.elu(many))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_a_compiler
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 5, 3, 7), (3, 48, 14, 14), (16, 32, 4, 4), (2, 144, 5, 13)])
@pytest.mark.parametrize("with_added", [False, True])
def test_sums_that_come_with_elus_gradients(shape: tuple[int, ...], with_added: bool) -> None:
    torch.manual_seed(0)
    g, x, added = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
    y, added = F.elu(x), added if with_added else None
    exact = g.double() * (y.double() + 1).clamp(max=1) + (0 if added is None else added.double())
    alone, none = elu_native.elu_backward(g.clone(memory_format=torch.preserve_format), y, added)
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(elu_native.elu_backward(g.clone(memory_format=torch.preserve_format), y, added, with_sums=True))
    finally:
        torch.set_num_threads(before)
    assert none is None
    torch.testing.assert_close(alone.double(), exact, rtol=1e-6, atol=1e-6)
    for found, sums in made:
        assert torch.equal(found, alone) and (sums is None) == (shape[1] % 16 > 0)
        if sums is not None:
            assert torch.equal(sums, made[0][1]) and sums.shape == shape[1:2]
            room = 2e-6 * y[:, 0].numel() ** 0.5
            torch.testing.assert_close(sums.double(), exact.sum((0, 2, 3)), rtol=1e-6, atol=room)


# ---- whole flows -----------------------------------------------------------------------------------------------------


@needs_a_compiler
@pytest.mark.parametrize("preset", ["mef_tiny", "glow_tiny"])
def test_a_flow_is_the_same_with_and_without(without: pytest.MonkeyPatch, preset: str) -> None:
    torch.manual_seed(0)
    flow = create_flow(preset, (3, 16, 16), depth=[2, 2], width=[8, 8], blocks=[1, 1])
    x = torch.rand(4, 3, 16, 16) - 0.5
    flow.initialise(x)
    for p in flow.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)

    def passes() -> list[Tensor]:
        z, logdet = flow(x)
        flow.zero_grad()
        (z.square().sum() - logdet.sum()).backward()
        grads = [p.grad.clone() for p in flow.parameters()]
        with torch.no_grad():
            return [z.detach(), logdet.detach(), *grads, *flow.inverse(z.detach())]

    plain = passes()
    without.undo()
    close(passes(), plain, 1e-4)


# ---- exponentials of generators --------------------------------------------------------------------------------------


def exponentials(a: Tensor, sign: float) -> list[Tensor]:
    """``exp(sign A)`` and a gradient."""
    a = a.clone().requires_grad_()
    value = exp_of_generators(a, sign)
    return [value.detach(), *torch.autograd.grad((value * torch.linspace(-1, 2, a.numel()).to(a).view_as(a)).sum(), a)]


@pytest.mark.skipif(generators._kernel() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 5.0])
@pytest.mark.parametrize("c", [1, 2, 4, 7, 8, 9, 16, 17, 48, 96])
def test_exponentials_of_generators_are_torchs(c: int, norm: float, sign: float) -> None:
    a = torch.randn(3, c, c, generator=torch.Generator().manual_seed(c))
    a = norm * a / a.abs().sum(2).amax(1)[:, None, None]
    assert generators._serves(a)
    wanted = exponentials(a.double(), sign)
    got = exponentials(a, sign)
    # One rounding; the gradient is taken in float32.
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=6e-8, atol=1e-12 + 6e-8 * float(wanted[0].abs().max()))
    close(got[1:], wanted[1:], 2e-5)
    assert torch.equal(exponentials(a.transpose(1, 2).contiguous().transpose(1, 2), sign)[0], got[0])


def special_generator(kind: str, c: int) -> Tensor:
    a = torch.randn(c, c, generator=torch.Generator().manual_seed(c), dtype=torch.float64)
    if kind == "skew":  # its powers are far below those of its norm
        return 8 * (a - a.T) / (a - a.T).abs().sum(1).max()
    if kind == "nilpotent":  # the square is zero
        a[c // 2 :] = 0
        a[:, : c // 2] = 0
        return 3 * a
    if kind == "triangular":  # far from normal
        return torch.triu(4 * a / c**0.5, 1) + torch.diag(torch.linspace(-1, 1, c, dtype=torch.float64))
    return torch.diag(torch.linspace(-6, 6, c, dtype=torch.float64))


@pytest.mark.skipif(generators._kernel() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("kind", ["skew", "nilpotent", "triangular", "diagonal"])
@pytest.mark.parametrize("c", [2, 6, 48])
def test_exponentials_of_special_generators(kind: str, c: int) -> None:
    a = special_generator(kind, c).float()[None]
    wanted, got = exponentials(a.double(), 1.0), exponentials(a, 1.0)
    scale = float(wanted[0].abs().max())
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=6e-8, atol=1e-12 + 6e-8 * scale)
    close(got[1:], wanted[1:], 2e-5)


@pytest.mark.skipif(generators._kernel() is None, reason="no C++ compiler here")
def test_what_is_not_finite_stays_so_and_large_ones_end() -> None:
    a = torch.zeros(4, 5, 5)
    a[0, 1, 1], a[1, 2, 2], a[2] = float("nan"), float("inf"), 1e38
    for result in exponentials(a, 1.0):
        assert not any(torch.isfinite(part).all() for part in result[:3]) and torch.isfinite(result[3]).all()
    assert not generators._serves(torch.zeros(1, 97, 97)) and not generators._serves(a.double())


# ---- building --------------------------------------------------------------------------------------------------------

PROGRAM = """
import warnings, torch
from glem_augment.flows import expm_native
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    there = expm_native.has_kernel(3, 1.0), expm_native.has_kernel(3, 1.0)
    from glem_augment.flows.expm_coupling import expm_coupling
    y2, logdet = expm_coupling(torch.ones(3, 2, 4, 4), torch.ones(2, 12, 4, 4), 1.0)
print(there[0], len(seen), *(str(w.message) for w in seen), float(y2.sum()), sep="|")
"""


def run(tmp_path: Path, **environment: str) -> list[str]:
    """What a fresh process with an empty cache in ``tmp_path`` prints: whether there is a kernel, warnings, a sum."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def compiler(tmp_path: Path, before: str) -> str:
    """A compiler that runs the shell commands ``before`` first."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\n{before}\nexec c++ "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.so"))


@needs_a_compiler
def test_a_kernel_is_built_once_and_a_damaged_one_anew(tmp_path: Path) -> None:
    counting = compiler(tmp_path, f"echo called >> {tmp_path}/calls")
    first = run(tmp_path, CXX=counting)
    assert first[:2] == ["True", "0"]
    calls = (tmp_path / "calls").read_text()
    assert len(libraries(tmp_path)) == 1 and not list((tmp_path / "cache").rglob("build-*"))
    assert run(tmp_path, CXX=counting) == first and (tmp_path / "calls").read_text() == calls
    libraries(tmp_path)[0].write_bytes(b"no library")
    assert run(tmp_path, CXX=counting) == first and (tmp_path / "calls").read_text() == calls * 2


@needs_a_compiler
def test_a_compiler_without_openmp_will_do(tmp_path: Path) -> None:
    picky = compiler(tmp_path, 'case "$*" in *-fopenmp*) echo "unsupported option" >&2; exit 1;; esac')
    assert run(tmp_path, CXX=picky)[:2] == ["True", "0"]


@needs_a_compiler
def test_many_processes_may_build_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(tmp_path), range(4)))
    assert all(result == found[0] for result in found) and found[0][:2] == ["True", "0"]
    assert len(libraries(tmp_path)) == 1


@needs_a_compiler
def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "glem_augment" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert run(tmp_path)[:2] == ["True", "0"] and not libraries(tmp_path)


def test_without_a_compiler_torch_does_the_work(tmp_path: Path) -> None:
    off = run(tmp_path, GLEM_NATIVE="0")
    assert off[:2] == ["False", "0"] and not libraries(tmp_path)
    assert run(tmp_path, CXX="", PATH="/nowhere") == off
    missing = run(tmp_path, CXX="/no/such/compiler -O2")
    assert missing[:2] == ["False", "1"] and missing[-1] == off[-1]
    assert "/no/such/compiler" in missing[2] and "GLEM_NATIVE=0" in missing[2] and "CXX" in missing[2]
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'error: no space left on device' >&2\nexit 1\n")
    failing.chmod(0o755)
    assert "no space left" in run(tmp_path, CXX=str(failing))[2]
