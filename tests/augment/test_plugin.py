"""The ways into a training loop: a wrapped loader, timm's mixup_fn, a collate function, a torchvision v2 transform."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_loader, resolve_model_data_config
from timm.data.loader import fast_collate
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.proof.sharpness import upper_energy
from glem_augment import GLEM, ClassMismatchError, GLEMAugment, SyntheticDataset, open_data
from glem_augment.augment.loops import AugmentedLoader
from glem_augment.augment.mixup import mix_soft
from glem_augment.evaluation.tuning import choose_strength

CLASSES = ["bird", "cat", "dog"]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def images(n: int, size: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, 3, size, size), generator=g, dtype=torch.uint8)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


@pytest.fixture(scope="module")
def model() -> GLEM:
    model = GLEM.create("identity", (3, 8, 8), classes=CLASSES)
    model.fit_modes((images(240), labels(240)), rank=16)
    return model.eval().requires_grad_(False)


def make(model: GLEM, **settings: Any) -> GLEMAugment:
    return GLEMAugment(model, **{"p": 1.0, "modes": 16, "seed": 0, **settings})


def loader(n: int = 10, batch: int = 4, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(images(n) / 255, labels(n)), batch_size=batch, **settings)


def timm_loader(folder: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "input_size": (3, 16, 16),
        "batch_size": 4,
        "is_training": True,
        "no_aug": True,
        "num_workers": 0,
        "persistent_workers": False,
        "mean": MEAN,
        "std": STD,
        "device": torch.device("cpu"),
    }
    return create_loader(ImageDataset(str(folder)), **{**given, **settings})


# ---- wrap ---------------------------------------------------------------------------------------------


def test_a_wrapped_loader_behaves_as_the_loader(model: GLEM) -> None:
    inner = loader()
    wrapped = make(model).wrap(inner)
    assert len(wrapped) == len(inner) == 3
    for name in ("dataset", "sampler", "batch_size", "collate_fn", "num_workers"):
        assert getattr(wrapped, name) is getattr(inner, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        wrapped.nothing_of_the_kind  # noqa: B018
    assert "AugmentedLoader" in repr(wrapped)
    sizes = []
    for (x, y), (before, target) in zip(wrapped, inner, strict=True):
        assert x.shape == before.shape and x.dtype == before.dtype and torch.equal(y, target)
        assert (x != before).flatten(1).any(1).all()
        sizes.append(len(x))
    assert sizes == [4, 4, 2]
    copied = pickle.loads(pickle.dumps(wrapped))
    assert isinstance(copied, AugmentedLoader) and len(copied) == 3
    wrapped.timeout = 5.0
    assert inner.timeout == 5.0 and wrapped.timeout == 5.0
    with pytest.raises(ValueError, match="batch_size"):
        wrapped.batch_size = 2
    wrapped.note = "mine"
    assert wrapped.note == "mine" and not hasattr(inner, "note")


def test_epochs_switches_and_changing_batch_sizes(model: GLEM) -> None:
    inner = loader()
    first = [x for x, _ in inner]

    def changed(wrapped: AugmentedLoader) -> list[bool]:
        return [not torch.equal(x, before) for (x, _), before in zip(wrapped, first, strict=True)]

    wrapped = make(model).wrap(inner, off_epoch=2)
    assert wrapped.mixup_enabled and wrapped.epoch == 0
    assert [all(changed(wrapped)) for _ in range(4)] == [True, True, False, False] and wrapped.epoch == 4
    wrapped.epoch = 0
    assert all(changed(wrapped))
    wrapped.mixup_enabled = False
    assert not wrapped.mixup_enabled and not any(changed(wrapped))
    wrapped.mixup_enabled = True
    wrapped.epoch = 1
    assert all(changed(wrapped)) and not any(changed(wrapped))
    varied = [(images(n, size) / 255, labels(n)) for n, size in ((1, 8), (5, 16), (2, 30))]
    assert [len(x) for x, _ in make(model).wrap(varied)] == [1, 5, 2]


def test_labels_keep_their_form_when_switched_off(model: GLEM) -> None:
    wrapped = make(model, partner="any").wrap(loader(), off_epoch=1)
    on, off = (next(iter(wrapped))[1] for _ in range(2))
    assert on.shape == off.shape == (4, 3) and torch.equal(off, F.one_hot(labels(4), 3).float())
    wrapped = make(model, partner="same").wrap(loader(), off_epoch=0)
    assert next(iter(wrapped))[1].dtype == torch.int64


def test_moves_that_do_not_take_place_are_told_once(model: GLEM, recwarn: pytest.WarningsRecorder) -> None:
    list(make(model, policy="noise").wrap(loader(200)))
    list(make(model, policy="noise", class_map=[0, 1, None]).wrap(loader(60)))  # too few to say
    wrapped = make(model, policy="noise", class_map=[0, 1, None]).wrap(loader(400))
    for _ in range(2):
        list(wrapped)
    told = [str(w.message) for w in recwarn.list if "of 400 images chosen" in str(w.message)]
    assert len(told) == 1 and "0 were kept" in told[0] and "133, because the flow does not know" in told[0]
    assert len(recwarn.list) == 1


def test_lists_stay_lists_and_further_items_are_passed_on(model: GLEM) -> None:
    batch = [images(4) / 255, labels(4), "names"]
    (out,) = make(model).wrap([batch])
    assert isinstance(out, list) and out[2] == "names"
    (out,) = make(model).wrap([tuple(batch)])
    assert isinstance(out, tuple) and len(out) == 3


def test_the_device_of_the_batches(model: GLEM) -> None:
    (out,) = make(model).wrap([(images(4) / 255, labels(4))], device="cpu")
    assert out[0].device.type == "cpu"
    if torch.cuda.is_available():
        (out,) = make(model).wrap([(images(4) / 255, labels(4))], device="cuda")
        assert out[0].is_cuda and out[1].is_cuda


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_a_training_step_after_timms_own_loader(model: GLEM, image_folder: Path, prefetch: bool, soft: bool) -> None:
    collate = FastCollateMixup(num_classes=3, label_smoothing=0.1) if prefetch and soft else None
    inner = timm_loader(image_folder, use_prefetcher=prefetch, collate_fn=collate)
    aug = make(model, mean=MEAN, std=STD, partner="any" if soft else "same")
    wrapped = aug.wrap(inner)
    assert wrapped.sampler is inner.sampler and wrapped.dataset is inner.dataset
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    net = net.to(memory_format=torch.channels_last)
    loss_fn = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(0.1)
    total = 0
    for x, y in wrapped:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_fn(net(x.contiguous(memory_format=torch.channels_last)), y).backward()
        total += len(x)
    assert total == 12 and aug.stats["selected"] == 12 and aug.stats["replaced"] == 0
    if collate is not None:
        wrapped.mixup_enabled = False
        assert not collate.mixup_enabled and not inner.mixup_enabled


def test_normalised_batches_come_back_normalised(model: GLEM, image_folder: Path) -> None:
    inner = timm_loader(image_folder, is_training=False)
    wrapped = make(model, mean=MEAN, std=STD, policy="noise", strength=0.05).wrap(inner)
    for (x, y), (before, target) in zip(wrapped, inner, strict=True):
        m, s = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        change = ((x - before) * s).abs()
        assert torch.equal(y, target) and 1e-3 < change.mean() < 0.05
        assert (x * s + m).min() > -1e-4 and (x * s + m).max() < 1 + 1e-4


def test_a_loader_that_normalises_otherwise_is_refused(model: GLEM, image_folder: Path) -> None:
    inner = timm_loader(image_folder)
    with pytest.raises(ValueError, match=r"mean=\(0.48, 0.46, 0.41\), std=\(0.27, 0.26, 0.28\)"):
        make(model).wrap(inner)
    with pytest.raises(ValueError, match="normalises"):
        make(model, mean=MEAN, std=(0.5, 0.5, 0.5)).wrap(inner)
    half = timm_loader(image_folder, img_dtype=torch.bfloat16)
    (x, _), *_ = make(model, mean=MEAN, std=STD).wrap(half)
    assert x.dtype == torch.bfloat16


class Named(TensorDataset):
    """A data set that says its classes."""

    def __init__(self, classes: list[str]) -> None:
        super().__init__(images(4), labels(4))
        self.classes = classes


def test_classes_in_another_order_are_noticed(image_folder: Path) -> None:
    other = GLEM.create("identity", (3, 8, 8), classes=["dog", "bird", "cat"])
    other.fit_modes((images(240), labels(240)), rank=16)
    inner = timm_loader(image_folder)
    with pytest.raises(ClassMismatchError, match=r"class 0 is 'bird', the flow's 'dog'.*here \[1, 2, 0\]"):
        make(other, mean=MEAN, std=STD).wrap(inner)
    wrapped = make(other, mean=MEAN, std=STD, class_map=[1, 2, 0]).wrap(inner)
    assert len(list(wrapped)) == 3
    torchvision = DataLoader(ImageFolder(str(image_folder)))
    with pytest.raises(ClassMismatchError, match="class_map=match_classes"):
        make(other).wrap(torchvision)
    within = ImageFolder(str(image_folder))
    for data in (Subset(within, [0, 1]), ConcatDataset([Subset(within, [0]), within])):
        with pytest.raises(ClassMismatchError, match="class_map=match_classes"):
            make(other).wrap(DataLoader(data))
    partly = Named(["dog", "cat", "zebra"])
    with pytest.raises(ClassMismatchError, match=r"class 1 is 'cat', the flow's 'bird'.*here \[0, 2, -1\]"):
        make(other).wrap(DataLoader(partly))
    make(other).wrap(DataLoader(Named(["dog", "bird", "zebra"])))  # the flow has another name for the third
    unnamed = GLEM.create("identity", (3, 8, 8), classes=["one", "two", "three"])
    unnamed.fit_modes((images(240), labels(240)), rank=16)
    make(unnamed).wrap(torchvision)


def test_mean_and_std_from_timm(model: GLEM) -> None:
    config = resolve_model_data_config(timm.create_model("resnet10t"))
    aug = make(model, mean=config["mean"], std=config["std"])
    assert aug.pixels.mean == tuple(config["mean"])


def test_adversarial_in_a_loop(model: GLEM, image_folder: Path) -> None:
    net = timm.create_model("resnet10t", num_classes=3)
    aug = make(model, mean=MEAN, std=STD, policy="adversarial").attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for x, y in aug.wrap(timm_loader(image_folder)):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert aug.stats["selected"] == 12 and net.training


class NaFlexSomething:
    def __iter__(self) -> Any:
        return iter([({"patches": torch.zeros(2, 4, 768), "patch_coord": torch.zeros(2, 4, 2)}, labels(2))])


def test_bad_loaders(model: GLEM) -> None:
    aug = make(model)
    with pytest.raises(ValueError, match="NaFlex loaders give patches"):
        aug.wrap(NaFlexSomething())
    with pytest.raises(ValueError, match="NaFlex loaders give patches"):
        list(aug.wrap(list(NaFlexSomething())))
    with pytest.raises(TypeError, match="must be iterable"):
        aug.wrap(3)
    with pytest.raises(TypeError, match="as_transform"):
        list(aug.wrap([{"image": images(2), "label": labels(2)}]))
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="off_epoch"):
            aug.wrap(loader(), off_epoch=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_timms_naflex_loader_is_refused(model: GLEM, image_folder: Path, training: bool) -> None:
    naflex = pytest.importorskip("timm.data.naflex_loader")
    inner = naflex.create_naflex_loader(
        ImageDataset(str(image_folder)),
        patch_size=4,
        train_seq_lens=(16,),
        max_seq_len=16,
        batch_size=4,
        is_training=training,
        use_prefetcher=training,
        num_workers=0,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    with pytest.raises(ValueError, match="NaFlex"):
        make(model).wrap(inner)


def test_modes_as_many_as_a_flow_for_few_images_has(model: GLEM) -> None:
    few = GLEM.create("identity", (3, 8, 8), classes=CLASSES)
    few.fit_modes((images(30), labels(30)), rank=9)
    aug = GLEMAugment(few)
    assert few.modes is not None and aug.modes == few.modes.rank == 9 and aug.to_config()["modes"] == 9
    many = GLEM.create("identity", (3, 8, 8), classes=CLASSES)
    many.fit_modes((images(300), labels(300)), rank=80)
    assert GLEMAugment(many).modes == 64
    assert GLEMAugment.from_config({"modes": None}, many).modes == 64
    with pytest.raises(ValueError, match="from 1 to 9"):
        GLEMAugment(few, modes=64)


def test_large_images_stay_sharp(glem_data: Path) -> None:
    """A flow of 32x32 moves images of 128x128 by 8 levels and more; their fine detail stays."""
    small = open_data(glem_data / "imagenette128", "train", image_size=(32, 32), progress=False)
    flow = GLEM.create("identity", (3, 32, 32), classes=small.classes, class_ids=small.class_ids)
    flow.fit_modes(small)
    large = open_data(glem_data / "imagenette128", "val", progress=False)
    large = large.subset(range(0, len(large), -(-len(large) // 40)))  # of all classes
    x, y = large.tensor() / 255, torch.from_numpy(large.targets)
    for policy, detail in (("noise", "keep"), ("mixup", "keep"), ("noise", "none")):
        aug = GLEMAugment(flow, p=1.0, policy=policy, alpha=8.0, strength=0.5, detail=detail, seed=0)
        out, _ = aug(x, y)
        ratio = upper_energy(out) / upper_energy(x)
        assert 255 * (out - x).abs().mean() > 8 and aug.stats["replaced"] == 0
        assert abs(ratio - 1) < 0.1 if detail == "keep" else ratio < 0.5


# ---- as_mixup_fn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"policy": "noise"}, {"partner": "any"}, {"labels": "hard"}, {"p": 0.0}])
def test_mixup_fn_always_gives_soft_labels(model: GLEM, settings: dict[str, Any]) -> None:
    mixup_fn = make(model, **settings).as_mixup_fn(smoothing=0.1)
    x, y = images(5) / 255, labels(5)  # odd
    smooth = F.one_hot(y, 3) * 0.9 + 0.1 / 3
    out, target = mixup_fn(x, y)
    assert target.shape == (5, 3) and torch.allclose(target.sum(1), torch.ones(5), atol=1e-5)
    if settings.get("partner") != "any":
        assert torch.allclose(target, smooth, atol=1e-6)
    assert torch.equal(out, x) == (settings.get("p") == 0.0)
    mixup_fn.mixup_enabled = False
    out, target = mixup_fn(x, y)
    assert out is x and torch.allclose(target, smooth)
    assert torch.equal(mixup_fn(x, smooth)[1], smooth)
    SoftTargetCrossEntropy()(torch.zeros(5, 3), target)


def test_mixed_labels_weigh_both_and_keep_the_smoothing(model: GLEM) -> None:
    x, y = images(6) / 255, labels(6)
    aug = make(model, partner="any", modes=16)
    twin = copy.deepcopy(aug)
    smooth = F.one_hot(y, 3) * 0.8 + 0.2 / 3
    assert torch.allclose(aug.as_mixup_fn(smoothing=0.2)(x, y)[1], twin(x, smooth)[1], atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_timms_mixup_on_soft_labels_is_its_mixup_on_hard_ones(mode: str) -> None:
    x, y = images(8).float(), labels(8)
    mixup = Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, mode=mode, label_smoothing=0.0, num_classes=3)
    np.random.seed(1)
    wanted = mixup(x.clone(), y)
    np.random.seed(1)
    got = mix_soft(mixup, x.clone(), F.one_hot(y, 3).float())
    assert torch.equal(got[0], wanted[0]) and torch.allclose(got[1], wanted[1])
    assert mixup.num_classes == 3


@pytest.mark.parametrize("order", ["aug", "mixup"])
def test_with_timms_mixup_before_or_after(model: GLEM, order: str) -> None:
    x, y = images(8) / 255, labels(8)
    before = x.clone()
    mixup = Mixup(mixup_alpha=0.4, num_classes=3, label_smoothing=0.7)
    settings = {"policy": "noise", "strength": 0.2}
    np.random.seed(2)
    wanted_mix = Mixup(mixup_alpha=0.4, num_classes=3, label_smoothing=0.1)
    if order == "aug":
        wanted = wanted_mix(make(model, **settings)(x, y)[0].clone(), y)
    else:
        wanted = make(model, **settings)(*wanted_mix(x.clone(), y))
    np.random.seed(2)
    out, target = make(model, **settings).as_mixup_fn(0.1, mixup=mixup, order=order)(x.clone(), y)
    assert torch.allclose(out, wanted[0], atol=1e-5) and torch.allclose(target, wanted[1], atol=1e-5)
    assert torch.equal(x, before)


def test_already_mixed_labels_are_mixed_again_correctly(model: GLEM) -> None:
    """After Mixup a row is lam a + (1 - lam) b; its mode mixup with row j has the same share of j's own mixture."""
    x, y = images(8) / 255, labels(8)
    x, soft = Mixup(mixup_alpha=1.0, num_classes=3, label_smoothing=0.0)(x, y)
    big = GLEM.create("identity", (3, 8, 8), classes=CLASSES)
    big.fit_modes((images(900), labels(900)), rank=192)  # every direction is a mode: the projection keeps all
    aug = GLEMAugment(big, p=1.0, modes=192, partner="any", seed=0)
    params = aug.draw(x, soft)
    out, target = aug.apply(x, soft, params)
    w = params.l[:, None]
    assert torch.allclose(target, w * soft + (1 - w) * soft[params.partner], atol=1e-4)
    w = w[:, :, None, None]
    assert torch.allclose(out, w * x + (1 - w) * x[params.partner], atol=1e-4)


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
@pytest.mark.parametrize("first", [True, False])
def test_with_torchvisions_mixup_and_cutmix(model: GLEM, kind: type, first: bool) -> None:
    x, y = images(6) / 255, labels(6)
    other = kind(num_classes=3)
    chain = [make(model, partner="any"), other]
    out, target = v2.Compose(chain if first else chain[::-1])(x, y)
    assert out.shape == x.shape and target.shape == (6, 3)
    assert torch.allclose(target.sum(1), torch.ones(6), atol=1e-5) and not torch.equal(out, x)


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("partner", ["same", "any"])
def test_unknown_labels_are_refused_in_every_form(model: GLEM, label: int, partner: str) -> None:
    aug = make(model, partner=partner)
    y = torch.tensor([0, label])
    off = aug.as_mixup_fn()
    off.mixup_enabled = False
    for call in (aug, aug.as_mixup_fn(smoothing=0.1), off):
        with pytest.raises(ValueError, match="out of range"):
            call(images(2), y)
    if partner == "any":  # labels become soft, switched off too
        wrapped = aug.wrap([(images(2), y)])
        wrapped.mixup_enabled = False
        collate = aug.collate_fn()
        collate.mixup_enabled = False
        with pytest.raises(ValueError, match="out of range"):
            list(wrapped)
        with pytest.raises(ValueError, match="out of range"):
            collate([(image, int(k)) for image, k in zip(images(2), y, strict=True)])


