"""Synthetic sets for a purpose: counts per class, balance, real latents mixed, rejection, mixing with real, streams."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import ImageDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchvision.datasets import ImageFolder

from glem_augment import GLEM, DataError, ImageData, SyntheticDataset
from glem_augment.balance import class_counts, flow_targets
from glem_augment.mixing import RealAndSynthetic
from glem_augment.stream import SyntheticStream

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
    json.dumps(data.per_class)
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
    other = tail.with_targets(tail.targets, ["cow", "cat", "dog"])
    with pytest.raises(DataError, match="no counterpart"):
        class_counts(model, "balance", other)


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
        assert (moved - shares[best] * targets[best]).norm() < 1e-4 and 0 <= shares[best] <= 0.5 + 1e-5
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
    monkeypatch.setattr("glem_augment.stream.rank", lambda: 1)
    monkeypatch.setattr("glem_augment.stream._ranks", lambda: 2)
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
