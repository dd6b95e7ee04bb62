"""GLEMAugment as a torchvision v2 transform, on whatever structure a sample has."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from augment_cases import images, labels
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors
from torchvision.transforms import v2

from glem_augment import GLEM, GLEMAugment, Mixup


def make(rgb: GLEM, partner: Any = "same") -> GLEMAugment:
    return GLEMAugment(rgb, Mixup(partner=partner), p=1.0, modes=16, seed=0)


@pytest.mark.parametrize("soft", [False, True])
def test_structures_come_back_as_they_were(rgb: GLEM, soft: bool) -> None:
    x, y = images(4, 3) / 255, labels(4)
    y = F.one_hot(y, 4).float() if soft else y
    wanted = make(rgb, partner="any")(x, y)
    image, mask = tv_tensors.Image(x), tv_tensors.Mask(torch.zeros(4, 8, 8))
    cases: list[Any] = [
        [x, y, torch.arange(4)],
        {"image": x, "target": 7, "label": y},  # the first of LABEL_KEYS counts
        OrderedDict(number=3, image=image, Labels=y),
        (image, {"labels": y, "mask": mask}),
    ]
    for sample in cases:
        out = v2.Compose([nn.Identity(), make(rgb, partner="any").as_transform()])(sample)
        assert type(out) is type(sample)
        for leaf, before in zip(tree_leaves(out), tree_leaves(sample), strict=True):
            if before is x or before is image:
                assert type(leaf) is type(before) and torch.equal(leaf, wanted[0])
            elif before is y:
                assert torch.equal(leaf, wanted[1])
            else:
                assert leaf is before
    out, target = make(rgb).as_transform()(image, labels(4))  # as torchvision's MixUp takes them
    assert isinstance(out, tv_tensors.Image) and torch.equal(target, labels(4))


@pytest.mark.parametrize("label", [1, torch.tensor(1), torch.tensor([0.0, 1.0, 0.0, 0.0])])
@pytest.mark.parametrize("partner", ["same", "any"])
def test_single_images_of_a_data_set(rgb: GLEM, label: Any, partner: str) -> None:
    image = tv_tensors.Image(images(1, 3)[0])
    out, target, number = make(rgb, partner=partner).as_transform()((image, label, 1))
    assert isinstance(out, tv_tensors.Image) and out.shape == (3, 8, 8) and not torch.equal(out, image)
    assert type(number) is int and number == 1  # a number that equals the label stays
    if partner == "any" or not isinstance(label, int):
        assert isinstance(target, Tensor) and target.ndim == (1 if partner == "any" else label.ndim)
    else:
        assert target == 1 and isinstance(target, int)


def test_samples_that_cannot_be_used(rgb: GLEM) -> None:
    transform, x, y = make(rgb).as_transform(), images(2, 3), labels(2)
    for sample, named in (
        ((Image.new("RGB", (8, 8)), 1), "ToImage"),
        ({"image": x}, "labels"),
        ({"labels": y}, "image"),
        ((tv_tensors.Image(x), y, tv_tensors.Image(x)), "2 images"),
        (x[0], r"aug\.wrap\(loader\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=named):
            transform(sample)