def test_rows_of_no_class_pass_through(model: GLEM) -> None:
    x, soft = images(2), torch.eye(3)[:2].clone()
    soft[1] = 0
    out, _ = make(model, policy="noise")(x, soft)
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], x[0])


def test_mixup_fn_arguments(model: GLEM) -> None:
    aug = make(model)
    with pytest.raises(ValueError, match="smoothing must be from 0 to 1"):
        aug.as_mixup_fn(smoothing=1.5)
    with pytest.raises(ValueError, match="order must be one of"):
        aug.as_mixup_fn(order="first")
    with pytest.raises(TypeError, match="timm.data.Mixup"):
        aug.as_mixup_fn(mixup=v2.MixUp(num_classes=3))
    assert "smoothing=0.1" in repr(aug.as_mixup_fn(0.1))


# ---- collate_fn ---------------------------------------------------------------------------------------


def test_collate_in_workers(model: GLEM) -> None:
    aug = make(model)
    data = TensorDataset(images(8) / 255, labels(8))
    batches = list(DataLoader(data, batch_size=4, num_workers=2, collate_fn=aug.collate_fn()))
    for i, (x, y) in enumerate(batches):
        assert not torch.equal(x, data.tensors[0][4 * i : 4 * i + 4]) and torch.equal(y, labels(8)[4 * i : 4 * i + 4])
    # workers draw differently, though both have a copy of one random state
    twice = TensorDataset(images(4).repeat(2, 1, 1, 1) / 255, labels(4).repeat(2))
    a, b = DataLoader(twice, batch_size=4, num_workers=2, collate_fn=aug.collate_fn())
    assert not torch.equal(a[0], b[0])


