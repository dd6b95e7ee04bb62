"""Policy "adversarial": the step it takes, and everything of the classifier and the flow that it must leave alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glem_augment import GLEM, GLEMAugment, ImageData

CLASSES = ["ant", "bee", "cat", "dog"]


def images(n: int, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, channels, size, size), generator=g, dtype=torch.uint8)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 4


@pytest.fixture(scope="module")
def model() -> GLEM:
    """The linear control on 3x8x8 images, with modes of random images."""
    model = GLEM.create("identity", (3, 8, 8), classes=CLASSES)
    model.fit_modes((images(320), labels(320)), rank=32)
    return model.eval().requires_grad_(False)


def network(channels: int = 3, classes: int = 4) -> nn.Module:
    """Everything that could be disturbed: BatchNorm, dropout, a frozen layer, one kept in eval mode."""
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


def snapshot(net: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "grads": {k: (p.grad, None if p.grad is None else p.grad.clone()) for k, p in net.named_parameters()},
        "learning": {k: p.requires_grad for k, p in net.named_parameters()},
        "training": [m.training for m in net.modules()],
    }


def assert_unchanged(net: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(net)
    assert after["learning"] == before["learning"] and after["training"] == before["training"]
    assert all(torch.equal(v, before["state"][k]) for k, v in after["state"].items())
    for name, (grad, values) in before["grads"].items():
        now = after["grads"][name][0]
        assert now is grad and (grad is None or torch.equal(now, values)), name


# ---- the step -----------------------------------------------------------------------------------------


def test_the_step_is_the_gradient_of_the_loss_in_the_coefficients(model: GLEM) -> None:
    exact = copy.deepcopy(model).double()
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    x, y, t, k = images(6).double() / 255, labels(6), 0.3, 12
    aug = GLEMAugment(exact, p=1.0, policy="adversarial", strength=t, modes=k, seed=0).attach(net)
    params = aug.draw(x, y)
    out, target = aug.apply(x, y, params)
    z = exact.encode(x)[0]
    weight, bias = net[1].weight, net[1].bias
    for i in range(6):
        rows = exact.modes.scales[y[i], :k, None] * exact.modes.directions[y[i], :k]  # [k, d]
        start = t * params.eps[i].double()
        # Linear classifier: dL/dx = W^T (softmax - onehot), in closed form, and z is x but for a constant factor.
        logits = weight @ exact.decode((z[i] + start @ rows)[None]).flatten() + bias
        g = rows @ (weight.T @ (logits.softmax(0) - F.one_hot(y[i], 4)))
        c = start + t * math.sqrt(k) / 2 * g / g.norm()
        expected = exact.decode((z[i] + c @ rows)[None])[0]
        assert torch.allclose(out[i], expected, atol=1e-6)
    assert target is y


@pytest.mark.parametrize("basis", ["class", "shared"])
def test_the_move_is_half_as_long_as_the_noise_and_along_the_basis(model: GLEM, basis: str) -> None:
    x, y = images(8) / 255, labels(8)
    settings: dict[str, Any] = {"p": 1.0, "strength": 0.2, "modes": 16, "basis": basis, "seed": 0}
    noise = GLEMAugment(model, policy="noise", **settings)
    aug = GLEMAugment(model, policy="adversarial", **settings).attach(network())
    params = aug.draw(x, y)
    assert torch.equal(params.eps, noise.draw(x, y).eps)
    step = model.encode(aug.apply(x, y, params)[0])[0] - model.encode(noise.apply(x, y, params)[0])[0]
    flow = aug._held.flow(x.device)
    v, s = flow.directions, flow.scales
    v, s = (v[y], s[y]) if basis != "shared" else (v.expand(8, -1, -1), s.expand(8, -1))
    c = torch.einsum("nd,nkd->nk", step, v) / s
    assert torch.allclose(c.norm(dim=1), torch.full((8,), 0.2 * 4 / 2), rtol=1e-2)
    back = torch.einsum("nk,nkd->nd", c * s, v)
    assert torch.allclose(back, step, atol=1e-5)


def test_it_raises_the_loss_of_a_real_flow_and_network(bundled_train: ImageData) -> None:
    model = GLEM.from_pretrained("bundled:fashion-mnist")
    x, y = bundled_train.tensor()[:16].float() / 255, torch.from_numpy(bundled_train.targets[:16])
    x = (x - 0.3) / 0.35
    net = network(1, 10)
    settings: dict[str, Any] = {"p": 1.0, "strength": 0.5, "mean": 0.3, "std": 0.35, "seed": 0}
    noise = GLEMAugment(model, policy="noise", **settings)
    aug = GLEMAugment(model, policy="adversarial", **settings).attach(net)
    params = aug.draw(x, y)
    plain, worst = noise.apply(x, y, params)[0], aug.apply(x, y, params)[0]
    assert torch.equal(worst, aug.apply(x, y, params)[0])  # a call can be replayed
    frozen = copy.deepcopy(net).eval()
    with torch.no_grad():
        before, after = (F.cross_entropy(frozen(v), y, reduction="none") for v in (plain, worst))
    assert (after > before).float().mean() > 0.8 and float(after.mean()) > float(before.mean())
    assert aug.stats["replaced"] <= 6 and not worst.requires_grad


def test_strength_zero_and_dead_gradients_leave_the_start(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", strength=0.0, modes=8, seed=0).attach(network())
    assert torch.allclose(aug(x, y)[0], x, atol=1e-6)
    noise = GLEMAugment(model, p=1.0, policy="noise", modes=8, seed=0)(x, y)[0]
    for factor in (0.0, float("nan"), float("inf")):
        aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
        aug.attach(network(), loss=lambda logits, _, f=factor: (logits * f).sum())
        assert torch.equal(aug(x, y)[0], noise)
    steep = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        steep[1].weight.zero_()[0, 0] = 1e38
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    aug.attach(steep, loss=lambda logits, _: 100 * logits[:, 0])  # infinite, and no NaN
    assert torch.equal(aug(x, y)[0], noise)


# ---- what must not change -----------------------------------------------------------------------------


def test_classifier_flow_and_random_state_are_left_alone(model: GLEM) -> None:
    net, x, y = network(), images(8) / 255, labels(8)
    F.cross_entropy(net(x), y).backward()
    learning = copy.deepcopy(model).requires_grad_(True).train()
    before, flow_before = snapshot(net), snapshot(learning)
    aug = GLEMAugment(learning, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)
    random = torch.get_rng_state()
    out, _ = aug(x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert_unchanged(net, before)
    assert_unchanged(learning, flow_before)
    assert not out.requires_grad and list(aug.modules()) == [aug] and not list(aug.parameters())

    def broken(logits: Tensor, _: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")

    aug.attach(net, loss=broken)
    with pytest.raises(RuntimeError, match="say"):
        aug(x, y)
    assert_unchanged(net, before)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_classifier_with_gradient_checkpointing(model: GLEM, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=reentrant)

    net, x, y = Checkpointed(), images(8) / 255, labels(8)
    before = snapshot(net)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    out = aug.attach(net)(x, y)[0]
    assert_unchanged(net, before)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    torch.testing.assert_close(out, aug.attach(net.net)(x, y)[0])


def test_overridden_train_methods_are_not_called(model: GLEM) -> None:
    class Merging(nn.Sequential):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train() was called")

    net = Merging(*network())
    GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)(images(4) / 255, labels(4))


def test_a_training_step_after_it_gives_the_gradients_it_would_have_given(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    grads = []
    for attack in (False, True):
        torch.manual_seed(0)
        net = network()
        if attack:
            GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)(x, y)
        F.cross_entropy(net(x), y).backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(model: GLEM, process_group: None) -> None:
    x, y = images(8) / 255, labels(8)
    ddp = nn.parallel.DistributedDataParallel(network())
    assert unwrap_model(ddp) is ddp.module
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(ddp)
    alone = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(copy.deepcopy(ddp.module))
    for _ in range(3):
        out, _ = aug(x, y)
        before = [p.grad for p in ddp.parameters()]
        assert torch.equal(out, alone(x, y)[0])
        assert all(a is p.grad for a, p in zip(before, ddp.parameters(), strict=True))
        F.cross_entropy(ddp(out), y).backward()  # DDP complains where a reduction was left unfinished
        assert all((p.grad is not None) == p.requires_grad for p in ddp.parameters())
        ddp.zero_grad(set_to_none=True)
        alone.attach(copy.deepcopy(ddp.module))


def _rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    flow = GLEM.create("identity", (3, 8, 8), classes=CLASSES)
    flow.fit_modes((images(80), labels(80)), rank=8)
    ddp = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    aug = GLEMAugment(flow, p=0.5, policy="adversarial", modes=8, seed=0).attach(ddp)
    chosen = []
    for _ in range(4):  # ranks attack other rows, and other numbers of them
        params = aug.draw(images(6, seed=rank) / 255, labels(6))
        chosen.append(params.rows.tolist())
        x, y = aug.apply(images(6, seed=rank) / 255, labels(6), params)
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    torch.save({"weights": list(ddp.module.parameters()), "chosen": chosen}, f"{out}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_stay_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert a["chosen"] != b["chosen"]
    assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))


# ---- precision and formats ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["around", "attached", "nowhere"])
def test_mixed_precision_is_the_classifiers_alone(model: GLEM, where: str) -> None:
    net, seen = network(), {}
    net[7].register_forward_hook(lambda m, inputs, out: seen.update(out=out.dtype, x=inputs[0].dtype))
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    aug.attach(net, autocast=torch.bfloat16 if where == "attached" else None)
    x, y = images(8) / 255, labels(8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around"):
        out, _ = aug(x, y)
        assert torch.is_autocast_enabled("cpu") == (where == "around")
    assert seen["out"] == (torch.float32 if where == "nowhere" else torch.bfloat16)
    full = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)(x, y)[0]
    assert out.dtype == torch.float32
    # bf16 turns the direction by a few per cent, not more; the flow's own arithmetic must not be in it.
    moved, wanted = (out - x).flatten(1), (full - x).flatten(1)
    assert F.cosine_similarity(moved, wanted).min() > (0.9999 if where == "nowhere" else 0.97)


def test_small_losses_keep_their_direction_in_float16(model: GLEM) -> None:
    net, x, y = network(), images(8) / 255, labels(8)
    moves = []
    for dtype in (None, torch.float16):
        aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
        aug.attach(net, loss=lambda logits, t: 1e-5 * F.cross_entropy(logits.float(), t), autocast=dtype)
        moves.append((aug(x, y)[0] - x).flatten(1))
    assert F.cosine_similarity(*moves).min() > 0.97


def test_weights_in_half_precision_without_autocast(model: GLEM) -> None:
    """As in timm's train.py with --model-dtype, which casts what comes out of the loader."""
    single = network()
    net = copy.deepcopy(single).to(torch.bfloat16)
    before = snapshot(net)
    x, y = images(6) / 255, labels(6)

    def moved(policy: str, classifier: nn.Module) -> Tensor:
        aug = GLEMAugment(model, p=1.0, policy=policy, modes=8, strength=0.5, seed=0)
        return (aug if policy == "noise" else aug.attach(classifier))(x, y)[0]

    start = moved("noise", net)  # of the same draws
    step, exact = ((moved("adversarial", one) - start).flatten(1) for one in (net, single))
    assert step.dtype == torch.float32
    # The same steps, but for what bfloat16 rounds.
    assert F.cosine_similarity(step, exact).min() > 0.9
    assert_unchanged(net, before)


