"""Synthetic sets for a purpose: counts per class, balance, real latents mixed, rejection, mixing with real, streams."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import ImageDataset, create_loader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler
from torchvision.datasets import ImageFolder

from glem_augment import GLEM, ClassMismatchError, DataError, ImageData, SyntheticDataset
from glem_augment.synthetic.balance import class_counts, flow_targets, targets_and_classes
from glem_augment.synthetic.combined import RealAndSynthetic
from glem_augment.synthetic.epochs import STARTS, Epochs
from glem_augment.synthetic.latents import RealLatents
from glem_augment.synthetic.rejection import Rejection
from glem_augment.synthetic.stream import SyntheticStream

NAMES = ["dog", "cat", "bird"]


def pixels(n: int, seed: int = 0, shape: tuple[int, int, int] = (3, 8, 8)) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, *shape), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> GLEM:
    """Classes far enough apart that the posterior knows them, near enough that some draws are rejected."""
    model = GLEM.create("identity", (3, 8, 8), classes=NAMES)
    model.fit_modes((pixels(90), torch.arange(90) % 3), rank=8)
    with torch.no_grad():
        level = torch.tensor([-0.07, 0.0, 0.07])
        model.gaussians.mu.copy_(level[:, None].expand_as(model.gaussians.mu))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tail() -> ImageData:
    """A long tail, whose classes are in another order than the flow's: 12 birds, 5 cats, 2 dogs."""
    y = [0] * 12 + [1] * 5 + [2] * 2
    return ImageData.from_tensors(pixels(19, seed=1), y, ["bird", "cat", "dog"])


# ---- counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_class", "counts"),
    [
        (4, [4, 4, 4]),
        ([5, 0, 9], [5, 0, 9]),
        (np.array([0, 0, 2]), [0, 0, 2]),
        (torch.tensor([1, 2, 0]), [1, 2, 0]),
        ({"cat": 7, "bird": 1}, [0, 7, 1]),
        ({0: 3}, [3, 0, 0]),
    ],
)
def test_counts_per_class(model: GLEM, per_class: Any, counts: list[int]) -> None:
    data = SyntheticDataset(model, per_class=per_class, block=4)
    assert data.counts == counts and len(data) == sum(counts)
    assert data.targets == np.repeat([0, 1, 2], counts).tolist()
    assert class_counts(model, json.loads(json.dumps(data.per_class))) == counts  # the record says the same
    whole = data.images(range(len(data)))
    order = torch.randperm(len(data)).tolist()
    assert torch.equal(data.images(order), whole[order]) and data[-1][1] == data.targets[-1]
    even = SyntheticDataset(model, per_class=10, block=4)
    rows = [10 * c + i for c, n in enumerate(counts) for i in range(n)]
    assert torch.equal(data.latents(range(len(data))), even.latents(rows))  # the same items as in any other set


def test_export_of_uneven_counts(model: GLEM, tmp_path: Path) -> None:
    SyntheticDataset(model, per_class=[3, 0, 5], block=2).export(tmp_path, progress=False)
    assert {p.name: len(list(p.glob("*.png"))) for p in tmp_path.iterdir() if p.is_dir()} == {
        "dog": 3,
        "bird": 5,
    }