def test_what_is_switched_off_takes_the_batches_that_it_took_before(model: GLEM) -> None:
    class Pair(NamedTuple):
        image: Any
        label: Any

    x, y = images(4) / 255, labels(4)
    for batch in ((x, {"labels": y}), Pair(x, y), [x, y, ["a", "b", "c", "d"]], (x[0], 1)):
        wrapped = make(model, policy="noise").wrap([batch], off_epoch=1)
        (on,), (off,) = list(wrapped), list(wrapped)
        assert type(on) is type(off) is type(batch) and len(on) == len(off) == len(batch)
        assert not torch.equal(on[0], batch[0]) and torch.equal(off[0], batch[0])
        assert str(off[1]) == str(batch[1])
    collate = make(model, policy="noise").collate_fn(lambda samples: Pair(*default_collate(samples)))
    samples = list(zip(x, y, strict=True))
    assert type(collate(samples)) is Pair
    collate.mixup_enabled = False
    assert torch.equal(collate(samples).image, x)


def test_collate_drops_no_item(model: GLEM) -> None:
    collate = make(model).collate_fn()
    x, y = images(4), labels(4)
    third = collate([(x[i], int(y[i]), i) for i in range(4)])
    assert len(third) == 3 and third[2].tolist() == [0, 1, 2, 3] and third[0].dtype == torch.uint8
    assert len(collate([[x[i], int(y[i])] for i in range(4)])) == 2
    assert collate([(x[i].numpy() / np.float32(255), int(y[i])) for i in range(4)])[0].dtype == torch.float32
    assert collate([(x[i].numpy(), int(y[i])) for i in range(4)])[0].dtype == torch.uint8


