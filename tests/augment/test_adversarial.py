"""Policy Adversarial: its step, and everything of the classifier and the model that must stay as it is."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from augment_cases import images as any_images
from augment_cases import labels, make_model
from torch import Tensor, nn

from glem_augment import GLEM, Adversarial, GLEMAugment, Noise

images = partial(any_images, channels=3)


@pytest.fixture(scope="module")
def model() -> GLEM:
    return make_model(3, rank=32)


def make(model: GLEM, kind: type[Noise] = Adversarial, strength: float = 0.5, **settings: Any) -> GLEMAugment:
    return GLEMAugment(model, kind(strength), **{"p": 1.0, "modes": 8, "seed": 0, **settings})


def network(channels: int = 3, classes: int = 4) -> nn.Sequential:
    """A network with everything that could be disturbed: BatchNorm, dropout, a frozen layer, one kept in eval mode."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, classes),
    ).train()
    net[0].weight.requires_grad_(False)
    net[3].eval()
    return net


def snapshot(net: nn.Module) -> list[Any]:
    """Everything of a module that a call must leave as it is."""
    values = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    flags = [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]
    return [flags, *(None if v is None else v.clone() for v in values)]


def assert_unchanged(net: nn.Module, before: list[Any]) -> None:
    for now, then in zip(snapshot(net), before, strict=True):
        assert torch.equal(now, then) if isinstance(then, Tensor) else now == then


def test_the_step_is_the_gradient_of_the_loss_in_the_coefficients(model: GLEM) -> None:
    exact = copy.deepcopy(model).double()
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    x, y, t, k = images(6).double() / 255, labels(6), 0.3, 12
    aug = make(exact, p=0.7, strength=t, modes=k).attach(net)
    params = aug.draw(x, y)
    assert torch.equal(params.drawn["eps"], make(exact, Noise, p=0.7, modes=k).draw(x, y).drawn["eps"])
    out, target = aug.replay(x, y, params)
    z = exact.encode(x)[0]
    weight, bias = net[1].weight, net[1].bias
    assert 4 <= len(params.rows) < 6
    for i, eps in zip(params.rows.tolist(), params.drawn["eps"], strict=True):
        v, s = exact.modes.directions[y[i]], exact.modes.scales[y[i]]
        rows = s[:k, None] * v[:k]  # [k, d]
        start = t * eps.double()
        # Linear classifier: dL/dx = W^T (softmax - onehot), in closed form, and z is x but for a constant factor.
        logits = weight @ exact.decode((z[i] + start @ rows)[None]).flatten() + bias
        g = rows @ (weight.T @ (logits.softmax(0) - F.one_hot(y[i], 4)))
        c = start + t * math.sqrt(k) / 2 * g / g.norm()
        assert torch.allclose(out[i], exact.decode((z[i] + c @ rows)[None])[0], atol=1e-6)
    assert target is y


def test_the_step_counts_the_modes_that_a_class_of_few_images_has() -> None:
    few = GLEM.create("identity", (3, 8, 8), classes=["a", "b"])
    few.fit_modes((images(45), torch.tensor([0] * 5 + [1] * 40)), rank=16)
    few.eval().requires_grad_(False)
    x, y = images(2) / 255, torch.tensor([0, 1])
    aug = make(few, modes=16, strength=0.2).attach(network(classes=2))
    noise = make(few, Noise, modes=16, strength=0.2)
    params = aug.draw(x, y)
    step = few.encode(aug.replay(x, y, params)[0])[0] - few.encode(noise.replay(x, y, params)[0])[0]
    v, s = few.modes.directions[y], few.modes.scales[y]
    length = torch.where(s > 0, torch.einsum("nd,nkd->nk", step, v) / s, 0.0).norm(dim=1)
    assert (s > 0).sum(1).tolist() == [4, 16]
    assert torch.allclose(length, 0.2 * torch.tensor([4.0, 16.0]).sqrt() / 2, rtol=1e-2)


