"""GLEMAugment as a torchvision v2 transform, on whatever structure a sample has."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from augment_cases import images, labels
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors
from torchvision.transforms import v2

from glem_augment import GLEM, GLEMAugment


def make(rgb: GLEM, **settings: Any) -> GLEMAugment:
    return GLEMAugment(rgb, **{"p": 1.0, "modes": 16, "seed": 0, **settings})


@pytest.mark.parametrize("soft", [False, True])
def test_structures_come_back_as_they_were(rgb: GLEM, soft: bool) -> None:
    x, y = images(4, 3) / 255, labels(4)
    y = F.one_hot(y, 4).float() if soft else y
    wanted = make(rgb)(x, y)
    image, mask = tv_tensors.Image(x), tv_tensors.Mask(torch.zeros(4, 8, 8))
    cases: list[Any] = [
        (x, y),
        [x, y],
        {"image": x, "label": y},
        OrderedDict(number=3, image=image, Labels=y),
        (image, {"labels": y, "mask": mask}),
        {"pixels": image, "targets": y, "other": torch.zeros(3)},
    ]
    for sample in cases:
        for transform in (make(rgb), make(rgb).as_transform(), v2.Compose([nn.Identity(), make(rgb)])):
            out = transform(sample)
            assert type(out) is type(sample)
            flat, source = tree_leaves(out), tree_leaves(sample)
            assert len(flat) == len(source)
            for leaf, before in zip(flat, source, strict=True):
                assert type(leaf) is type(before)
                if before is x or before is image:
                    assert torch.equal(leaf, wanted[0])
                elif before is y:
                    assert torch.equal(leaf, wanted[1])
                else:
                    assert leaf is before


def test_arguments_as_torchvisions_mixup_takes_them(rgb: GLEM) -> None:
    x, y = images(4, 3) / 255, labels(4)
    expected = make(rgb, policy="noise")(x, y)[0]
    single, indices = make(rgb, policy="noise")(x[:1], y[:1])[0][0], torch.arange(4)

    def compose() -> v2.Compose:
        return v2.Compose([make(rgb, policy="noise")])

    got = compose()(x, y, indices)
    assert torch.equal(got[0], expected) and got[1] is y and got[2] is indices
    got = compose()(x, {"labels": y, "id": 7})
    assert torch.equal(got[0], expected) and got[1]["labels"] is y and got[1]["id"] == 7
    for label in (np.int64(0), {"label": 0}, 0):
        assert torch.equal(compose()(x[0], label)[0], single)
    out, target = make(rgb)(tv_tensors.Image(images(4, 3)), y)
    assert isinstance(out, tv_tensors.Image) and out.dtype == torch.uint8 and target is y


@pytest.mark.parametrize("label", [1, torch.tensor(1), torch.tensor([0.0, 1.0, 0.0, 0.0])])
@pytest.mark.parametrize("partner", ["same", "any"])
def test_single_images_of_a_data_set(rgb: GLEM, label: Any, partner: str) -> None:
    image = tv_tensors.Image(images(1, 3)[0])
    out, target = make(rgb, partner=partner)((image, label))
    assert isinstance(out, tv_tensors.Image) and out.shape == (3, 8, 8) and not torch.equal(out, image)
    if partner == "any" or not isinstance(label, int):
        assert isinstance(target, Tensor) and target.ndim == (1 if partner == "any" else label.ndim)
    else:
        assert target == 1 and isinstance(target, int)
    plain = images(1, 3)[0]
    with torch.device("meta"):  # the label's tensor is made where the image is
        assert make(rgb)(plain, 1)[1] == 1


def test_which_key_holds_the_labels(rgb: GLEM) -> None:
    keys = ["my_labels", "target", "Targets", "label", "LABELS"]  # from the last choice to the first
    for n in range(1, len(keys) + 1):
        sample = {"image": tv_tensors.Image(images(4, 3)), **{key: labels(4).clone() for key in keys[:n]}}
        out = make(rgb, partner="any")(sample)
        assert [key for key in keys[:n] if out[key].ndim == 2] == [keys[n - 1]]


def test_a_labels_getter(rgb: GLEM) -> None:
    x, y = images(4, 3) / 255, labels(4)
    sample = {"image": x, "nested": [torch.zeros(2), y]}
    out = make(rgb).as_transform(lambda s: s["nested"][1])(sample)
    assert torch.equal(out["image"], make(rgb)(x, y)[0])
    assert "labels_getter" in repr(make(rgb).as_transform(lambda s: s))
    wanted = make(rgb, partner="any")(x, y)
    twice = make(rgb, partner="any").as_transform(lambda s: s[1])((x, y, y))  # one tensor in two places
    assert torch.equal(twice[0], wanted[0]) and all(torch.equal(soft, wanted[1]) for soft in twice[1:])


class Triple(NamedTuple):
    image: Tensor
    label: int
    number: int


@pytest.mark.parametrize(
    ("make_sample", "label_of"),
    [
        (lambda x: {"image": x, "index": 1, "label": 1, "id": 1}, lambda s: s["label"]),
        (lambda x: (x, 1, 1), lambda s: s[1]),
        (lambda x: [x, {"index": 1, "Target": 1}], lambda s: s[1]["Target"]),
        (lambda x: Triple(x, 1, 1), lambda s: s.label),
    ],
)
def test_numbers_that_equal_the_label_stay(rgb: GLEM, make_sample: Any, label_of: Any) -> None:
    sample = make_sample(tv_tensors.Image(images(1, 3)[0]))
    same = make(rgb, policy="noise").as_transform()(sample)
    assert type(same) is type(sample) and label_of(same) == 1
    soft = make(rgb, partner="any").as_transform()(sample)
    assert isinstance(label_of(soft), Tensor) and label_of(soft).shape == (4,)
    leaves = tree_leaves(soft)
    assert sum(isinstance(leaf, int) and leaf == 1 for leaf in leaves) == len(leaves) - 2
    # Where a function names the label, it can't be told from its equals; that matters only where it is replaced.
    assert label_of(make(rgb, policy="noise").as_transform(label_of)(sample)) == 1
    with pytest.raises(ValueError, match="more than once"):
        make(rgb, partner="any").as_transform(label_of)(sample)


def test_the_transform_can_be_pickled(rgb: GLEM) -> None:
    chain = v2.Compose([v2.RandomHorizontalFlip(), make(rgb).as_transform()])
    again = pickle.loads(pickle.dumps(chain))
    results = []
    for transform in (chain, again):
        torch.manual_seed(0)
        results.append(transform(images(4, 3) / 255, labels(4))[0])
    assert torch.equal(*results)
    assert list(chain.transforms[1].state_dict()) == ["aug._extra_state"] and not list(chain.parameters())


def test_samples_that_cannot_be_used(rgb: GLEM) -> None:
    aug, x, y = make(rgb), images(2, 3), labels(2)
    with pytest.raises(TypeError, match=r"v2\.ToImage"):
        aug((Image.new("RGB", (8, 8)), 1))
    with pytest.raises(ValueError, match="no labels found"):
        aug({"image": x})
    with pytest.raises(ValueError, match="no image found"):
        aug({"labels": y})
    with pytest.raises(ValueError, match="labels must be a tensor"):
        aug.as_transform(lambda s: "bird")((x, y))
    with pytest.raises(TypeError, match="labels_getter"):
        aug.as_transform(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 images"):
        aug((tv_tensors.Image(x), y, tv_tensors.Image(x)))
    for image in (tv_tensors.Image(x[0]), x[0]):
        for transform in (aug, aug.as_transform()):
            with pytest.raises(ValueError, match=r"without a label.*aug\.wrap\(loader\)"):
                transform(image)