def test_the_callers_matmul_precision_reaches_the_classifier(model: GLEM) -> None:
    net, seen = network(), []
    net[7].register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)
    torch.set_float32_matmul_precision("medium")
    try:
        aug(images(4) / 255, labels(4))
        assert seen == ["medium"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 20])
def test_sizes_dtypes_and_memory_formats(model: GLEM, dtype: torch.dtype, size: int) -> None:
    seen = {}
    x = images(6, size=size).contiguous(memory_format=torch.channels_last)
    x = x if dtype == torch.uint8 else (x / 255).to(dtype)
    net = network().to(torch.float32 if dtype == torch.uint8 else dtype)
    net.register_forward_pre_hook(lambda m, i: seen.update(x=i[0]))
    before = x.clone()
    out, y = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)(x, labels(6))
    assert torch.equal(x, before) and out.dtype == dtype and out.shape == x.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert seen["x"].is_contiguous(memory_format=torch.channels_last)
    assert seen["x"].dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert (out.double() - x.double()).abs().max() > 0.01


def test_the_classifier_sees_what_the_transform_gives(model: GLEM) -> None:
    """Normalised, at full size, with fine detail: its input is the noise image as the user would get it."""
    seen = {}
    net = network()
    net.register_forward_pre_hook(lambda m, i: seen.update(x=i[0].detach()))
    x, y = (images(6, size=20) / 255 - 0.4) / 0.2, labels(6)
    settings: dict[str, Any] = {"p": 1.0, "strength": 0.3, "modes": 8, "mean": 0.4, "std": 0.2, "seed": 0}
    aug = GLEMAugment(model, policy="adversarial", **settings).attach(net)
    noise = GLEMAugment(model, policy="noise", **settings)
    params = aug.draw(x, y)
    aug.apply(x, y, params)
    assert torch.allclose(seen["x"], noise.apply(x, y, params)[0], atol=1e-5)


