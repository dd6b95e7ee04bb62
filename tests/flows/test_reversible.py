"""Training without stored activations: the same gradients, in memory that does not grow with depth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from glem_augment import GLEM
from glem_augment.data.dataset import open_data
from glem_augment.flows import create_flow

KINDS: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "matexp": ("mef_tiny", (1, 8, 8), dict(width=[8, 8], depth=[3, 2])),
    "matexp, batched products": ("mef_tiny", (4, 8, 8), dict(width=[8, 8], depth=[2, 2])),
    "matexp, low rank": ("mef_tiny", (16, 8, 8), dict(width=[8, 8], depth=[2, 2])),
    "actnorm per channel": ("mef_tiny", (1, 8, 8), dict(width=[8, 8], depth=[3, 2], actnorm="channel")),
    "affine": ("glow_tiny", (3, 8, 8), dict(width=[8, 8], depth=[3, 2])),
}


def flow_and_images(kind: str | tuple[int, int, int], dtype: torch.dtype, batch: int = 5, **more: Any):
    """Of one of ``KINDS``, or an affine one on images of such a shape."""
    name, shape, options = ("glow_tiny", kind, KINDS["affine"][2]) if isinstance(kind, tuple) else KINDS[kind]
    torch.manual_seed(0)
    flow = create_flow(name, shape, **{**options, **more})
    x = torch.rand(128, *shape) - 0.5
    flow.initialise(x)  # on few images, the spread of an element would be a matter of luck
    for parameter in flow.parameters():
        if parameter.ndim == 4:  # the last convolutions start at zero, and a coupling that does nothing proves nothing
            torch.nn.init.normal_(parameter, std=0.04)
    return flow.to(dtype), x[:batch].to(dtype, copy=True)


def gradients(flow: torch.nn.Module, x: Tensor, memory: str) -> list[Tensor]:
    flow.set_memory(memory)
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(loss_of(*flow(x)), [x, *flow.parameters()]))


def loss_of(z: Tensor, logdet: Tensor) -> Tensor:
    """The same in every precision."""
    generator = torch.Generator().manual_seed(1)
    weight, share = (torch.randn(t.shape, generator=generator) for t in (z, logdet))
    return (z * weight.to(z)).sum() + (logdet * share.to(z)).sum()


def saved_bytes(flow: torch.nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z, logdet = flow(x)
        loss = z.square().sum() - logdet.sum()
    total = sum(kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_ordinary_ones(kind: str) -> None:
    flow, x = flow_and_images(kind, torch.float64)
    for got, want in zip(gradients(flow, x, "reversible"), gradients(flow, x, "stored"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    flow, x = flow_and_images(kind, torch.float32)
    for got, want in zip(gradients(flow, x, "reversible"), gradients(flow, x, "stored"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_values_do_not_depend_on_the_memory() -> None:
    # In float32 ELUs are computed in another way where no gradients are wanted, as between reversible steps.
    for dtype, atol in ((torch.float64, 0.0), (torch.float32, 1e-5)):
        flow, x = flow_and_images("matexp", dtype)
        z, logdet = flow(x)
        flow.set_memory("reversible")
        again, logdet_again = flow(x)
        torch.testing.assert_close(again, z, rtol=0, atol=atol)
        torch.testing.assert_close(logdet, logdet_again)
        with torch.no_grad():
            assert torch.equal(flow(x)[0], again)


@pytest.mark.parametrize("kind", ["matexp", "affine"])
def test_saved_bytes_do_not_grow_with_depth(kind: str) -> None:
    sizes = {}
    for memory in ("stored", "reversible"):
        for times in (1, 4):
            flow, x = flow_and_images(kind, torch.float32, depth=[2 * times, 2 * times])
            flow.set_memory(memory)
            sizes[memory, times] = saved_bytes(flow, x)
    assert sizes["reversible", 4] <= 1.3 * sizes["reversible", 1]
    assert sizes["stored", 4] > 3 * sizes["stored", 1]
    assert sizes["reversible", 1] < 0.25 * sizes["stored", 1]


def test_drift_over_depth_stays_small() -> None:
    """64 steps there and back: what the rebuilt activations are off by."""
    flow, x = flow_and_images("matexp", torch.float32, depth=[32, 32])
    for parameter in flow.parameters():
        if parameter.ndim == 4:  # 64 strong random couplings in a row are chaos, in either memory
            parameter.data.mul_(0.2)
    with torch.no_grad():
        back, _ = flow.inverse(flow(x)[0])
    assert float((back - x).abs().max()) < 1e-4
    for got, want in zip(gradients(flow, x, "reversible"), gradients(flow, x, "stored"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_gradients_of_a_trained_flow_on_real_images() -> None:
    model = GLEM.from_pretrained("bundled:fashion-mnist").requires_grad_(True)
    images = open_data("bundled:fashion-mnist", split="test").tensor()[::200][:8].float() / 255 - 0.5
    for got, want in zip(
        gradients(model.flow, images, "reversible"), gradients(model.flow, images, "stored"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3 * float(want.abs().max()))


def test_frozen_weights_and_gradients_to_the_image_only() -> None:
    flow, x = flow_and_images("matexp", torch.float64)
    flow.requires_grad_(False)
    found = []
    for memory in ("stored", "reversible"):
        flow.set_memory(memory)
        image = x.clone().requires_grad_()
        z, logdet = flow(image)
        found.append(torch.autograd.grad(z.square().sum() - logdet.sum(), image)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_partly_frozen() -> None:
    flow, x = flow_and_images("matexp", torch.float64)
    for parameter in flow.levels[0].norms[1].parameters():
        parameter.requires_grad_(False)
    results = []
    for memory in ("stored", "reversible"):
        flow.zero_grad(set_to_none=True)
        flow.set_memory(memory)
        z, logdet = flow(x)
        (z.square().sum() - logdet.sum()).backward()
        results.append([None if p.grad is None else p.grad.clone() for p in flow.parameters()])
    for stored, rebuilt in zip(*results, strict=True):
        assert (stored is None) == (rebuilt is None)
        if stored is not None:
            torch.testing.assert_close(rebuilt, stored, rtol=1e-9, atol=1e-9 * float(stored.abs().max()) + 1e-12)


def test_a_weight_changed_before_the_backward_pass_is_noticed() -> None:
    flow, x = flow_and_images("matexp", torch.float32)
    flow.set_memory("reversible")
    z, _ = flow(x)
    with torch.no_grad():
        next(flow.levels[0].parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="changed between the forward and the backward"):
        z.sum().backward()


def test_the_choice_is_checked_and_copied() -> None:
    flow, _ = flow_and_images("matexp", torch.float32)
    with pytest.raises(ValueError, match="'stored', 'reversible'"):
        flow.set_memory("none")
    flow.set_memory("reversible")
    assert copy.deepcopy(flow).memory == "reversible"
