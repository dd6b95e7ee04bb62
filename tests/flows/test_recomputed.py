"""Training without stored activations: the same gradients, in much less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glem_augment.flows import MultiscaleFlow, create_flow

KINDS: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "matexp": ("mef_tiny", (1, 8, 8), dict(width=[8, 8], depth=[3, 2])),
    "matexp, batched products": ("mef_tiny", (4, 8, 8), dict(width=[8, 8], depth=[2, 2])),
    "matexp, low rank": ("mef_tiny", (16, 8, 8), dict(width=[8, 8], depth=[2, 2])),
    "actnorm per channel": ("mef_tiny", (1, 8, 8), dict(width=[8, 8], depth=[3, 2], actnorm="channel")),
    "affine": ("glow_tiny", (3, 8, 8), dict(width=[8, 8], depth=[3, 2])),
}


def flow_and_images(kind: str, dtype: torch.dtype, batch: int = 5, **more: Any) -> tuple[MultiscaleFlow, Tensor]:
    name, shape, options = KINDS[kind]
    torch.manual_seed(0)
    flow = create_flow(name, shape, **{**options, **more})
    x = torch.rand(128, *shape) - 0.5
    flow.initialise(x)  # on few images, the spread of an element would be a matter of luck
    for parameter in flow.parameters():
        if parameter.ndim == 4:  # the last convolutions start at zero, and a coupling that does nothing proves nothing
            torch.nn.init.normal_(parameter, std=0.04)
    return flow.to(dtype), x[:batch].to(dtype, copy=True)


def gradients(flow: MultiscaleFlow, x: Tensor, memory: str) -> list[Tensor | None]:
    """Of the image and of every weight; None where there is none."""
    flow.set_memory(memory)
    flow.zero_grad()
    x = x.clone().requires_grad_()
    z, logdet = flow(x)
    generator = torch.Generator().manual_seed(1)
    weight, share = (torch.randn(t.shape, generator=generator).to(t) for t in (z, logdet))
    ((z * weight).sum() + (logdet * share).sum()).backward()
    return [x.grad, *(p.grad for p in flow.parameters())]


def assert_same_gradients(flow: MultiscaleFlow, x: Tensor) -> None:
    needed = [True, *(p.requires_grad for p in flow.parameters())]
    for got, want, needs in zip(gradients(flow, x, "recomputed"), gradients(flow, x, "stored"), needed, strict=True):
        assert (got is not None) == (want is not None) == needs
        assert got is None or torch.equal(got, want)


def saved_bytes(flow: MultiscaleFlow, x: Tensor) -> int:
    """Bytes kept for the backward pass, weights not counted."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z, logdet = flow(x)
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    return sum(tensor.untyped_storage().nbytes() for where, tensor in kept.items() if where not in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_ordinary_ones(kind: str) -> None:
    assert_same_gradients(*flow_and_images(kind, torch.float32))


def test_gradients_where_some_weights_are_frozen() -> None:
    flow, x = flow_and_images("matexp", torch.float64)
    level = flow.levels[0]
    for each in (level.norms[1], level.couplings[1].net.tail, flow):
        each.requires_grad_(False)
        assert_same_gradients(flow, x)


@pytest.mark.parametrize("kind", ["matexp", "affine"])
def test_few_bytes_are_saved(kind: str) -> None:
    sizes = {}
    for memory in ("stored", "recomputed"):
        for times in (1, 4):
            flow, x = flow_and_images(kind, torch.float32, depth=[2 * times, 2 * times])
            flow.set_memory(memory)
            sizes[memory, times] = saved_bytes(flow, x)
    for times in (1, 4):
        assert sizes["recomputed", times] < 0.25 * sizes["stored", times]


def test_a_weight_changed_before_the_backward_pass_is_noticed() -> None:
    flow, x = flow_and_images("matexp", torch.float32)
    with pytest.raises(ValueError, match="none"):
        flow.set_memory("none")
    flow.set_memory("recomputed")
    z, _ = flow(x)
    with torch.no_grad():
        next(flow.levels[0].couplings[0].parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="weight"):
        z.sum().backward()