@pytest.mark.parametrize("again", [copy.deepcopy, lambda collate: pickle.loads(pickle.dumps(collate))])
def test_the_switch_of_a_copied_collate_reaches_its_workers(model: GLEM, again: Any) -> None:
    collate = again(make(model, policy="noise").collate_fn())
    data = TensorDataset(images(4) / 255, labels(4))
    loader = DataLoader(data, batch_size=4, num_workers=1, collate_fn=collate, persistent_workers=True)
    ((x, _),) = loader
    assert not torch.equal(x, data.tensors[0])
    collate.mixup_enabled = False
    ((x, _),) = loader
    assert torch.equal(x, data.tensors[0])


def test_a_base_that_is_switched_off_stays_so(model: GLEM) -> None:
    base = FastCollateMixup(num_classes=3)
    base.mixup_enabled = False
    collate = make(model).collate_fn(base)
    assert not collate.mixup_enabled and not base.mixup_enabled


def test_collate_with_timms_prefetching_loader(model: GLEM, image_folder: Path) -> None:
    collate = make(model, policy="noise").collate_fn()
    inner = timm_loader(image_folder, collate_fn=collate, is_training=False)
    plain = timm_loader(image_folder, is_training=False)
    for (x, y), (before, target) in zip(inner, plain, strict=True):
        assert x.dtype == torch.float32 and not torch.equal(x, before) and torch.equal(y, target)
    assert inner.mixup_enabled
    inner.mixup_enabled = False
    assert not collate.mixup_enabled
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(inner, plain, strict=True))