def test_balance_fills_the_tail_up_to_the_head(model: GLEM, tail: ImageData, image_folder: Path) -> None:
    data = SyntheticDataset(model, per_class="balance", real=tail)
    assert data.counts == [10, 7, 0] and data.per_class == "balance"
    both = np.bincount(RealAndSynthetic(tail, data, ratio=None).targets)
    assert both.tolist() == [12, 12, 12]
    (image_folder / "cat" / "0.png").unlink()
    for real in (ImageFolder(image_folder), ImageDataset(str(image_folder))):  # bird 4, cat 3, dog 4
        assert class_counts(model, "balance", real) == [0, 1, 0]
    numbers = torch.utils.data.TensorDataset(torch.zeros(5, 1), torch.tensor([0, 0, 1, 2, 0]))
    assert class_counts(model, "balance", numbers) == [0, 2, 2]
    assert flow_targets(model, (pixels(3), torch.tensor([2, 1, 0]))).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("per_class", "message"),
    [
        ("even", "'balance', got 'even'"),
        ("balance", "give real="),
        ([1, 2], "2 numbers, the flow 3"),
        ([1, 2, -1], r"per_class\[2\] must be at least 0"),
        ([0, 0, 0], "no image at all"),
        ({"cow": 3}, "names 'cow'; the flow has dog, cat, bird"),
        ({5: 3}, "class 5"),
        ({"cat": 1.5}, "must be an int"),
        ({"cat": 1, 1: 2}, "the class 'cat' twice"),
    ],
)
def test_bad_counts(model: GLEM, per_class: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SyntheticDataset(model, per_class=per_class)


def test_bad_real_data(model: GLEM, tail: ImageData) -> None:
    even = (pixels(3), torch.arange(3))
    with pytest.raises(ValueError, match="have 1 images already"):
        class_counts(model, "balance", even)
    with pytest.raises(DataError, match="0 to 2, found 0 to 3"):
        class_counts(model, "balance", (pixels(2), torch.tensor([0, 3])))
    with pytest.raises(DataError, match="no labels that can be read"):
        class_counts(model, "balance", [1, 2, 3])
    with pytest.raises(DataError, match="labels must be whole numbers"):
        class_counts(model, "balance", (pixels(2).numpy(), [0.5, 1.0]))
    assert class_counts(model, "balance", (pixels(3).numpy(), [0, 1, 1])) == [1, 0, 2]
    other = tail.with_targets(tail.targets, ["cow", "cat", "dog"])
    with pytest.raises(DataError, match="no counterpart"):
        class_counts(model, "balance", other)


def test_balance_leaves_out_what_the_real_data_does_not_name(model: GLEM, tail: ImageData) -> None:
    two = tail.subset(range(17)).with_targets([1] * 12 + [0] * 5, ["cat", "bird"])
    assert class_counts(model, "balance", two) == [0, 7, 0]
    for source in ("gaussian", "mixup"):
        data = SyntheticDataset(model, per_class="balance", real=two, source=source, modes=8)
        assert data.counts == [0, 7, 0]
        assert np.bincount(RealAndSynthetic(two, data, ratio=None).targets).tolist() == [12, 12]
    empty = tail.subset(range(17))  # names dog, but has no image of it
    assert class_counts(model, "balance", empty) == [12, 7, 0]
    with pytest.raises(ValueError, match="no real image of dog"):
        SyntheticDataset(model, per_class="balance", real=empty, source="mixup", modes=8)


def test_labels_that_are_no_whole_numbers_are_refused(model: GLEM) -> None:
    x = torch.zeros(4, 3, 8, 8)
    for bad in (torch.tensor([0.0, 0.9, 1.7, 2.0]), torch.eye(4), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(DataError, match="labels must be whole numbers"):
            SyntheticDataset(model, per_class="balance", real=TensorDataset(x, bad))
    named = TensorDataset(x)
    named.targets = ["cat", "cat", "dog", "bird"]
    with pytest.raises(DataError, match="labels must be whole numbers"):
        SyntheticDataset(model, per_class="balance", real=named)


def test_a_key_is_a_name_before_it_is_an_id() -> None:
    crossed = GLEM.create("identity", (3, 8, 8), classes=["ant", "bee", "n3"], class_ids=["bee", "n1", "ant"])
    assert class_counts(crossed, {"bee": 4}) == [0, 4, 0]
    assert class_counts(crossed, {"n1": 2, "ant": 1, "n3": 5}) == [1, 2, 5]


def test_ids_and_first_names_of_torchvisions_imagenet(model: GLEM) -> None:
    synonyms = [("tench", "Tinca tinca"), ("goldfish", "Carassius auratus")]
    real = SimpleNamespace(targets=[1, 0, 1], classes=synonyms, wnids=["n01440764", "n01443537"])
    targets, names = targets_and_classes(real)
    assert targets.tolist() == [1, 0, 1] and names == (["n01440764", "n01443537"], ["tench", "goldfish"])
    real.wnids = ["n01440764"]
    assert targets_and_classes(real)[1] == (["tench", "goldfish"], ["tench", "goldfish"])


def test_a_class_that_the_flow_lacks_says_what_helps(model: GLEM, tail: ImageData) -> None:
    y = np.where(tail.targets == 2, 3, tail.targets)
    more = tail.with_targets(y, ["bird", "cat", "dog", "zebra"])
    other = tail.with_targets(tail.targets, ["fox", "cow", "zebra"])
    twice = tail.with_targets(tail.targets, ["bird", "cat", "Cat"], ["b", "c", "cat"])
    for real, what in ((more, "'zebra'"), (other, "'cow'"), (twice, "'cat'")):
        for settings in ({"per_class": "balance"}, {"source": "mixup", "modes": 8}):
            with pytest.raises(ClassMismatchError, match=what + r".*model\.adapt\(data\)") as info:
                SyntheticDataset(model, real=real, **settings)
            assert "class_map" not in str(info.value)
    with pytest.raises(ClassMismatchError, match="zebra.*Give class_map, the real data's label for every class"):
        RealAndSynthetic(more, SyntheticDataset(model, per_class=10))


# ---- mixup of real latents ----------------------------------------------------------------------------


def test_mixup_items_lie_between_two_real_images_of_the_class(model: GLEM, tail: ImageData) -> None:
    data = SyntheticDataset(model, per_class=6, source="mixup", real=tail, modes=8, seed=1)
    z = data.latents(range(18))
    real = model.encode(tail.tensor())[0]
    of_class = {c: real[[i for i, t in enumerate(tail.targets) if t == 2 - c]] for c in range(3)}
    for i in range(18):
        v = model.modes.directions[i // 6]
        members = of_class[i // 6]
        outside = [(z[i] - m) - (z[i] - m) @ v.T @ v for m in members]
        nearest = int(torch.stack([o.norm() for o in outside]).argmin())
        assert outside[nearest].norm() < 1e-4  # moved along the modes only, from one of them
        moved = (z[i] - members[nearest]) @ v.T
        targets = [(m - members[nearest]) @ v.T for j, m in enumerate(members) if j != nearest]
        shares = [float(moved @ t / (t @ t)) for t in targets]
        best = min(range(len(targets)), key=lambda j: float((moved - shares[j] * targets[j]).norm()))
        assert (moved - shares[best] * targets[best]).norm() < 1e-4 and 1e-4 < shares[best] <= 0.5 + 1e-5
    order = torch.randperm(18).tolist()
    assert torch.equal(data.latents(order), z[order])
    again = SyntheticDataset(model, per_class=6, source="mixup", real=tail, modes=8, seed=1, block=5)
    assert torch.equal(again.latents(range(18)), z)
    assert torch.equal(pickle.loads(pickle.dumps(data)).images([0, 9]), data.images([0, 9]))


def test_mixup_encodes_the_real_images_once(model: GLEM, tail: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = GLEM.encode
    monkeypatch.setattr(GLEM, "encode", lambda m, x, *a: encoded.append(len(x)) or encode(m, x, *a))
    data = SyntheticDataset(model, per_class=[9, 0, 9], source="mixup", real=tail, modes=4)
    data.images(range(18))
    assert encoded == [19]
    one = (pixels(3), torch.tensor([0, 1, 2]))  # a class of one image gives that image
    alone = SyntheticDataset(model, per_class=2, source="mixup", real=one, modes=4)
    assert torch.equal(alone.images([0, 3]), one[0][[0, 1]])


def test_the_hash_of_real_latents_tells_labels_apart(model: GLEM) -> None:
    x = pixels(6)
    labels = ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 2])  # the same images in the same order
    first, other, again = (RealLatents(model, ImageData.from_tensors(x, y, NAMES)).sha256 for y in labels)
    assert first == again != other


def test_mixup_needs_images(model: GLEM, tail: ImageData) -> None:
    with pytest.raises(ValueError, match="give real="):
        SyntheticDataset(model, source="mixup", modes=8)
    with pytest.raises(ValueError, match="from 1 to 8"):
        SyntheticDataset(model, source="mixup", real=tail, modes=64)
    assert SyntheticDataset(model, source="mixup", real=tail).latent_source.modes == 8  # all there are
    with pytest.raises(ValueError, match="no real image of dog"):
        SyntheticDataset(model, source="mixup", real=tail.subset(range(17)), modes=8)
    with pytest.raises(TypeError, match="the images themselves"):
        SyntheticDataset(model, source="mixup", real=[1], modes=8)
    with pytest.raises(DataError, match=r"image_size=\(8, 8\), channels=3"):
        SyntheticDataset(model, source="mixup", real=(pixels(6, shape=(3, 4, 4)), torch.arange(6) % 3), modes=8)


# ---- rejection ----------------------------------------------------------------------------------------


def test_the_posterior_rejects(model: GLEM) -> None:
    plain = SyntheticDataset(model, per_class=40, temperature=1.0, block=16)
    before = model.posterior_from_latents(plain.latents(range(120))).gather(1, torch.tensor(plain.targets)[:, None])
    data = SyntheticDataset(model, per_class=40, temperature=1.0, block=16, min_confidence=0.6, max_attempts=300)
    z = data.latents(range(120))
    after = model.posterior_from_latents(z).gather(1, torch.tensor(data.targets)[:, None])[:, 0]
    assert 0.1 < float((before < 0.6).float().mean()) < 0.9 and (after >= 0.6).all()
    kept = before[:, 0] >= 0.6
    assert torch.equal(z[kept], plain.latents(range(120))[kept])  # what was good stays
    assert torch.equal(data.latents([77, 3])[0], z[77])
    assert data.acceptance()["total"] == {
        "items": 0,
        "candidates": 0,
        "rate": None,
        "failed": 0,
        "confidence": None,
    }
    images = data.images(range(120))
    decoded = model.decode(z)
    assert (decoded * 255 - images).abs().max() <= 0.5 + 1e-3
    report = json.loads(json.dumps(data.acceptance()))
    total = report["total"]
    assert total["items"] == 120 and total["failed"] == 0 and total["candidates"] > 120
    assert total["rate"] == pytest.approx(120 / total["candidates"])
    assert total["confidence"] == pytest.approx(float(after.mean()), abs=1e-4)
    assert sum(row["candidates"] for row in report["classes"].values()) == total["candidates"]
    assert list(report["classes"]) == NAMES


def test_what_never_passes_is_the_best_and_is_told(model: GLEM) -> None:
    settings: dict[str, Any] = {"per_class": 8, "temperature": 1.0, "block": 8}
    data = SyntheticDataset(model, min_confidence=1.0, max_attempts=3, **settings)
    data.images(range(24))
    total = data.acceptance()["total"]
    assert total["failed"] > 12 and total["candidates"] <= 72
    assert total["rate"] == pytest.approx((24 - total["failed"]) / total["candidates"])
    once = SyntheticDataset(model, min_confidence=1.0, max_attempts=1, **settings)
    y = torch.tensor(data.targets)[:, None]
    three, one = (model.posterior_from_latents(d.latents(range(24))).gather(1, y) for d in (data, once))
    assert (three >= one).all() and (three > one).any()
    assert torch.equal(once.images(range(24)), SyntheticDataset(model, **settings).images(range(24)))


class Brightness(nn.Module):
    """Logits for dark, medium and bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.min() >= 0 and x.max() <= 1 and not self.training
        mean = x.flatten(1).mean(1, keepdim=True)
        return -400 * (mean - torch.tensor([0.43, 0.5, 0.57])).abs()


@pytest.mark.parametrize("as_probabilities", [False, True])
def test_an_oracle_rejects(model: GLEM, as_probabilities: bool) -> None:
    net = Brightness().train()
    oracle: Any = net
    if as_probabilities:
        oracle = lambda x: Brightness().eval()(x).softmax(1)  # noqa: E731
    data = SyntheticDataset(model, per_class=20, temperature=1.0, block=8, min_confidence=0.8, oracle=oracle)
    images = data.images(range(60)) / 255
    assert net.training
    confidence = Brightness().eval()(images).softmax(1).gather(1, torch.tensor(data.targets)[:, None])
    assert (confidence > 0.75).all()  # rounding to uint8 moves it a little
    report = data.acceptance()["total"]
    assert report["candidates"] > 60 and report["failed"] == 0
    assert torch.equal(data.images([33, 2]), data.images(range(60))[[33, 2]])
    loader = DataLoader(data, batch_size=7, num_workers=1, collate_fn=len)
    assert sum(loader) == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_any_dtype_stay_as_they_are(dtype: torch.dtype) -> None:
    p = torch.tensor([[0.3007, 0.3007, 0.3986]]).repeat(5, 1).to(dtype)
    judge = Rejection(0.5, Brightness(), 3)
    assert torch.equal(judge._probabilities(p, 5, 3), p.float())
    logits = torch.tensor([[2.0, 0.5, 0.0]]).to(dtype)
    expected = logits.float().softmax(1)
    assert torch.equal(Rejection(0.5, Brightness(), 3)._probabilities(logits, 1, 3), expected)


def test_what_an_oracle_gives_is_told_once_and_a_bad_row_has_no_say() -> None:
    good, bad = [0.9, 0.1, 0.0], [float("nan"), 0.5, 0.5]
    judge = Rejection(0.5, Brightness(), 3)
    assert not judge._probabilities(torch.tensor([bad, bad]), 2, 3).any()  # says nothing yet
    found = judge._probabilities(torch.tensor([good, bad, good]), 3, 3)
    assert found.tolist() == torch.tensor([good, [0.0] * 3, good]).tolist()
    odd = torch.tensor([[0.9, 0.2, 0.0]])
    assert torch.equal(judge._probabilities(odd, 1, 3), odd)
    judge = Rejection(0.5, Brightness(), 3)
    ruled_out = torch.tensor([[3.0, -torch.inf, 1.0], [torch.nan, 0.0, 0.0]])
    assert torch.equal(judge._probabilities(ruled_out, 2, 3)[0], ruled_out[0].softmax(0))
    unit = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(judge._probabilities(unit, 1, 3), unit.softmax(1))  # logits by chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_of_an_oracle_counts_for_its_own_image_only(model: GLEM, dtype: torch.dtype) -> None:
    def oracle(x: Tensor) -> Tensor:
        p = torch.tensor([0.3007, 0.3007, 0.3986]).repeat(len(x), 1).to(dtype)
        p[0, 2] = torch.nan
        return p

    data = SyntheticDataset(model, per_class=8, block=8, min_confidence=0.3, oracle=oracle, max_attempts=1)
    data.images(range(24))
    for name, p in (("dog", 0.3007), ("bird", 0.3986)):
        row = data.acceptance()["classes"][name]
        assert row["failed"] == 1 and row["confidence"] == pytest.approx(7 * p / 8, abs=2e-3)


def test_an_image_that_is_not_finite_is_not_accepted(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = GLEM.decode

    def broken(self: GLEM, z: Tensor, clamp: bool = True) -> Tensor:
        x = decode(self, z, clamp)
        x[1, 0, 0] = torch.nan  # the oracle is shown grey there
        return x

    monkeypatch.setattr(GLEM, "decode", broken)
    sure = torch.tensor([1.0, 0.0, 0.0])
    settings: dict[str, Any] = {"per_class": [8, 0, 0], "min_confidence": 0.5, "max_attempts": 1}
    data = SyntheticDataset(model, oracle=lambda x: sure.expand(len(x), 3), **settings)
    data.images(range(8))
    total = data.acceptance()["total"]
    assert total["failed"] == 1 and total["confidence"] == 7 / 8


def test_bad_rejection(model: GLEM) -> None:
    for settings, message in (
        ({"min_confidence": 0.0}, "above 0|from 0"),
        ({"min_confidence": 1.5}, "min_confidence must be"),
        ({"oracle": Brightness()}, "give one, such as 0.5"),
        ({"min_confidence": 0.5, "oracle": 3}, "oracle must take images"),
        ({"min_confidence": 0.5, "max_attempts": 0}, "max_attempts"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            SyntheticDataset(model, **settings)
    with pytest.raises(ValueError, match="without min_confidence"):
        SyntheticDataset(model).acceptance()
    wrong = SyntheticDataset(model, min_confidence=0.5, oracle=lambda x: torch.zeros(len(x), 5))
    with pytest.raises(ValueError, match=r"\[64, 3\].*got \(64, 5\)"):
        wrong.images([0])


# ---- mixing with real data ----------------------------------------------------------------------------


def test_real_and_synthetic_at_a_ratio(model: GLEM, image_folder: Path) -> None:
    real = ImageFolder(image_folder)  # bird, cat, dog: 4 each
    synthetic = SyntheticDataset(model, per_class=10)
    both = RealAndSynthetic(real, synthetic, ratio=0.5)
    assert len(both) == 18 and both.classes == ["bird", "cat", "dog"] and both.class_to_idx["dog"] == 2
    assert both.targets[:12] == real.targets and np.bincount(both.targets[12:]).tolist() == [2, 2, 2]
    assert [both.is_synthetic(i) for i in (0, 11, 12, -1)] == [False, False, True, True]
    for i in (0, 5, 12, 15, -1):
        image, label = both[i]
        assert image.size == (8, 8) and label == both.targets[i]
    items = both.__getitems__([13, 2, 17])
    assert np.array_equal(np.asarray(items[0][0]), np.asarray(both[13][0])) and items[1][1] == real.targets[2]
    flow_label = synthetic.targets[int(both.chosen[0])]
    assert NAMES[flow_label] == both.classes[both.targets[12]]
    assert len(RealAndSynthetic(real, synthetic, ratio=0)) == 12
    assert "12 real, 6 synthetic" in repr(both)
    with pytest.raises(IndexError, match="index 18"):
        both[18]
    with pytest.raises(DataError, match="needs 36 synthetic ones, there are 30"):
        RealAndSynthetic(real, synthetic, ratio=3.0)
    with pytest.raises(TypeError, match="SyntheticDataset"):
        RealAndSynthetic(real, real)
    with pytest.raises(TypeError, match="got a tuple: torch.utils.data.TensorDataset"):
        RealAndSynthetic((pixels(4), torch.zeros(4, dtype=torch.int64)), synthetic)


def test_labels_of_both_kinds_are_the_real_datas_whatever_they_look_like(model: GLEM, image_folder: Path) -> None:
    real = ImageFolder(image_folder, target_transform=lambda label: label + 100)
    both = RealAndSynthetic(Subset(real, range(12)), SyntheticDataset(model, per_class=2), ratio=None)
    assert [both[i][1] for i in range(len(both))] == [label + 100 for label in both.targets]
    real = ImageFolder(image_folder, target_transform=torch.tensor)
    both = RealAndSynthetic(real, SyntheticDataset(model, per_class=2, target_transform=torch.tensor), ratio=None)
    assert [int(both[i][1]) for i in range(len(both))] == both.targets
    assert [both.classes[i] for i in both.targets[12:]] == [name for name in NAMES for _ in range(2)]


def test_a_data_set_that_calls_its_transform_can_be_given_one(model: GLEM, image_folder: Path) -> None:
    class Mine(Dataset):
        def __init__(self) -> None:
            self.folder, self.transform = ImageFolder(image_folder), np.asarray
            self.classes, self.targets = self.folder.classes, self.folder.targets

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            image, label = self.folder[index]
            return self.transform(image), label

    both = RealAndSynthetic(Mine(), SyntheticDataset(model, per_class=1), ratio=None)
    both.transform = lambda image: image.size
    assert both[0][0] == (8, 8) and both[-1][0] == (8, 8)

    class Broken(Mine):
        def __getitem__(self, index: int) -> Any:
            raise OSError("gone")

    both = RealAndSynthetic(Broken(), SyntheticDataset(model, per_class=1), ratio=None)
    with pytest.raises(OSError, match="gone"):
        both.transform = len
    assert both.transform is np.asarray


def test_parts_of_data_sets_are_real_data_too(model: GLEM, image_folder: Path) -> None:
    folder = ImageFolder(image_folder)
    order = sorted(range(len(folder)), key=lambda i: (i % 3, i))[: len(folder) - 2]
    part = Subset(folder, order)
    targets, names = targets_and_classes(part)
    assert targets.tolist() == [folder.targets[i] for i in order] and names == (folder.classes, folder.classes)
    both = ConcatDataset([part, Subset(folder, [0, 1])])
    assert targets_and_classes(both)[0].tolist() == [*targets, folder.targets[0], folder.targets[1]]
    synthetic = SyntheticDataset(model, per_class="balance", real=Subset(folder, [*range(len(folder))][:-1]))
    joined = RealAndSynthetic(part, SyntheticDataset(model, per_class=2), ratio=None)
    assert synthetic.counts[model.classes.index(folder.classes[folder.targets[-1]])] > 0
    assert joined.classes == folder.classes and joined[len(order)][1] == joined.targets[len(order)]
    with pytest.raises(DataError, match="other classes than its first"):
        targets_and_classes(ConcatDataset([folder, SyntheticDataset(model, per_class=1)]))


@pytest.mark.parametrize("prefetch", [False, True])
def test_both_kinds_in_timms_own_loader(image_folder: Path, prefetch: bool) -> None:
    """timm sets the transform of the data set that it is given; grey images of a flow come out as the real RGB ones."""
    grey = GLEM.create("identity", (1, 8, 8), classes=sorted(p.name for p in image_folder.iterdir())).eval()
    real = ImageDataset(str(image_folder))
    both = RealAndSynthetic(real, SyntheticDataset(grey, per_class=3), ratio=None)
    loader = create_loader(
        both, input_size=(3, 16, 16), batch_size=len(both), is_training=False, num_workers=0,
        persistent_workers=False, use_prefetcher=prefetch, device=torch.device("cpu"),
    )  # fmt: skip
    (x, y), *more = list(loader)
    assert not more and x.shape == (len(both), 3, 16, 16) and y.tolist() == both.targets
    assert both.transform is real.transform and "_InMode('RGB'" in repr(both.synthetic.transform)


def test_the_share_of_a_sampler(model: GLEM, tail: ImageData) -> None:
    both = RealAndSynthetic(tail, SyntheticDataset(model, per_class=50), ratio=None)
    for share in (0.0, 0.3, 1.0):
        drawn = list(WeightedRandomSampler(both.weights(share), 4000, generator=torch.Generator().manual_seed(0)))
        assert abs(np.mean([both.is_synthetic(i) for i in drawn]) - share) < 0.03
    with pytest.raises(ValueError, match="both kinds"):
        RealAndSynthetic(tail, SyntheticDataset(model, per_class=1), ratio=0).weights(0.5)


def test_classes_that_only_one_side_has(model: GLEM, tail: ImageData) -> None:
    two = tail.subset([i for i, t in enumerate(tail.targets) if t < 2]).with_targets(
        [0] * 12 + [1] * 5, ["bird", "cat"]
    )
    with pytest.raises(DataError, match="no class for the synthetic dog"):
        RealAndSynthetic(two, SyntheticDataset(model, per_class=3), ratio=None)
    both = RealAndSynthetic(two, SyntheticDataset(model, per_class={"cat": 2, "bird": 1}), ratio=None)
    assert both.targets[17:] == [1, 1, 0]
    numbers = torch.utils.data.TensorDataset(pixels(4), torch.tensor([0, 1, 2, 0]))
    mapped = RealAndSynthetic(numbers, SyntheticDataset(model, per_class=1), ratio=None, class_map=[2, 1, 0])
    assert mapped.targets[4:] == [2, 1, 0]
    with pytest.raises(DataError, match="2 entries"):
        RealAndSynthetic(numbers, SyntheticDataset(model, per_class=1), class_map=[0, 1])


def test_a_class_map_by_keys(model: GLEM, tail: ImageData) -> None:
    synthetic = SyntheticDataset(model, per_class=1)
    for class_map in ({0: 1, 2: 0, 1: 2}, {"bird": 0, "dog": 1, 1: 2}, [1, 2, 0], torch.tensor([1, 2, 0])):
        assert RealAndSynthetic(tail, synthetic, None, class_map).targets[19:] == [1, 2, 0]
    some = SyntheticDataset(model, per_class={"bird": 2})
    assert RealAndSynthetic(tail, some, None, {"bird": 0, "dog": None, "cat": -1}).targets[19:] == [0, 0]
    for class_map, message in (
        ({0: 1, 2: 0}, "class_map leaves out cat: give all 3 classes"),
        ({0: 1, 1: 2, 3: 0}, "class_map names class 3; the flow has 0 to 2"),
        ({"dog": 1, 1: 2, "cow": 0}, "class_map names 'cow'; the flow has dog, cat, bird"),
        ({"dog": 1, 0: 2, 1: 0, 2: 0}, "'dog' twice"),
        ([99] * 3, "class_map for 'dog' is 99; the real data has labels from 0 to 2"),
        ([0, 1, 3], "class_map for 'bird' is 3; the real data has labels from 0 to 2"),
        ({0: 0, 1: -2, 2: 0}, "class_map for 'cat' is -2"),
        ([None] * 3, "no class for the synthetic bird, cat, dog: give class_map a label"),
    ):
        with pytest.raises(DataError, match=message):
            RealAndSynthetic(tail, synthetic, None, class_map)
    for class_map, message in (([0, 1.5, 0], "'cat' must be a label"), ("abc", "got 'abc'"), (3, "got 3")):
        with pytest.raises(TypeError, match=message):
            RealAndSynthetic(tail, synthetic, None, class_map)


# ---- streams ------------------------------------------------------------------------------------------


def as_rows(items: Any) -> set[tuple[int, bytes]]:
    return {(label, image.tobytes()) for image, label in items}


def test_a_stream_gives_new_images_every_epoch_the_same_for_any_number_of_workers(model: GLEM) -> None:
    def epochs(workers: int, persistent: bool = False) -> list[set[tuple[int, bytes]]]:
        stream = SyntheticStream(model, length=50, block=8, seed=2)
        loader = DataLoader(
            stream, batch_size=None, num_workers=workers, persistent_workers=persistent, multiprocessing_context=None
        )
        return [as_rows(loader) for _ in range(3)]

    alone = epochs(0)
    assert [len(e) for e in alone] == [50] * 3 and len(set.union(*alone)) == 150
    assert epochs(2) == alone and epochs(2, persistent=True) == alone
    again = SyntheticStream(model, length=50, block=8, seed=2)
    again.set_epoch(2)
    assert again.epoch == 2 and as_rows(again) == alone[2] and len(again) == 50
    assert as_rows(SyntheticStream(model, length=20, block=8, seed=2)) <= alone[0]
    assert not as_rows(SyntheticStream(model, length=50, block=8, seed=3)) & alone[0]


def test_every_epoch_of_a_stream_has_classes_in_an_order_of_its_own(model: GLEM) -> None:
    stream = SyntheticStream(model, length=40, block=40)
    orders = [tuple(label for _, label in stream) for _ in range(3)]
    assert len(set(orders)) == 3
    stream.set_epoch(1)
    assert tuple(label for _, label in stream) == orders[1]


def test_a_long_epoch_of_small_blocks_does_not_run_into_the_next(model: GLEM) -> None:
    stream = SyntheticStream(model, block=1, weights=[1.0] + [0.0] * (model.num_classes - 1))
    late = as_rows(item for n in range(5) for item in stream._made(0, 2**20 + n, 1))
    assert not late & as_rows(item for n in range(5) for item in stream._made(1, n, 1))


@pytest.mark.parametrize("bad, error", [([1.0, None], TypeError), ("ab", TypeError), ([1.0, -1.0], ValueError)])
def test_weights_that_are_none_are_named(model: GLEM, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="weights"):
        SyntheticStream(model, weights=bad)
    halves = SyntheticStream(model, weights=torch.ones(model.num_classes)).probabilities
    assert halves.tolist() == SyntheticStream(model, weights=np.ones(model.num_classes)).probabilities.tolist()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_epochs_follow_one_another_whoever_iterates(model: GLEM, start: str) -> None:
    settings: dict[str, Any] = {"length": 40, "block": 8, "seed": 2}

    def loader(stream: SyntheticStream, workers: int, persistent: bool = False) -> DataLoader:
        context = start if workers else None
        return DataLoader(
            stream, None, num_workers=workers, multiprocessing_context=context, persistent_workers=persistent
        )

    def given(epoch: int) -> set[tuple[int, bytes]]:
        alone = SyntheticStream(model, **settings)
        alone.set_epoch(epoch)
        return as_rows(alone)

    stream = SyntheticStream(model, **settings)
    next(iter(stream))
    next(iter(loader(stream, 2)))  # a look is an epoch
    kept = loader(stream, 2, persistent=True)
    assert stream.epoch == 2 and as_rows(kept) == given(2)
    assert as_rows(kept) == given(3)  # workers that live on
    stream.set_epoch(1)
    assert as_rows(kept) == given(1) and stream.epoch == 2
    if start == "fork":  # the others take seconds to start
        for epoch, workers in ((2, 1), (3, 2), (4, 0), (5, 2)):
            torch.manual_seed(0)  # all loaders have one seed
            assert as_rows(loader(stream, workers)) == given(epoch)
        assert as_rows(kept) == given(6)
        pairs = list(zip(loader(stream, 2), loader(stream, 2), strict=True))  # two at the same time
        assert [as_rows(p[i] for p in pairs) for i in range(2)] in ([given(7), given(8)], [given(8), given(7)])


def test_a_worker_that_is_late_joins_the_others(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(worker: int, begun: int, seed: int = 5, rank: tuple[int, int] = (0, 1), workers: int = 2) -> int:
        info = SimpleNamespace(id=worker, num_workers=workers, seed=seed + worker)
        monkeypatch.setattr("glem_augment.synthetic.epochs.get_worker_info", lambda: info)
        epochs._begun = begun
        return epochs.begin(*rank)

    epochs = Epochs()
    assert [start(0, 0), start(0, 1), start(1, 0), start(1, 1)] == [0, 1, 0, 1]
    assert start(0, 2) == 2
    epochs.set(7)
    assert [start(1, 2), start(0, 3), start(1, 3)] == [2, 7, 7]
    assert [start(1, 3), start(0, 3)] == [8, 8]  # new workers under the same seed
    assert [start(0, 3, workers=3), start(2, 3, workers=3)] == [9, 9]
    # Ranks that share the memory, the first of them ahead; nobody repeats what was given before there were ranks.
    assert [start(0, 4, rank=(r, 2)) for r in (0, 0, 1)] == [10, 11, 10]
    assert start(0, 5) == 12
    half = start(0, 6)
    for i in range(1, STARTS):
        start(0, 0, seed=100 + i)
    assert start(1, 6) == half  # still known
    late = [start(0, 0, seed=9), *(start(0, 0, seed=5000 + i) for i in range(STARTS)), start(1, 0, seed=9)]
    assert len(set(late)) == len(late)  # no longer: a number of its own


def test_a_copy_counts_for_itself(model: GLEM) -> None:
    stream = SyntheticStream(model, length=16, block=8)
    list(stream)
    other = pickle.loads(pickle.dumps(stream))
    assert other.epoch == 1
    list(other)
    assert (other.epoch, stream.epoch) == (2, 1)


def test_weights_by_keys(model: GLEM) -> None:
    for weights in ({"dog": 0, "cat": 3, "bird": 1}, {2: 1, 1: 3, 0: 0}):
        assert SyntheticStream(model, weights=weights).probabilities.tolist() == [0, 0.75, 0.25]
    for weights, message in (
        ({"cat": 1}, "weights leaves out dog, bird"),
        ({0: 1, 1: 1, 9: 1}, "weights names class 9"),
        ({0: 0, 1: 0, 2: 0}, "not all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SyntheticStream(model, weights=weights)


def test_ranks_share_a_stream_out(model: GLEM) -> None:
    whole = as_rows(SyntheticStream(model, length=48, block=8))  # six blocks
    streams = [SyntheticStream(model, length=50, block=8, world=(r, 3)) for r in range(3)]
    parts = [as_rows(stream) for stream in streams]
    # equally many, or the rank with fewer would leave the others waiting at the end of the epoch
    assert [len(p) for p in parts] == [len(s) for s in streams] == [17] * 3
    union = set.union(*parts)
    assert len(union) == 51 and whole <= union
    for workers in (1, 3):
        loader = DataLoader(streams[1], batch_size=None, num_workers=workers)
        streams[1].set_epoch(0)
        assert as_rows(loader) == parts[1]


def test_a_copy_of_a_stream_counts_epochs_in_workers_too(model: GLEM) -> None:
    stream = copy.deepcopy(SyntheticStream(model, length=16, block=8))
    loader = DataLoader(stream, batch_size=None, num_workers=1)
    assert not as_rows(loader) & as_rows(loader)


def test_workers_that_are_started_anew_know_their_rank(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SyntheticStream(model, length=24, block=8)
    monkeypatch.setattr("glem_augment.synthetic.stream.rank", lambda: 1)
    monkeypatch.setattr("glem_augment.synthetic.stream._ranks", lambda: 2)
    sent = pickle.dumps(stream)
    monkeypatch.undo()
    there = pickle.loads(sent)
    assert there.world == (1, 2)
    assert as_rows(there) == as_rows(SyntheticStream(model, length=24, block=8, world=(1, 2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_reports_what_rejection_did(model: GLEM, workers: int) -> None:
    stream = SyntheticStream(model, length=32, block=8, min_confidence=0.999, max_attempts=3, temperature=2.0)
    list(DataLoader(stream, batch_size=None, num_workers=workers))
    report = stream.acceptance()
    assert report["total"]["items"] == 32 and 32 < report["total"]["candidates"] <= 96
    assert sum(c["candidates"] for c in report["classes"].values()) == report["total"]["candidates"]
    assert 0 <= report["total"]["failed"] <= 32 and 0 < report["total"]["confidence"] <= 1
    with pytest.raises(ValueError, match="min_confidence"):
        SyntheticStream(model, length=8).acceptance()
    p = torch.tensor([0.125, 0.25, 0.625])
    judged = SyntheticStream(
        model, length=32, block=8, min_confidence=0.5, max_attempts=2, oracle=lambda x: p.expand(len(x), 3)
    )
    list(DataLoader(judged, batch_size=None, num_workers=workers))
    for name, confidence in zip(NAMES, p.tolist(), strict=True):
        row, low = judged.acceptance()["classes"][name], confidence < 0.5
        assert row["items"] > 0 and row["confidence"] == pytest.approx(confidence)
        assert row["failed"] == low * row["items"] and row["candidates"] == (1 + low) * row["items"]


def test_weights_transforms_rejection_and_no_end(model: GLEM, tail: ImageData) -> None:
    stream = SyntheticStream(
        model, weights=[0, 3, 1], transform=np.asarray, target_transform=lambda y: y + 10, min_confidence=0.6
    )
    items = [item for item, _ in zip(stream, range(400), strict=False)]
    counts = np.bincount([y - 10 for _, y in items], minlength=3)
    assert counts[0] == 0 and abs(counts[1] / 400 - 0.75) < 0.08

    def confidence(items: list[Any]) -> float:
        x = torch.stack([torch.from_numpy(np.array(image)) for image, _ in items]).permute(0, 3, 1, 2)
        return float(model.posterior(x).gather(1, torch.tensor([y % 10 for _, y in items])[:, None]).mean())

    plain = [item for item, _ in zip(SyntheticStream(model, weights=[0, 3, 1]), range(400), strict=False)]
    assert confidence(items) > confidence(plain) + 0.05
    with pytest.raises(TypeError, match="no end"):
        len(stream)
    mixed = SyntheticStream(model, length=9, source="mixup", real=tail, modes=8)
    assert len(as_rows(mixed)) == 9
    for settings, message in (
        ({"weights": [1, 2]}, "3 numbers"),
        ({"weights": [0, 0, 0]}, "not all 0"),
        ({"length": 0}, "length must be"),
        ({"source": "mixup", "real": tail.subset(range(17)), "modes": 8}, "weight 0"),
        ({"oracle": Brightness()}, "such as 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SyntheticStream(model, **settings)


def test_copies_of_a_single_image_are_told(model: GLEM) -> None:
    tail = ImageData.from_tensors(pixels(6, seed=1), [0, 0, 0, 0, 1, 2], NAMES)
    with pytest.warns(UserWarning, match="one real image of cat, bird: all synthetic ones will be copies"):
        SyntheticDataset(model, per_class=3, source="mixup", real=tail, modes=8)
    with pytest.warns(UserWarning, match="one real image of bird:"):
        SyntheticStream(model, weights=[1, 0, 1], source="mixup", real=tail, modes=8)
    with pytest.raises(ValueError, match=r"no real image of bird: leave them out of per_class \(give a mapping\)"):
        SyntheticDataset(model, per_class=1, source="mixup", real=tail.subset(range(5)), modes=8)


def test_an_image_data_and_its_fill_can_be_batched(model: GLEM, tail: ImageData) -> None:
    for real in (tail, Subset(tail, range(0, 19, 2))):
        both = RealAndSynthetic(real, SyntheticDataset(model, per_class=4), ratio=None)
        batches = list(DataLoader(both, batch_size=5, shuffle=True))
        assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8) for x, _ in batches)
        assert sorted(torch.cat([y for _, y in batches]).tolist()) == sorted(both.targets)
        first = len(real)
        assert torch.equal(both[first][0], both.synthetic.images([int(both.chosen[0])])[0])


def test_timms_loader_takes_a_subset_and_leaves_its_data_set_alone(image_folder: Path) -> None:
    flow = GLEM.create("identity", (3, 8, 8), classes=sorted(p.name for p in image_folder.iterdir())).eval()
    whole = ImageDataset(str(image_folder))
    both = RealAndSynthetic(Subset(whole, range(4)), SyntheticDataset(flow, per_class=2), ratio=None)
    loader = create_loader(
        both, input_size=(3, 16, 16), batch_size=len(both), is_training=False, num_workers=0,
        persistent_workers=False, use_prefetcher=False, device=torch.device("cpu"),
    )  # fmt: skip
    ((x, y),) = list(loader)
    assert x.shape == (len(both), 3, 16, 16) and y.tolist() == both.targets and both.transform is not None
    assert whole.transform is None  # another subset of it may be the validation set
    whole.transform = len
    with pytest.raises(AttributeError, match="inside Subset has a transform already"):
        both.transform = repr