def test_strength_zero_and_dead_gradients_leave_the_start(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    assert torch.allclose(make(model, strength=0.0).attach(network())(x, y)[0], x, atol=1e-6)
    noise = make(model, Noise)(x, y)[0]
    for factor in (0.0, float("nan"), float("inf")):
        aug = make(model).attach(network(), loss=lambda logits, _, f=factor: (logits * f).sum())
        assert torch.equal(aug(x, y)[0], noise)


def test_classifier_flow_and_random_state_are_left_alone(model: GLEM) -> None:
    net, x, y = network(), images(8) / 255, labels(8)
    F.cross_entropy(net(x), y).backward()
    learning = copy.deepcopy(model).requires_grad_(True).train()
    before, flow_before = snapshot(net), snapshot(learning)
    aug = make(learning).attach(net)
    random = torch.get_rng_state()
    out, _ = aug(x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert_unchanged(net, before)
    assert_unchanged(learning, flow_before)
    assert not out.requires_grad and list(aug.modules()) == [aug] and not list(aug.parameters())

    def broken(logits: Tensor, _: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="say"):
        aug.attach(net, loss=broken)(x, y)
    assert_unchanged(net, before)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    for wrapped in (nn.DataParallel(net), torch.compile(net)):
        assert aug.attach(wrapped)._classifier.module is net


@pytest.mark.parametrize(
    ("weights", "around", "attached", "seen"),
    [
        ("float32", None, None, "float32"),
        ("float32", "bfloat16", None, "bfloat16"),
        ("float32", None, "float16", "float16"),
        ("bfloat16", None, None, "bfloat16"),  # as timm's train.py --model-dtype casts them, and its batches later
    ],
)
def test_mixed_precision_is_the_classifiers_alone(
    model: GLEM, weights: str, around: str | None, attached: str | None, seen: str
) -> None:
    """The loss is small, so that its gradients underflow in float16 unless they are scaled."""
    x, y = images(8) / 255, labels(8)
    start = make(model, Noise)(x, y)[0]  # of the same draws
    steps = []
    for kind, autocast in (("float32", None), (weights, attached and getattr(torch, attached))):
        net, found = network().to(getattr(torch, kind)), {}
        net[7].register_forward_hook(lambda m, inputs, out, found=found: found.update(dtype=out.dtype))
        aug = make(model).attach(net, lambda out, t: 1e-5 * F.cross_entropy(out.float(), t), autocast=autocast)
        mixed = around if steps else None
        with torch.autocast("cpu", dtype=getattr(torch, mixed or "bfloat16"), enabled=mixed is not None):
            out, _ = aug(x, y)
            assert torch.is_autocast_enabled("cpu") == (mixed is not None)
        assert out.dtype == torch.float32
        steps.append((out - start).flatten(1))
    assert found["dtype"] == getattr(torch, seen)
    # Half precision turns the direction by a little; the flow's own arithmetic must not be in it.
    assert F.cosine_similarity(*steps).min() > (0.9999 if seen == "float32" else 0.9)


@pytest.mark.parametrize(("dtype", "size"), [(torch.uint8, 20), (torch.float64, 8), (torch.bfloat16, 20)])
def test_the_classifier_sees_what_the_transform_gives(model: GLEM, dtype: torch.dtype, size: int) -> None:
    """Normalised, at full size, with fine detail, in the dtype of the batch (uint8: as floats in [0, 1])."""
    seen: list[Tensor] = []
    whole = dtype == torch.uint8
    settings = {} if whole else {"mean": 0.4, "std": 0.2}
    x, y = images(6, size=size) if whole else ((images(6, size=size) / 255 - 0.4) / 0.2).to(dtype), labels(6)
    net = network().to(torch.float32 if whole else dtype)
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    aug = make(model, **settings).attach(net)
    params, before = aug.draw(x, y), x.clone()
    out, _ = aug.replay(x, y, params)
    start = make(model, Noise, **settings).replay(x, y, params)[0]
    assert torch.equal(x, before) and out.dtype == dtype
    assert seen[-1].dtype == (torch.float32 if whole else dtype)
    shown, atol = (seen[-1] * 255, 0.51) if whole else (seen[-1], 1e-5)
    assert torch.allclose(shown.double(), start.double(), atol=atol)
    assert (out.double() - start.double()).abs().max() > 0.01


def attack(aug: GLEMAugment, samples: list[Any]) -> Any:
    return copy.copy(aug).attach(network())(images(4) / 255, labels(4))


def test_errors_say_what_to_do(model: GLEM) -> None:
    x, y = images(4) / 255, labels(4)
    aug = make(model)
    for lost in (aug, copy.deepcopy(make(model).attach(network()))):
        with pytest.raises(ValueError, match="attach"):
            lost(x, y)
    with pytest.raises(ValueError, match="Noise"):
        make(model, Noise).attach(network())
    with pytest.raises(ValueError, match=r"\[4, 7\].*classes="):
        aug.attach(network(classes=7))(x, F.one_hot(y, 4).float())
    with pytest.raises(ValueError, match=r"gives \[4, 3\], .* 4 classes"):
        aug.attach(network(classes=3))(x, y)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        aug.attach(network())(x, y)
    with pytest.raises(RuntimeError, match="worker"):
        next(iter(torch.utils.data.DataLoader([0], num_workers=1, collate_fn=partial(attack, aug))))