def test_the_switch_reaches_workers_that_are_running(model: GLEM) -> None:
    collate = make(model, partner="any").collate_fn()
    data = TensorDataset(images(4) / 255, labels(4))
    inner = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=collate)
    (x, y), *_ = inner
    assert not torch.equal(x, data.tensors[0])
    collate.mixup_enabled = False
    (x, y), *_ = inner
    assert torch.equal(x, data.tensors[0]) and torch.equal(y, F.one_hot(labels(4), 3).float())


def test_collate_bases(model: GLEM) -> None:
    samples = [(image.numpy(), label) for image, label in zip(images(4), labels(4).tolist(), strict=True)]
    x, y = make(model).collate_fn()(samples)
    assert x.dtype == torch.uint8 and y.dtype == torch.int64 and not torch.equal(x, images(4))
    mixup = FastCollateMixup(num_classes=3)
    collate = make(model).collate_fn(mixup)
    x, y = collate(samples)
    assert x.dtype == torch.uint8 and y.shape == (4, 3)
    worker = copy.copy(collate)  # as a running worker has it: only the switch itself is shared
    worker.base = copy.copy(mixup)
    collate.mixup_enabled = False
    assert not mixup.mixup_enabled and worker.base.mixup_enabled
    assert torch.equal(worker(samples)[0], images(4))
    out = make(model).collate_fn(default_collate)(
        [(i / 255, int(y)) for i, y in zip(images(4), labels(4), strict=True)]
    )
    assert isinstance(out, list) and len(out) == 2
    again = pickle.loads(pickle.dumps(make(model).collate_fn(fast_collate)))
    assert torch.equal(again(samples)[0], make(model).collate_fn(fast_collate)(samples)[0])


def test_bad_samples(model: GLEM) -> None:
    collate = make(model).collate_fn()
    with pytest.raises(TypeError, match=r"v2\.ToImage"):
        collate([(Image.new("RGB", (8, 8)), 0)])
    with pytest.raises(TypeError, match="samples must be"):
        collate([images(1)[0]])
    with pytest.raises(TypeError, match="collate function"):
        make(model).collate_fn("default")  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="label"):  # not cut to whole numbers
        collate([(image, torch.tensor(1.7)) for image in images(4)])
    with pytest.raises(TypeError, match="base must give"):
        make(model).collate_fn(lambda batch: {"x": 1})([(images(1)[0], 0)])


# ---- torchvision v2 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_structures_come_back_as_they_were(model: GLEM, soft: bool) -> None:
    x, y = images(4) / 255, labels(4)
    y = F.one_hot(y, 3).float() if soft else y
    wanted = make(model)(x, y)
    image = tv_tensors.Image(x)
    mask = tv_tensors.Mask(torch.zeros(4, 8, 8))
    cases: list[Any] = [
        (x, y),
        [x, y],
        {"image": x, "label": y},
        OrderedDict(number=3, image=image, Labels=y),
        (image, {"labels": y, "mask": mask}),
        {"pixels": image, "targets": y, "other": torch.zeros(3)},
    ]
    for sample in cases:
        for transform in (make(model), make(model).as_transform(), v2.Compose([nn.Identity(), make(model)])):
            out = transform(sample)
            assert type(out) is type(sample)
            values = list(out.values()) if isinstance(out, dict) else list(out)
            flat = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
            found = next(v for v in flat if isinstance(v, Tensor) and v.shape == x.shape)
            assert torch.equal(found, wanted[0])
            source = list(sample.values()) if isinstance(sample, dict) else list(sample)
            assert isinstance(found, tv_tensors.Image) == any(isinstance(v, tv_tensors.Image) for v in source)
            assert any(isinstance(v, Tensor) and v.shape == y.shape and torch.equal(v, wanted[1]) for v in flat)
    assert make(model)((image, {"labels": y, "mask": mask}))[1]["mask"] is mask


def test_two_arguments_with_a_tv_tensor(model: GLEM) -> None:
    x, y = tv_tensors.Image(images(4)), labels(4)
    out, target = make(model)(x, y)
    assert isinstance(out, tv_tensors.Image) and out.dtype == torch.uint8 and target is y


def test_which_key_holds_the_labels(model: GLEM) -> None:
    keys = ["my_labels", "target", "Targets", "label", "LABELS"]  # from the last choice to the first
    for n in range(1, len(keys) + 1):
        sample = {"image": tv_tensors.Image(images(4)), **{key: labels(4).clone() for key in keys[:n]}}
        out = make(model, partner="any")(sample)
        assert [key for key in keys[:n] if out[key].ndim == 2] == [keys[n - 1]]


def test_a_labels_getter(model: GLEM) -> None:
    sample = {"image": images(4) / 255, "nested": [torch.zeros(2), labels(4)]}
    out = make(model).as_transform(lambda s: s["nested"][1])(sample)
    assert torch.equal(out["image"], make(model)(sample["image"], labels(4))[0])
    assert "labels_getter" in repr(make(model).as_transform(lambda s: s))


def test_labels_that_stand_in_a_sample_twice(model: GLEM) -> None:
    x, y = images(4), labels(4)
    wanted = make(model, partner="any")(x, y)
    for sample, getter in (
        ((x, y, y), lambda s: s[1]),
        ({"label": y, "image": x, "target": y}, lambda s: s["label"]),
    ):
        out = make(model, partner="any").as_transform(getter)(sample)
        pictures, *soft = sorted(out if isinstance(out, tuple) else out.values(), key=lambda v: -v.ndim)
        assert torch.equal(pictures, wanted[0]) and len(soft) == 2 and all(torch.equal(s, wanted[1]) for s in soft)


