"""The Triton kernel's numbers, in Triton's interpreter: ``test_triton`` runs this in a process of its own, since Triton
reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import pytest
import torch
from test_native import arguments, close, results
from torch import Tensor

from glem_augment import create_flow
from glem_augment.flows import expm_coupling as expm_coupling_module
from glem_augment.flows import expm_native, expm_triton
from glem_augment.flows.expm_coupling import expm_coupling
from glem_augment.flows.ordinary import are_ordinary


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for, and serves there."""
    expm_triton._programs.cache_clear()
    monkeypatch.setenv("GLEM_TRITON", "1")
    monkeypatch.setattr(expm_native, "serves", lambda *args: False)
    monkeypatch.setattr(expm_triton, "are_ordinary_on_cuda", are_ordinary)


def few(n: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Arguments of few pixels: they are interpreted one after the other."""
    x2, params = (t.detach()[..., :2, :3] for t in arguments(n, 2, size))
    return x2.contiguous().requires_grad_(), params.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("n", "bound"), [(1, 0.7), (2, 1.0), (3, 2.5), (6, 1.0), (7, 1.0), (24, 0.3)])
def test_it_computes_what_torch_does(n: int, bound: float, inverse: bool) -> None:
    for size in (0.0, 3.0):
        x2, params = few(n, size)
        assert expm_coupling_module._kernels_for(x2, params, bound) is expm_triton
        got = results(x2, params, bound, inverse)
        wanted = results(*(t.detach().double().requires_grad_() for t in (x2, params)), bound, inverse)
        close(got[:2], wanted[:2], 1e-6 * max(1.0, bound))
        close(got[2:], wanted[2:], 2e-5)


def test_any_layout_one_pixel_and_no_images_at_all() -> None:
    x2, params = few(3)
    wanted = results(x2, params, 1.0, False)
    other = [x2.detach().transpose(2, 3).contiguous().transpose(2, 3), params.detach().contiguous()]
    for got, want in zip(results(*(t.requires_grad_() for t in other), 1.0, False), wanted, strict=True):
        assert torch.equal(got, want)
    one = expm_coupling(x2[:, :1, :1, :1], params[:1, :, :1, :1], 1.0)
    assert torch.equal(one[0], wanted[0][:, :1, :1, :1])
    x2, params = torch.empty(4, 0, 5, 7, requires_grad=True), torch.empty(0, 20, 5, 7, requires_grad=True)
    y2, logdet = expm_coupling(x2, params, 1.0)
    assert y2.shape == (4, 0, 5, 7) and logdet.shape == (0,)
    assert [g.shape for g in torch.autograd.grad((y2.sum() + logdet.sum(),), (x2, params))] == [x2.shape, params.shape]


def test_a_lost_pixel_is_lost_alone() -> None:
    x2, params = (t.detach() for t in few(3))
    lost = params.clone()
    lost[1, 0, 1, 2] = float("nan")
    y2, logdet = expm_coupling(x2, lost, 1.0)
    there = torch.isnan(y2).any(0)
    assert there[1, 1, 2] and int(there.sum()) == 1
    assert torch.isnan(logdet).tolist() == [False, True]


def test_a_flow_trains_with_it_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    flow = create_flow("mef_tiny", (1, 4, 4), depth=[1, 1], blocks=[1, 1], width=[4, 4])
    x = torch.rand(2, 1, 4, 4) - 0.5
    flow.initialise(x)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.2)
    called = []
    original = expm_triton.couple
    monkeypatch.setattr(expm_triton, "couple", lambda *args, **kw: called.append(1) or original(*args, **kw))

    def step() -> list[Tensor]:
        flow.zero_grad()
        z, logdet = flow(x)
        (z.square().sum() - logdet.sum()).backward()
        return [z.detach(), logdet.detach(), *(p.grad.clone() for p in flow.parameters())]

    got = step()
    assert len(called) == 2
    close([flow.inverse(got[0])[0].detach()], [x], 1e-5)
    monkeypatch.setattr(expm_triton, "serves", lambda *args: False)
    close(got, step(), 1e-5)


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x2, params = (t.detach() for t in few(3))
    assert expm_triton.serves(x2, params, 1.0)
    assert not expm_triton.serves(x2.double(), params.double(), 1.0)
    for value in ("0", ""):
        monkeypatch.setenv("GLEM_TRITON", value)
        expm_triton._programs.cache_clear()
        assert not expm_triton.serves(x2, params, 1.0)