# ---- labels and losses --------------------------------------------------------------------------------


def test_labels_out(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    soft = F.one_hot(y, 4) * 0.9 + 0.025
    net = network()
    for kind, expected in (("auto", y), ("hard", y), ("mix", F.one_hot(y, 4).float())):
        aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, labels=kind, seed=0).attach(net)
        assert torch.equal(aug(x, y)[1], expected)
        assert torch.equal(aug(x, soft)[1], soft)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, labels="posterior", seed=0).attach(net)
    out, posterior = aug(x, y)
    assert torch.allclose(posterior, model.posterior(out), atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_may_reduce_as_it_likes(model: GLEM, reduction: str) -> None:
    net, x, y = network(), images(8) / 255, labels(8)
    plain = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(net)(x, y)[0]
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    aug.attach(net, loss=nn.CrossEntropyLoss(reduction=reduction))
    assert torch.allclose(aug(x, y)[0], plain, atol=1e-5)


def test_timm_losses_and_a_timm_network(model: GLEM) -> None:
    net = timm.create_model("resnet10t", num_classes=4)
    before = snapshot(net)
    x, y = images(4, size=32) / 255, labels(4)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    hard = aug.attach(net, LabelSmoothingCrossEntropy(0.1))(x, y)[1]
    soft = aug.attach(net, SoftTargetCrossEntropy())(x, F.one_hot(y, 4).float())[1]
    assert hard is y and soft.shape == (4, 4)
    assert_unchanged(net, before)


def test_partial_class_map_and_unselected_rows(model: GLEM) -> None:
    x, y = images(20) / 255, torch.arange(20) % 5
    aug = GLEMAugment(model, p=0.7, policy="adversarial", modes=8, class_map=[2, None, 0, 3, 1], seed=0)
    aug.attach(network(classes=5))
    params = aug.draw(x, y)
    out, _ = aug.apply(x, y, params)
    moved = (out != x).flatten(1).any(1)
    expected = torch.zeros(20, dtype=torch.bool)
    expected[params.rows] = True
    assert torch.equal(moved, expected & (y != 1)) and aug.stats["unmapped"] == int((expected & (y == 1)).sum())


# ---- bad input ----------------------------------------------------------------------------------------


def test_errors_say_what_to_do(model: GLEM) -> None:
    x, y = images(4) / 255, labels(4)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0)
    with pytest.raises(ValueError, match=r"aug\.attach\(classifier\)"):
        aug(x, y)
    with pytest.raises(ValueError, match="policy='noise'"):
        GLEMAugment(model, policy="noise", modes=8).attach(network())
    with pytest.raises(TypeError, match="torch.nn.Module"):
        aug.attach(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output, labels"):
        aug.attach(network(), loss=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="autocast must be"):
        aug.attach(network(), autocast=torch.float32)
    with pytest.raises(ValueError, match="classifier 7"):
        aug.attach(network(classes=7))(x, F.one_hot(y, 4).float())
    with pytest.raises(ValueError, match=r"logits \[4, classes\]"):
        aug.attach(nn.Conv2d(3, 4, 3))(x, y)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        aug.attach(network())(x, y)

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :4]

    with pytest.raises(RuntimeError, match="no gradient reaches"):
        aug.attach(Detached())(x, y)
    with pytest.raises(ValueError, match="needs a partner"):
        GLEMAugment(model, policy="adversarial", modes=8, detail="mix")