@pytest.mark.parametrize("label", [1, torch.tensor(1), torch.tensor([0.0, 1.0, 0.0])])
@pytest.mark.parametrize("partner", ["same", "any"])
def test_single_images_of_a_data_set(model: GLEM, label: Any, partner: str) -> None:
    image = tv_tensors.Image(images(1)[0])
    out, target = make(model, partner=partner)((image, label))
    assert isinstance(out, tv_tensors.Image) and out.shape == (3, 8, 8) and not torch.equal(out, image)
    if partner == "any" or not isinstance(label, int):
        assert isinstance(target, Tensor) and target.ndim == (1 if partner == "any" else label.ndim)
    else:
        assert target == 1 and isinstance(target, int)
    plain = make(model)(images(1)[0], 1)
    assert plain[0].shape == (3, 8, 8) and plain[1] == 1


def test_the_transform_can_be_pickled_and_used_in_workers(model: GLEM) -> None:
    chain = v2.Compose([v2.RandomHorizontalFlip(), make(model).as_transform()])
    x, y = images(4) / 255, labels(4)
    again = pickle.loads(pickle.dumps(chain))
    torch.manual_seed(0)
    wanted = chain(x, y)
    torch.manual_seed(0)
    assert torch.equal(again(x, y)[0], wanted[0])
    assert list(chain.transforms[1].state_dict()) == ["aug._extra_state"]
    assert not list(chain.parameters())


def test_samples_that_cannot_be_used(model: GLEM) -> None:
    aug = make(model)
    with pytest.raises(TypeError, match=r"v2\.ToImage"):
        aug((Image.new("RGB", (8, 8)), 1))
    with pytest.raises(ValueError, match="no labels found"):
        aug({"image": images(2)})
    with pytest.raises(ValueError, match="no image found"):
        aug({"labels": labels(2)})
    with pytest.raises(ValueError, match="labels must be a tensor"):
        aug.as_transform(lambda s: "bird")((images(2), labels(2)))
    with pytest.raises(TypeError, match="labels_getter"):
        aug.as_transform(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 images"):
        aug((tv_tensors.Image(images(2)), labels(2), tv_tensors.Image(images(2))))
    with pytest.raises(ValueError, match="more than once"):
        soft = make(model, partner="any").as_transform(lambda s: s["label"])
        soft({"image": tv_tensors.Image(images(1)[0]), "label": 1, "index": 1})


class Pair(NamedTuple):
    image: Tensor
    label: int
    number: int


@pytest.mark.parametrize(
    ("make_sample", "label_of"),
    [
        (lambda x: {"image": x, "index": 1, "label": 1, "id": 1}, lambda s: s["label"]),
        (lambda x: (x, 1, 1), lambda s: s[1]),
        (lambda x: [x, {"index": 1, "Target": 1}], lambda s: s[1]["Target"]),
        (lambda x: Pair(x, 1, 1), lambda s: s.label),
    ],
)
def test_numbers_that_equal_the_label_stay(model: GLEM, make_sample: Any, label_of: Any) -> None:
    sample = make_sample(tv_tensors.Image(images(1)[0]))
    same = make(model, policy="noise").as_transform()(sample)
    assert type(same) is type(sample) and label_of(same) == 1
    soft = make(model, partner="any").as_transform()(sample)
    assert isinstance(label_of(soft), Tensor) and label_of(soft).shape == (3,)
    leaves = tree_leaves(soft)
    assert sum(isinstance(leaf, int) and leaf == 1 for leaf in leaves) == len(leaves) - 2
    # Where a function names the label, it can't be told from its equals; they only matter where it is replaced.
    chosen = make(model, policy="noise").as_transform(label_of)(sample)
    assert label_of(chosen) == 1


def test_the_code_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plugin.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) > 6
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("[::10]", "[::50]"), "docs/plugin.md", "exec"), space)  # a fifth of the images
    assert "| 0.5 |" in capsys.readouterr().out
    assert len(space["both"]) == 255 and space["soft"].shape == (20, 10) and space["sample"]["label"] == 3


def test_what_does_not_fit_is_refused_or_told(model: GLEM) -> None:
    with pytest.raises(TypeError, match="collate_fn"):
        make(model).as_mixup_fn(mixup=FastCollateMixup(num_classes=3))
    several = Mixup(mixup_alpha=0.4, num_classes=3, label_smoothing=0.0)
    several.multi_label = True
    x, y = make(model).as_mixup_fn(mixup=several)(images(8) / 255, labels(8))
    assert y.shape == (8, 3) and torch.allclose(y.sum(1), torch.ones(8))

    aug = make(model, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="uint8"):
        aug(images(8).float(), labels(8))
    with pytest.warns(UserWarning, match=r"\[0, 1\] still"):
        aug(images(8) / 255, labels(8))


def test_a_posterior_is_smoothed_like_any_other_label(model: GLEM) -> None:
    aug = make(model, policy="noise", labels="posterior", p=1.0)
    twin = copy.deepcopy(aug)
    x, y = images(6) / 255, labels(6)
    wanted = twin(x, F.one_hot(y, 3).float())[1] * 0.7 + 0.1
    assert torch.allclose(aug.as_mixup_fn(smoothing=0.3)(x, y)[1], wanted)


def test_a_transform_knows_the_name_it_was_made_with(tmp_path: Path, model: GLEM) -> None:
    model.save(tmp_path / "flow")
    for name in ("bundled:fashion-mnist", tmp_path / "flow"):
        aug = GLEMAugment(name, seed=1)
        assert aug.to_config()["model"] == str(name)
        assert repr(GLEMAugment.from_config(aug.to_config())) == repr(aug)


