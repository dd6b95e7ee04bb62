"""Synthetic sets beside real images: balance, and both in one data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from glem_augment import GLEM, RealAndSynthetic, SyntheticDataset, open_data
from glem_augment.errors import ClassMismatchError, DataError
from glem_augment.images.dataset import ImageData
from glem_augment.synthetic.per_class import class_counts, open_real

NAMES = ["dog", "cat", "bird"]


def pixels(n: int, seed: int = 0, shape: tuple[int, int, int] = (3, 8, 8)) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, *shape), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> GLEM:
    model = GLEM.create("identity", (3, 8, 8), classes=NAMES)
    model.fit_modes((pixels(90), torch.arange(90) % 3), rank=8)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tail() -> ImageData:
    """A long tail, whose classes are in another order than the flow's: 12 birds, 5 cats, 2 dogs."""
    return ImageData.from_tensors(pixels(19, seed=1), [0] * 12 + [1] * 5 + [2] * 2, ["bird", "cat", "dog"])


def balanced(model: GLEM, real: Any) -> list[int]:
    return class_counts(model, "balance", open_real(model, real))


def test_balance_fills_the_tail_up_to_the_head(model: GLEM, tail: ImageData, image_folder: Path) -> None:
    data = SyntheticDataset(model, per_class="balance", real=tail)
    assert data.counts == [10, 7, 0]
    assert np.bincount(RealAndSynthetic(tail, data).targets).tolist() == [12, 12, 12]
    (image_folder / "cat" / "0.png").unlink()
    for real in (ImageFolder(image_folder), ImageDataset(str(image_folder))):  # bird 4, cat 3, dog 4
        assert balanced(model, real) == [0, 1, 0]
    assert balanced(model, (pixels(3), torch.tensor([0, 1, 1]))) == [1, 0, 2]  # the model's numbers


def test_balance_leaves_out_classes_that_the_real_data_does_not_name(model: GLEM, tail: ImageData) -> None:
    two = tail.subset(range(17)).with_targets([1] * 12 + [0] * 5, ["cat", "bird"])
    data = SyntheticDataset(model, per_class="balance", real=two)
    assert data.counts == [0, 7, 0]
    assert np.bincount(RealAndSynthetic(two, data).targets).tolist() == [12, 12]
    empty = tail.subset(range(17))  # names dog, but has no image of it
    assert balanced(model, empty) == [12, 7, 0]


def test_classes_that_do_not_match_name_the_fix(model: GLEM, tail: ImageData) -> None:
    more = tail.with_targets(np.where(tail.targets == 2, 3, tail.targets), ["bird", "cat", "dog", "zebra"])
    with pytest.raises(ClassMismatchError, match="'zebra'.*adapt"):
        SyntheticDataset(model, "balance", real=more)
    assert RealAndSynthetic(more, SyntheticDataset(model, per_class=7)).targets[19:21] == [2, 2]
    other = tail.with_targets(tail.targets, ["ape", "bear", "crow"])
    with pytest.raises(ClassMismatchError, match="'ape'"):  # and not that there are too few images
        RealAndSynthetic(other, SyntheticDataset(model, per_class=1))


def test_a_share_of_the_items_are_synthetic_images_of_their_class(model: GLEM, image_folder: Path) -> None:
    real, synthetic = ImageFolder(image_folder), SyntheticDataset(model, per_class={"cat": 40, "dog": 5})
    torch.manual_seed(0)
    both = RealAndSynthetic(real, synthetic, share=0.5)
    assert "12 real and a share of 0.5 of 45" in repr(both) and len(both) == 12 and both.targets == real.targets
    originals = {np.asarray(image).tobytes() for image, _ in real}
    drawn = [[np.asarray(image).tobytes() for image, label in (both[i] for _ in range(60))] for i in (0, 5, -1)]
    assert set(drawn[0]) <= originals  # no bird is drawn
    shares = [sum(image not in originals for image in images) / 60 for images in drawn[1:]]
    assert all(0.25 < share < 0.75 for share in shares) and [len(set(images)) > 5 for images in drawn[1:]] == [
        True,
        True,
    ]
    assert [label for _, label in both.__getitems__([0, 5, 11])] == [0, 1, 2]
    assert all(label == 1 for _, label in [RealAndSynthetic(real, synthetic, share=1)[5] for _ in range(5)])


