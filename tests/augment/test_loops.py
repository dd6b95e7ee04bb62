"""The ways into a training loop (a wrapped loader, timm's mixup_fn, a collate function), and the code of the docs."""

from __future__ import annotations

import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from augment_cases import images as any_images
from augment_cases import labels as any_labels
from augment_cases import make_model
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from glem_augment import GLEM, GLEMAugment, open_data
from glem_augment import Mixup as ModeMixup
from glem_augment.augment.loops import AugmentedLoader
from glem_augment.errors import ClassMismatchError

CLASSES = ["bird", "cat", "dog"]
images, labels = partial(any_images, channels=3), partial(any_labels, classes=3)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def model() -> GLEM:
    return make_model(3, CLASSES, rank=16)


def make(model: GLEM, **settings: Any) -> GLEMAugment:
    return GLEMAugment(model, **{"p": 1.0, "seed": 0, **settings})


def loader(n: int = 10, batch: int = 4, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(images(n) / 255, labels(n)), batch_size=batch, **settings)


def timm_loader(folder: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {"is_training": True, "no_aug": True, "num_workers": 0, "persistent_workers": False}
    given |= {"mean": MEAN, "std": STD, "device": torch.device("cpu"), **settings}
    return create_loader(ImageDataset(str(folder)), (3, 16, 16), 4, **given)


def test_a_wrapped_loader_behaves_as_the_loader(model: GLEM) -> None:
    inner = loader()
    wrapped = make(model).wrap(inner, device="cpu")
    assert len(wrapped) == len(inner) == 3
    assert wrapped.dataset is inner.dataset and wrapped.sampler is inner.sampler
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        wrapped.nothing_of_the_kind  # noqa: B018
    for (x, y), (before, target) in zip(wrapped, inner, strict=True):
        assert x.shape == before.shape and x.dtype == before.dtype and torch.equal(y, target)
        assert (x != before).flatten(1).any(1).all()
    copied = pickle.loads(pickle.dumps(wrapped))
    assert isinstance(copied, AugmentedLoader) and len(copied) == 3


def test_epochs_and_switches(model: GLEM) -> None:
    inner = loader()
    first = [x for x, _ in inner]

    def changed(wrapped: AugmentedLoader) -> set[bool]:
        return {not torch.equal(x, before) for (x, _), before in zip(wrapped, first, strict=True)}

    wrapped = make(model).wrap(inner, off_epoch=2)
    assert [changed(wrapped) for _ in range(4)] == [{True}, {True}, {False}, {False}] and wrapped.epoch == 4
    wrapped.epoch, wrapped.mixup_enabled = 1, False
    batches = iter(wrapped)
    assert torch.equal(next(batches)[0], first[0])
    wrapped.mixup_enabled = True  # takes effect within an epoch
    assert not torch.equal(next(batches)[0], first[1]) and wrapped.mixup_enabled and wrapped.epoch == 2
    # Labels keep their form: soft ones stay soft.
    wrapped = make(model, policy=ModeMixup(partner="any")).wrap(inner, off_epoch=1)
    on, off = (next(iter(wrapped))[1] for _ in range(2))
    assert on.shape == off.shape == (4, 3) and torch.equal(off, F.one_hot(labels(4), 3).float())


class Pair(NamedTuple):
    image: Any
    label: Any


def test_images_are_not_moved_twice_nor_by_a_classifier_in_workers(model: GLEM) -> None:
    aug = make(model)
    for twice in (aug.wrap(loader()), loader(collate_fn=aug.collate_fn())):
        with pytest.raises(ValueError, match="twice"):
            aug.wrap(twice)
    with pytest.raises(ValueError, match="twice"):
        aug.collate_fn(aug.collate_fn())
    with pytest.raises(ValueError, match="Adversarial"):
        make(model, policy="adversarial").collate_fn()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused_at_once(model: GLEM) -> None:
    with pytest.raises(ValueError, match="cuda:0"):
        make(model).wrap([], device="cuda:0")


@pytest.mark.parametrize(("prefetch", "soft"), [(True, True), (True, False), (False, True)])
def test_a_training_step_after_timms_own_loader(model: GLEM, image_folder: Path, prefetch: bool, soft: bool) -> None:
    collate = FastCollateMixup(num_classes=3, label_smoothing=0.1) if prefetch and soft else None
    inner = timm_loader(image_folder, use_prefetcher=prefetch, collate_fn=collate)
    aug = make(model, mean=MEAN, std=STD, policy=ModeMixup(partner="any" if soft else "same"))
    wrapped = aug.wrap(inner)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    loss_fn = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(0.1)
    for x, y in wrapped:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_fn(net(x), y).backward()
    assert aug.stats == {"selected": 12, "rejected": 0, "unmapped": 0}
    if collate is not None:
        wrapped.mixup_enabled = False
        assert not collate.mixup_enabled and not inner.mixup_enabled


def test_normalisation_must_be_the_loaders(model: GLEM, image_folder: Path) -> None:
    with pytest.raises(ValueError, match="0.48"):
        make(model).wrap(timm_loader(image_folder))
    with pytest.raises(ValueError, match="0.27"):
        make(model, mean=MEAN, std=(0.5, 0.5, 0.5)).wrap(timm_loader(image_folder))
    (x, _), *_ = make(model, mean=MEAN, std=STD).wrap(timm_loader(image_folder, img_dtype=torch.bfloat16))
    assert x.dtype == torch.bfloat16  # such a loader holds its mean and std in half precision


def test_every_way_in_checks_the_names_of_the_classes(image_folder: Path) -> None:
    folder = ImageFolder(str(image_folder), v2.PILToTensor())
    own = open_data(image_folder)
    ways = (
        lambda aug, data: aug.wrap(DataLoader(data)),
        lambda aug, data: list(DataLoader(data, num_workers=1, collate_fn=aug.collate_fn())),  # workers know their data
    )
    joined = ConcatDataset([own, Subset(own, [0])])
    sets = (own, folder, ImageDataset(str(image_folder)), Subset(folder, [0, 1]), joined)
    other, same = (make_model(3, classes, rank=16) for classes in (["dog", "bird", "cat"], CLASSES))
    for way, data in [(way, folder) for way in ways] + [(ways[0], data) for data in sets]:
        with pytest.raises(ClassMismatchError, match="class 0 of the data is 'bird', .* class 'dog'.*classes="):
            way(make(other), data)
        way(make(other, class_map=[1, 2, 0]), data)
        way(make(other, classes=data), data)
        assert make(other, classes=data).class_map == (1, 2, 0)
        way(make(same), data)
    with pytest.raises(ClassMismatchError, match="class 0 of the data is 'bird'"):
        ways[0](make(other, classes=["cat", "dog", "bird"]), folder)
    with pytest.raises(ClassMismatchError, match="dog"):
        ways[0](make(make_model(3, ["bird", "cat", "ant"], rank=16)), folder)
    with pytest.raises(ClassMismatchError):
        make(other).wrap(DataLoader(ConcatDataset([own, own.with_targets([0] * 12, ["cat", "dog"])])))


@pytest.mark.parametrize(
    "call",
    [
        lambda aug, x, y: aug(x, y),
        lambda aug, x, y: v2.Compose([aug])(x, y),
        lambda aug, x, y: aug.collate_fn()(list(zip(x, y, strict=True))),
        lambda aug, x, y: aug.as_mixup_fn()(x, y),
    ],
)
def test_labels_alone_are_checked_by_names_or_the_first_call_warns(model: GLEM, call: Any) -> None:
    x, y = images(6), labels(6)
    with pytest.warns(UserWarning, match=r"not checked .*bird, cat, dog\).*classes=data\.classes"):
        call(aug := make(model), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(aug, x, y)
        call(make(model, class_map=range(3)), x, y)
        call(make(model, classes=CLASSES), x, y)
        turned = make(model, classes=("dog", "bird", "cat"))
        call(turned, x, y)
    assert turned.draw(x, y).cls.tolist() == [2, 0, 1, 2, 0, 1]
    with pytest.raises(ClassMismatchError, match="zebra"):
        make(model, classes=["bird", "cat", "zebra"])
    with pytest.raises(ValueError, match="not both"):
        make(model, classes=CLASSES, class_map=range(3))


ANY = ModeMixup(partner="any")


@pytest.mark.parametrize("settings", [{"policy": "noise"}, {"policy": ANY}, {"p": 0.0}])
def test_mixup_fn_always_gives_soft_labels(model: GLEM, settings: dict[str, Any]) -> None:
    mixup_fn = make(model, **settings).as_mixup_fn(smoothing=0.1)
    x, y = images(5) / 255, labels(5)  # an odd number, which timm's Mixup does not take
    smooth = F.one_hot(y, 3) * 0.9 + 0.1 / 3
    out, target = mixup_fn(x, y)
    assert target.shape == (5, 3) and torch.allclose(target.sum(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(target, smooth, atol=1e-6) == (settings.get("policy") != ANY)
    assert torch.equal(out, x) == (settings.get("p") == 0.0)
    mixup_fn.mixup_enabled = False
    out, target = mixup_fn(x, y)
    assert out is x and torch.allclose(target, smooth) and torch.equal(mixup_fn(x, smooth)[1], smooth)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_timms_mixup_comes_afterwards_and_takes_soft_labels(model: GLEM, mode: str) -> None:
    x, y = images(8) / 255, labels(8)
    settings: dict[str, Any] = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mode": mode, "num_classes": 3}
    moved = make(model, policy="noise")(x, y)[0]
    np.random.seed(1)
    wanted = Mixup(**settings, label_smoothing=0.1)(moved.clone(), y)
    np.random.seed(1)
    mixup = Mixup(**settings, label_smoothing=0.7)  # Mixup's smoothing and the next setting are left out
    mixup.multi_label = True
    out, target = make(model, policy="noise").as_mixup_fn(0.1, mixup=mixup)(x, y)
    assert torch.allclose(out, wanted[0], atol=1e-5) and torch.allclose(target, wanted[1], atol=1e-5)
    assert mixup.num_classes == 3 and torch.equal(x, images(8) / 255)


@pytest.mark.parametrize("again", [lambda collate: pickle.loads(pickle.dumps(collate)), None])
def test_the_switch_reaches_workers_that_are_running(model: GLEM, again: Any) -> None:
    with torch.inference_mode():
        collate = make(model, policy=ModeMixup(partner="any")).collate_fn()
    collate = collate if again is None else again(collate)
    inner = loader(4, num_workers=1, persistent_workers=True, collate_fn=collate)
    ((x, _),) = inner
    assert not torch.equal(x, inner.dataset.tensors[0])
    collate.mixup_enabled = False
    ((x, y),) = inner
    assert torch.equal(x, inner.dataset.tensors[0]) and torch.equal(y, F.one_hot(labels(4), 3).float())


def test_collate_with_timms_prefetching_loader(model: GLEM, image_folder: Path) -> None:
    collate = make(model, policy="noise").collate_fn()
    inner = timm_loader(image_folder, collate_fn=collate, is_training=False)
    plain = list(timm_loader(image_folder, is_training=False))
    for (x, y), (before, target) in zip(inner, plain, strict=True):
        assert x.dtype == torch.float32 and not torch.equal(x, before) and torch.equal(y, target)
    assert inner.mixup_enabled
    inner.mixup_enabled = False
    assert not collate.mixup_enabled
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(inner, plain, strict=True))


def test_what_collate_and_mixup_fn_take(model: GLEM) -> None:
    x, y = images(4), labels(4)
    samples = [(image.numpy(), label) for image, label in zip(x, y.tolist(), strict=True)]
    collate = make(model).collate_fn()
    out, target = collate(samples)
    assert out.dtype == torch.uint8 and torch.equal(target, y) and not torch.equal(out, x)
    pairs = make(model).collate_fn(lambda given: Pair(*default_collate(given)))
    assert type(pairs(samples)) is Pair
    mixup = FastCollateMixup(num_classes=3)
    collate = make(model).collate_fn(mixup)
    assert collate(samples)[1].shape == (4, 3)
    collate.mixup_enabled = False  # stops both
    assert torch.equal(collate(samples)[0], x) and not mixup.mixup_enabled
    with pytest.raises(TypeError, match=r"aug\.collate_fn"):
        make(model).as_mixup_fn(mixup=mixup)
    with pytest.raises(TypeError, match=r"x\.float\(\) / 255"):
        make(model).as_mixup_fn(mixup=Mixup(num_classes=3))(x, y)
    with pytest.raises(ValueError, match=r"x\.detach"):
        make(model)((x / 255).requires_grad_(), y)


def test_the_code_of_the_documentation_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plugin.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("[::10]", "[::50]"), "docs/plugin.md", "exec"), space)  # a fifth of the images
    assert space["soft"].shape == (20, 10) and space["sample"]["label"] == 3