def test_modules_that_sleep_are_not_woken(model: GLEM) -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 3))
    net[1].eval()
    choose_strength(make(model, policy="noise"), net, [(images(6) / 255, labels(6))], strengths=(0.5,))
    assert net.training and net[2].training and not net[1].training


def test_numpys_numbers_and_one_image_with_a_soft_label(model: GLEM) -> None:
    aug = GLEMAugment(model, p=np.float32(1.0), strength=np.float64(0.5), modes=np.int64(8), seed=np.int32(4))
    assert repr(aug) == repr(GLEMAugment(model, p=1.0, strength=0.5, modes=8, seed=4))
    image, label = aug(images(1)[0], F.one_hot(torch.tensor(1), 3).float())
    assert image.shape == (3, 8, 8) and label.shape == (3,)
    with pytest.raises(ValueError, match="4 dimensions|B, C, H, W"):
        aug(images(3)[:, 0], labels(3))


def test_structures_in_compose_as_torchvisions_mixup_takes_them(model: GLEM) -> None:
    x, y = images(4) / 255, labels(4)
    aug = make(model, policy="noise")
    expected, single = aug(x, y)[0], make(model, policy="noise")(x[:1], y[:1])[0][0]

    def compose() -> v2.Compose:
        return v2.Compose([make(model, policy="noise")])

    indices = torch.arange(4)
    got = compose()(x, y, indices)
    assert torch.equal(got[0], expected) and got[1] is y and got[2] is indices
    got = compose()(x, {"labels": y, "id": 7})
    assert torch.equal(got[0], expected) and got[1]["labels"] is y and got[1]["id"] == 7
    for label in (np.int64(0), {"label": 0}, 0):
        assert torch.equal(compose()(x[0], label)[0], single)


def test_an_image_without_a_label_is_refused_with_advice(model: GLEM) -> None:
    for image in (tv_tensors.Image(images(1)[0]), images(1)[0]):
        with pytest.raises(ValueError, match=r"without a label.*aug\.wrap\(loader\)"):
            make(model).as_transform()(image)
        with pytest.raises(ValueError, match="without a label"):
            make(model)(image)


def test_grey_images_with_the_mean_and_std_of_timms_rgb(model: GLEM) -> None:
    """timm averages the three numbers of a model's configuration where images have one channel."""
    x = images(4)[:, :1].float() / 255
    grey = make(model, policy="noise")(x, labels(4))[0]
    mean, std = sum(MEAN) / 3, sum(STD) / 3
    normalised = make(model, policy="noise", mean=MEAN, std=STD)((x - mean) / std, labels(4))[0]
    torch.testing.assert_close(normalised * std + mean, grey, rtol=0, atol=1e-5)


def test_nan_pixels_are_named(model: GLEM) -> None:
    aug = make(model, policy="noise", mean=MEAN, std=STD)
    x, y = images(4) / 255 - 0.5, labels(4)
    aug(x, y)
    x[2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="image 2 of the batch has NaN"):
        aug(x, y)


@pytest.mark.parametrize("settings", [{"policy": "noise"}, {"partner": "gaussian"}, {"partner": "any", "bank": 2}])
def test_torchs_defaults_change_nothing(model: GLEM, settings: dict[str, Any]) -> None:
    x, y = images(6) / 255, labels(6)
    expected = make(model, **settings)(x, y)
    torch.set_default_dtype(torch.float64)
    try:
        got = make(model, **settings)(x, y)
        # Any other device would do; this one can't hold a value, so that nothing may be made there.
        with torch.device("meta"):
            elsewhere = make(model, **settings)(x, y)
    finally:
        torch.set_default_dtype(torch.float32)
    for result in (got, elsewhere):
        assert result[0].dtype == torch.float32 and torch.equal(result[0], expected[0])
        torch.testing.assert_close(result[1], expected[1], check_dtype=False)


def test_a_flow_that_does_not_know_the_images_is_told_once(model: GLEM, recwarn: pytest.WarningsRecorder) -> None:
    x, y = images(64) / 255, labels(64)
    wild = make(model, policy="noise", strength=50.0, margin=0.0)
    wild(x, y)
    assert not recwarn.list  # 64 rows are too few to tell
    with pytest.warns(UserWarning, match="most of the first images chosen were kept"):
        wild(x, y)
    recwarn.clear()
    wild(x, y)
    tame = make(model, policy="noise", strength=0.1)
    for _ in range(3):
        tame(x, y)
    assert not recwarn.list and tame.stats["replaced"] == 0


def test_names_in_place_of_data_are_refused_with_advice(model: GLEM) -> None:
    with pytest.raises(TypeError, match=r"fit_modes takes an ImageData \(glem_augment.open_data\).*got str"):
        model.fit_modes("photos/")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="glem_augment.open_data"):
        SyntheticDataset(model, per_class="balance", real="photos/")