def test_real_and_synthetic(model: GLEM, image_folder: Path) -> None:
    real = ImageFolder(image_folder)  # bird, cat, dog: 4 each
    synthetic = SyntheticDataset(model, per_class=2)
    both = RealAndSynthetic(real, synthetic)
    assert (
        "12 real and 6 synthetic" in repr(both)
        and len(both) == 18
        and both.classes == ["bird", "cat", "dog"]
        and both.class_to_idx["dog"] == 2
    )
    assert both.targets[:12] == real.targets and np.bincount(both.targets[12:]).tolist() == [2, 2, 2]
    for i in range(-1, 18):
        image, label = both[i]
        assert image.size == (8, 8) and label == both.targets[i]
        if i >= 12:
            drawn, flow_label = synthetic[i - 12]
            assert np.array_equal(np.asarray(image), np.asarray(drawn)) and NAMES[flow_label] == both.classes[label]
    assert [label for _, label in both.__getitems__([13, 2, 17])] == [both.targets[i] for i in (13, 2, 17)]
    with pytest.raises(IndexError):
        both[18]
    Image.new("RGB", (6, 9)).save(image_folder / "dog" / "0.png")  # PIL images of several sizes
    both = RealAndSynthetic(str(image_folder), synthetic, transform=lambda image: to_tensor(image.resize((5, 4))))
    assert [x.shape for x, _ in DataLoader(both, batch_size=6)] == [(6, 3, 4, 5)] * 3


def test_labels_of_both_kinds_look_like_the_real_datas(model: GLEM, image_folder: Path) -> None:
    real = ImageFolder(image_folder, target_transform=lambda label: label + 100)
    both = RealAndSynthetic(Subset(real, range(12)), SyntheticDataset(model, per_class=2))
    assert [both[i][1] for i in range(len(both))] == [label + 100 for label in both.targets]
    both.synthetic.target_transform = torch.tensor  # the transform of the synthetic set comes first
    assert isinstance(both[-1][1], Tensor)


@pytest.mark.parametrize("kind", ["subset", "prefetched"])
def test_both_kinds_in_timms_own_loader(image_folder: Path, kind: str) -> None:
    """timm sets the transform of the data set that it is given; grey images of a flow come out as the real RGB ones."""
    grey = GLEM.create("identity", (1, 8, 8), classes=sorted(p.name for p in image_folder.iterdir())).eval()
    whole = ImageDataset(str(image_folder))
    real = Subset(whole, range(4)) if kind == "subset" else whole
    both = RealAndSynthetic(real, SyntheticDataset(grey, per_class=3))
    loader = create_loader(
        both, input_size=(3, 16, 16), batch_size=len(both), is_training=False, num_workers=0,
        persistent_workers=False, use_prefetcher=kind == "prefetched", device=torch.device("cpu"),
    )  # fmt: skip
    ((x, y),) = list(loader)
    assert x.shape == (len(both), 3, 16, 16) and y.tolist() == both.targets and both.transform is not None
    assert whole.transform is None  # another subset of it may be the validation set