def test_copies_do_not_take_the_classifier_along(model: GLEM) -> None:
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(network())
    with pytest.raises(ValueError, match="on a copy, again"):
        copy.deepcopy(aug)(images(4) / 255, labels(4))


class _InWorker(torch.utils.data.Dataset):
    def __init__(self, aug: GLEMAugment) -> None:
        self.aug = aug

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return self.aug(images(4) / 255, labels(4))[0]


def test_workers_are_refused(model: GLEM) -> None:
    aug = GLEMAugment(model, p=1.0, policy="adversarial", modes=8, seed=0).attach(network())
    with pytest.raises(RuntimeError, match="cannot run in a DataLoader worker"):
        next(iter(torch.utils.data.DataLoader(_InWorker(aug), num_workers=1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
def test_cuda_gives_what_the_cpu_gives_without_waiting(model: GLEM, half: torch.dtype | None) -> None:
    net, x, y = network(), images(16) / 255, labels(16)
    aug = GLEMAugment(model, p=0.6, policy="adversarial", modes=8, seed=0).attach(net)
    params = aug.draw(x, y)
    host, _ = aug.apply(x, y, params)
    net.cuda()
    aug.attach(net, autocast=half)
    out, _ = aug.apply(x.cuda(), y.cuda(), params)
    moved, wanted = (out.cpu() - x).flatten(1)[params.rows], (host - x).flatten(1)[params.rows]
    assert F.cosine_similarity(moved, wanted).min() > (0.9999 if half is None else 0.95)
    xd, yd = x.cuda(), y.cuda()
    aug(xd, yd)
    torch.cuda.set_sync_debug_mode("error")
    try:
        aug(xd, yd)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_step_counts_the_modes_that_a_class_of_few_images_has() -> None:
    few = GLEM.create("identity", (3, 8, 8), classes=["a", "b"])
    y = torch.tensor([0] * 5 + [1] * 40)
    few.fit_modes((images(45), y), rank=16)
    few.eval().requires_grad_(False)
    assert few.modes is not None and (few.modes.scales[0] > 0).sum() < 5 < (few.modes.scales[1] > 0).sum() == 16
    x, y = images(2) / 255, torch.tensor([0, 1])
    settings: dict[str, Any] = {"p": 1.0, "strength": 0.2, "modes": 16, "seed": 0}
    aug = GLEMAugment(few, policy="adversarial", **settings).attach(network(classes=2))
    noise = GLEMAugment(few, policy="noise", **settings)
    params = aug.draw(x, y)
    step = few.encode(aug.apply(x, y, params)[0])[0] - few.encode(noise.apply(x, y, params)[0])[0]
    v, s = few.modes.directions[y], few.modes.scales[y]
    c = torch.where(s > 0, torch.einsum("nd,nkd->nk", step, v) / s, 0.0).norm(dim=1)
    real = (s > 0).sum(1)
    assert torch.allclose(c, 0.2 * real.sqrt() / 2, rtol=1e-2)


class TwoHeads(nn.Module):
    """Features or a second head beside the logits."""

    def __init__(self, give: str) -> None:
        super().__init__()
        self.body, self.give = network(), give

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        return {
            "one matrix": (x, logits),
            "features": (x.flatten(1), logits),
            "two heads": [logits, -logits],
        }[self.give]


def test_several_outputs(model: GLEM) -> None:
    x, y = images(8), labels(8)
    aug = GLEMAugment(model, p=1.0, policy="adversarial", seed=0)
    plain = TwoHeads("one matrix")
    expected = copy.deepcopy(aug).attach(plain.body)(x, y)[0]
    assert torch.equal(copy.deepcopy(aug).attach(plain)(x, y)[0], expected)
    for give in ("features", "two heads"):
        net = TwoHeads(give)
        net.load_state_dict(plain.state_dict())
        with pytest.raises(ValueError, match="2 things, 2 of them matrices.*Give attach a loss"):
            copy.deepcopy(aug).attach(net)(x, y)
        which = 1 if give == "features" else 0
        got = copy.deepcopy(aug).attach(net, loss=lambda out, y: F.cross_entropy(out[which], y))(x, y)[0]  # noqa: B023
        assert torch.equal(got, expected)
    both = copy.deepcopy(aug).attach(net, loss=lambda out, y: F.cross_entropy(out[0], y) + F.cross_entropy(out[1], y))
    assert both(x, y)[0].shape == x.shape


def test_a_network_that_is_not_registered_gets_no_gradients_and_a_warning(model: GLEM) -> None:
    class Wrap(nn.Module):
        def __init__(self, f: Any) -> None:
            super().__init__()
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x)

    net = network()
    with pytest.warns(UserWarning, match="attach the network itself"):
        aug = GLEMAugment(model, p=1.0, policy="adversarial", seed=0).attach(Wrap(lambda x: net(x)))
    aug(images(8), labels(8))
    assert all(p.grad is None for p in net.parameters())


def test_modules_compiled_in_place_run_as_they_are_written(model: GLEM) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Net(nn.Module):  # Dynamo leaves a bare nn.Sequential alone
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    net = Net()
    aug = GLEMAugment(model, p=1.0, policy="adversarial", seed=0)
    expected = copy.deepcopy(aug).attach(net)(images(8), labels(8))[0]
    net.compile(backend=backend)
    assert torch.equal(aug.attach(net)(images(8), labels(8))[0], expected) and not graphs
    net(images(4) / 255)
    assert graphs