def test_what_the_flow_cannot_see_stays(model: GLEM) -> None:
    """RandomErasing fills with N(0, 1) after normalisation: far out of what a flow takes."""
    x = (images(4) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    x[:, :, :4, :4] = 2.0 * torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    aug = make(model, policy="noise", strength=0.0, mean=MEAN, std=STD)
    assert torch.allclose(aug(x, labels(4))[0], x, atol=1e-4)


def test_mean_0_and_std_1_with_erased_patches_are_no_alarm(model: GLEM, recwarn: pytest.WarningsRecorder) -> None:
    """Some timm models have these; RandomErasing's N(0, 1) reaches 4 and more."""
    x = images(8) / 255
    make(model, policy="noise", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(x, labels(8))
    x[0, :, :4, :4] = torch.linspace(-4.8, 4.8, 48).view(3, 4, 4)
    make(model, policy="noise", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(x, labels(8))
    assert not [w for w in recwarn if "mean and std" in str(w.message)]


def test_nan_rows_are_named_by_their_place_among_all(model: GLEM) -> None:
    aug = make(model, policy="noise", p=0.5)
    x, y = images(8) / 255, labels(8)
    aug(x, y)
    x[5, 0, 0, 0] = torch.nan
    for _ in range(20):  # only rows that are chosen are looked at
        try:
            aug(x, y)
        except ValueError as error:
            assert "image 5 of the batch has NaN" in str(error)
            return
    pytest.fail("row 5 was never chosen")


def test_a_users_compiled_step_gives_what_the_plain_one_gives(model: GLEM) -> None:
    x, y = images(6) / 255, labels(6)
    plain, inside = make(model, policy="noise", p=0.5), make(model, policy="noise", p=0.5)
    compiled = torch.compile(lambda x, y: (inside(x * 1.0, y)[0] + 0.0, y), backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x, y)[0], plain(x, y)[0])
    whole = torch.compile(make(model, policy="noise", p=0.5), backend="eager")
    torch.testing.assert_close(whole(x, y)[0], make(model, policy="noise", p=0.5)(x, y)[0])


def test_what_is_made_under_inference_mode_works_outside(model: GLEM) -> None:
    with torch.inference_mode():
        aug = make(model, policy="noise")
        collate = aug.collate_fn()
    aug.load_state_dict(aug.state_dict())
    collate.mixup_enabled = False
    assert collate.mixup_enabled is False


def test_the_default_device_is_not_where_workers_things_go(model: GLEM) -> None:
    with torch.device("meta"):
        collate = make(model, policy="noise", seed=None).collate_fn()
        image, label = make(model, policy="noise")(torch.full((3, 8, 8), 0.5, device="cpu"), 2)
    assert collate.mixup_enabled and image.device.type == "cpu" and label == 2


def test_structures_are_brought_to_the_device_whole(model: GLEM) -> None:
    sample = (images(4), {"labels": labels(4), "boxes": torch.zeros(4, 4), "name": "a"})
    aug = make(model, policy="noise")
    seen: list[Any] = []
    aug.unmoved = lambda x, y: seen.append((x, y)) or (x, y)  # type: ignore[method-assign]
    list(aug.wrap([sample], device="meta", off_epoch=0))
    x, y = seen[0]
    assert x.is_meta and y["labels"].is_meta and y["boxes"].is_meta and y["name"] == "a"


def test_float_labels_are_no_class_numbers(model: GLEM) -> None:
    collate = make(model, policy="noise").collate_fn()
    pixels = images(4).numpy()
    for label in (2.7, np.float32(2.7), torch.tensor(2.7)):
        with pytest.raises(TypeError, match="labels must be integers"):
            collate([(image, label) for image in pixels])
    for label in (2, np.int32(2), torch.tensor(2)):
        x, y = collate([(image, label) for image in pixels])
        assert x.dtype == torch.uint8 and y.tolist() == [2] * 4


def test_lists_of_labels_are_refused_where_nothing_is_moved_too(model: GLEM) -> None:
    aug = make(model, policy="noise")
    for off_epoch in (None, 0):
        with pytest.raises(TypeError, match="y must be a tensor of labels"):
            list(aug.wrap([(images(3), [0, 1, 2])], off_epoch=off_epoch))


def test_empty_batches(model: GLEM) -> None:
    x, y = images(3)[:0], labels(3)[:0]
    aug = make(model, bank=4)
    aug.fill_bank(x, torch.zeros(0, 3))
    aug.fill_bank(x, y)
    got = aug.as_mixup_fn(0.1, Mixup(0.2, num_classes=3))(x / 255, y)
    assert got[0].shape == x.shape and got[1].shape == (0, 3)


def test_the_bank_forgets_a_flow_that_has_changed(model: GLEM) -> None:
    own = GLEM.create("glow_tiny", (3, 8, 8), CLASSES, depth=[1, 1], blocks=[1, 1], width=[4, 4])
    own.fit_modes((images(240), labels(240)), rank=16)
    own.requires_grad_(False)
    aug = make(own, bank=4)
    aug.fill_bank(images(6), labels(6))
    assert aug._held.latents is not None
    for again in (copy.deepcopy(aug), pickle.loads(pickle.dumps(aug))):
        assert torch.equal(again._held.latents.latents, aug._held.latents.latents)
    own.fit_modes((images(240, seed=1), labels(240)), rank=16)  # the latents stay what they were
    assert aug._held.latents is not None
    with torch.no_grad():
        next(own.flow.parameters()).add_(0)
    assert aug._held.latents is None
    aug(images(6), labels(6))
    assert int(aug._held.latents.counts.sum()) == 6


def test_settings_that_are_held_ready_are_not_changed(model: GLEM) -> None:
    aug = make(model, strength=0.5, policy="noise")
    aug.p, aug.strength, aug.labels = 0.25, 1, "mix"
    assert "p=0.25" in repr(aug) and aug.to_config()["strength"] == 1.0
    for name, value in {"modes": 2, "partner": "near", "basis": "shared", "bank": 1, "policy": "mixup"}.items():
        with pytest.raises(AttributeError, match=f"{name} can't be changed"):
            setattr(aug, name, value)
    for name, value in {"p": 50, "strength": -1, "alpha": 0, "labels": "none"}.items():
        with pytest.raises(ValueError, match=name):
            setattr(aug, name, value)


def test_persistent_workers_are_resumed_exactly(model: GLEM) -> None:
    def loader_of(aug: GLEMAugment) -> DataLoader:
        return loader(12, 4, num_workers=2, persistent_workers=True, collate_fn=aug.collate_fn())

    def epoch(of: DataLoader) -> list[Tensor]:
        return [x for x, _ in of]

    aug = make(model, policy="noise")
    living = loader_of(aug)
    epoch(living)
    state = copy.deepcopy(aug.state_dict())
    expected = epoch(living)
    torch.manual_seed(12345)  # no part of the transform's state
    resumed = make(model, policy="noise")
    resumed.load_state_dict(state)
    for a, b in zip(epoch(loader_of(resumed)), expected, strict=True):
        assert torch.equal(a, b)