def test_an_export_has_the_real_labels_where_a_class_needs_no_images(
    model: GLEM, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/0", "dog/0", "dog/1"):
        (image_folder / f"{name}.png").unlink()
    real = ImageFolder(image_folder)  # bird: 4, cat: 3, dog: 2; the flow has them the other way round
    drawn = SyntheticDataset(model, per_class="balance", real=real)
    folder = drawn.export(tmp_path / "fill")
    assert "no folder for 1 of 3 classes" in caplog.text and "open_data" in caplog.text
    assert json.loads((folder / "classes.json").read_text()) == {"bird": 0, "cat": 1, "dog": 2}
    assert ImageFolder(folder).targets == [0, 1, 1]  # torchvision's numbers are not the real ones
    fill = open_data(folder)
    assert fill.classes == real.classes and fill.targets.tolist() == [1, 2, 2]
    assert torch.equal(fill.tensor(), drawn.images([2, 0, 1]))
    for synthetic in (folder, fill, drawn):
        both = RealAndSynthetic(real, synthetic)
        assert np.bincount(both.targets).tolist() == [4, 4, 4] and [both[i][1] for i in range(12)] == both.targets
        assert both[-1][0].mode == "RGB"
    tensors = RealAndSynthetic(open_data(real), folder)
    assert torch.equal(tensors[-1][0], fill[2][0])


@pytest.mark.parametrize("kind", ["name", "pair", "subset"])
def test_real_data_of_any_kind(model: GLEM, image_folder: Path, kind: str) -> None:
    whole = open_data(image_folder)
    x, y = whole.tensor(), torch.tensor([2] * 4 + [1] * 4 + [0] * 4)  # in the flow's numbers
    real: Any = {"name": str(image_folder), "pair": (x, y), "subset": Subset(whole, range(12))}[kind]
    both = RealAndSynthetic(real, SyntheticDataset(model, per_class=1))
    assert np.bincount(both.targets).tolist() == [5, 5, 5]
    if kind == "name":
        assert np.array_equal(np.asarray(both[11][0]).transpose(2, 0, 1), x[11]) and both[14][0].mode == "RGB"
    else:  # uint8 tensors, as the real ones
        batches = list(DataLoader(both, batch_size=5, shuffle=True))
        assert all(images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8) for images, _ in batches)
        assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == sorted(both.targets)


def test_class_maps(model: GLEM, tail: ImageData) -> None:
    two = tail.subset(range(17)).with_targets([0] * 12 + [1] * 5, ["bird", "cat"])
    synthetic = SyntheticDataset(model, per_class=1)
    with pytest.raises(DataError, match="dog.*class_map"):
        RealAndSynthetic(two, synthetic)
    numbers = TensorDataset(pixels(4), torch.tensor([0, 1, 2, 0]))
    assert RealAndSynthetic(numbers, synthetic).targets[4:] == [0, 1, 2]
    assert RealAndSynthetic(numbers, synthetic, {"0": "bird", "1": "dog", "2": "cat"}).targets[4:] == [1, 2, 0]
    assert RealAndSynthetic(tail, synthetic, "order").targets[19:] == [0, 1, 2]
    more = tail.with_targets(tail.targets, ["zebra", "felix", "oiseau", "dog"])  # without images of the last
    felix = RealAndSynthetic(more, SyntheticDataset(model, per_class={"cat": 2}), {"felix": "cat"})
    assert felix.targets[19:] == [1, 1] and felix.classes == more.classes


def test_one_class_for_all_gives_no_labels_and_one_folder(tail: ImageData, tmp_path: Path) -> None:
    one = GLEM.fit(tail.with_targets([0] * len(tail), ["image"]))
    with pytest.raises(DataError, match="several real classes"):
        RealAndSynthetic(tail, SyntheticDataset(one, 6))
    SyntheticDataset(one, 6).export(tmp_path / "out")
    found = open_data(tmp_path / "out")
    assert found.classes == ["image"] and len(found) == 6


def test_labels_are_the_class_numbers_of_the_real_data(model: GLEM) -> None:
    """The model has cat, bird, dog in another order than the real data."""
    names = [model.classes[k] for k in (2, 0, 1)]
    y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    real = ImageData.from_tensors(torch.zeros(10, *model.image_shape, dtype=torch.uint8), y, names)
    drawn = SyntheticDataset(model, per_class="balance", real=real)
    assert drawn.classes == names and sorted(drawn.targets) == [1] * 2 + [2] * 3
    for index, label in enumerate(drawn.targets):
        assert drawn[index][1] == label
        same = SyntheticDataset(model, per_class={names[label]: 3})  # the same draws, with the model's numbers
        place = drawn.targets[:index].count(label)
        assert torch.equal(drawn.latents([index]), same.latents([place]))
    both = RealAndSynthetic(real, drawn)
    assert both.targets == [*y.tolist(), *drawn.targets]
