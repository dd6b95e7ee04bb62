"""The networks inside couplings: contract, start, gradients, and precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glem_augment.flows.subnets import ACTIVATIONS, SUBNETS, Subnet

KINDS = [(kind, act) for kind in SUBNETS for act in ACTIVATIONS]


def filled(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Random weights everywhere, so that no gradient is zero by the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def small(kind: str, activation: str = "elu") -> nn.Module:
    return Subnet(kind, 3, 5, 8, 2, activation)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_shape_format_and_start(kind: str, activation: str) -> None:
    net = small(kind, activation)
    x = torch.randn(2, 3, 4, 6)
    before = x.clone()
    y = net(x)
    assert y.shape == (2, 5, 4, 6) and y.dtype == torch.float32 and not y.any()
    assert isinstance(net.tail, nn.Conv2d) and net.tail.out_channels == 5 and net.autocast is None
    y = filled(net)(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert y.abs().max() > 0 and torch.equal(x, before)
    assert net.double()(x.double()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", SUBNETS)
def test_autocast_runs_the_body_in_bf16_and_the_tail_in_float32(kind: str) -> None:
    net = filled(small(kind), 0.2)
    x = torch.randn(2, 3, 4, 6)
    full = net(x).detach()
    seen: dict[str, torch.dtype] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    net.autocast = torch.bfloat16
    y = net(x)
    assert seen["head"] == torch.bfloat16 and seen["act"] == seen["tail"] == y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(y, full)
    torch.testing.assert_close(y, full, rtol=0.1, atol=0.1 * float(full.abs().max()))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in net.parameters())
    net.autocast = None
    assert torch.equal(net(x), full)
