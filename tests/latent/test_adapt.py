"""Adapting: closed forms against numpy, real images of other classes, honest psi, files, and the command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glem_augment import GLEM, GLEMAugment, SyntheticDataset, open_data
from glem_augment.cli.main import main
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.hub.cards import CardFacts, data_name, model_card
from glem_augment.latent.adapt import gaussians_of, psi_that_holds
from glem_augment.synthetic.publish import write_dataset

TINY = dict(depth=[1, 1], blocks=[1, 1], width=[6, 6])


def random_flow(shape=(1, 8, 8), classes=("a", "b"), **options) -> GLEM:
    """A flow with every weight away from its start."""
    model = GLEM.create("mef_tiny", shape, list(classes), **{**TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval().requires_grad_(False)


def images(counts: tuple[int, ...], shape=(1, 8, 8)) -> tuple[Tensor, Tensor]:
    """Noise around a brightness of the class, shuffled."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randint(0, 120, (len(y), *shape)) + 40 * y[:, None, None, None]
    order = torch.randperm(len(y))
    return x[order].to(torch.uint8), y[order]


def latents(model: GLEM, x: Tensor, y: Tensor, index: int, seed: int = 0) -> np.ndarray:
    """As the docstring of ``class_latents`` says: noise from the seed and the class."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return model.encode(x[y == index], generator)[0].double().numpy()


def test_means_and_shrunk_variances_are_the_closed_form() -> None:
    model, counts, k = random_flow(), (12, 3, 1, 40), 5.0
    x, y = images(counts)
    adapted = model.adapt((x, y), shrinkage=k, rank=4, progress=False)
    z = [latents(model, x, y, index) for index in range(4)]
    squares = [((c - c.mean(0)) ** 2).sum(0) for c in z]
    pooled = sum(squares) / sum(len(c) - 1 for c in z)
    mean = np.stack([c.mean(0) for c in z])
    variance = np.stack([(s + k * pooled) / (len(c) - 1 + k) for s, c in zip(squares, z, strict=True)])
    np.testing.assert_allclose(adapted.gaussians.mu.numpy(), mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(adapted.gaussians.variance().numpy(), variance, rtol=2e-5)
    np.testing.assert_allclose(variance[2], pooled)
    # Modes: those of numpy's covariance, up to sign.
    values = np.linalg.eigvalsh(np.cov(z[3].T))[::-1][:4]
    np.testing.assert_allclose(adapted.modes.scales[3].numpy() ** 2, values, rtol=1e-4)
    assert adapted.modes.counts.tolist() == list(counts)


def test_shrinkage_goes_from_own_to_pooled() -> None:
    model = random_flow()
    x, y = images((30, 4))
    own = latents(model, x, y, 1).var(0, ddof=1)
    none, much = (model.adapt((x, y), shrinkage=k, rank=2, progress=False).gaussians.variance() for k in (0.0, 1e9))
    np.testing.assert_allclose(none[1].numpy(), own, rtol=1e-4)
    torch.testing.assert_close(much[0], much[1], rtol=1e-5, atol=0)
    # Without shrinkage a class of one image still has what all classes have.
    single = model.adapt(images((30, 1)), shrinkage=0.0, rank=2, progress=False).gaussians.variance()
    torch.testing.assert_close(single[0], single[1], rtol=1e-5, atol=0)


def test_a_class_of_one_image_borrows_the_shared_modes() -> None:
    model = random_flow()
    x, y = images((1, 9, 2))
    modes = model.adapt((x, y), rank=3, progress=False).modes
    np.testing.assert_allclose(modes.mean[0].numpy(), latents(model, x, y, 0)[0], atol=1e-6)
    torch.testing.assert_close(modes.directions[0], modes.shared_directions)
    torch.testing.assert_close(modes.scales[0], modes.shared_scales)
    assert modes.scales[2].gt(0).tolist() == [True, False, False]
    # Modes and rest together have the pooled variance of every dimension.
    z = [latents(model, x, y, index) for index in (1, 2)]
    pooled = sum(((c - c.mean(0)) ** 2).sum(0) for c in z) / 9
    total = (modes.scales[0][:, None] * modes.directions[0]).square().sum(0) + modes.rest[0]
    np.testing.assert_allclose(total.numpy(), pooled, rtol=1e-3, atol=1e-7)
    aug = GLEMAugment(model.adapt((x, y), rank=3, progress=False), p=1.0, policy="noise", modes=3, seed=0)
    changed = aug(x, y)[0]
    assert (changed != x).flatten(1).any(1).all()


def test_given_names_leave_the_ids_of_the_data() -> None:
    model, (x, y) = random_flow(), images((5, 5))
    data = ImageData.from_tensors(x, y, ["n01", "n02"], name="photos")
    named = model.adapt(data, classes=["fish", "dog"], rank=2, progress=False)
    assert (named.class_ids, named.classes) == (["n01", "n02"], ["fish", "dog"])
    fewer = model.adapt((x, y), classes=["fish", "dog", "cat"][:2], rank=2, progress=False)
    assert fewer.classes == ["fish", "dog"]


def test_cards_of_adapted_flows_name_all_data(tmp_path: Path) -> None:
    model, (x, y) = random_flow(), images((5, 5))
    model.config.training.update(data="private/someone/large", config={"epochs": 7})
    once = model.adapt(ImageData.from_tensors(x, y, ["a", "b"], name="photos"), rank=2, progress=False)
    twice = once.adapt(ImageData.from_tensors(x, y, ["a", "b"], name="torch/cifar10@private/someone"), progress=False)
    card = str(model_card(twice, "org/flow", CardFacts(), samples=False))
    assert "trained on large, then adapted to photos, then adapted to cifar10" in card and "epochs 7" in card
    assert "someone" not in card
    data = SyntheticDataset(once, per_class=2)
    write_dataset(data, tmp_path / "made", "org/made", CardFacts(), "imagefolder", progress=False)
    assert "| large, then adapted to photos |" in (tmp_path / "made" / "README.md").read_text()
    for spec, name in (
        ("private/me@there.example/flowers", "flowers"),
        ("wds/@sets/shards", "shards"),
        ("hfds/ylecun/mnist?input_key=img", "mnist"),
        ("sets/a@2x.tar", "a@2x.tar"),
        ("bundled:fashion-mnist", "fashion-mnist"),
        ("", "unknown data"),
    ):
        assert data_name(spec) == name


def test_the_flow_and_the_model_adapted_from_stay_as_they_are() -> None:
    model = random_flow()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = model.adapt(images((5, 5, 5)), classes=["x", "y", "z"], rank=2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.classes, adapted.classes) == (["a", "b"], ["x", "y", "z"])
    for (name, old), new in zip(model.flow.state_dict().items(), adapted.flow.state_dict().values(), strict=True):
        assert torch.equal(old, new) and (old.data_ptr() != new.data_ptr() or not old.numel()), name


@pytest.mark.parametrize("psi", [(0.5, 0.2, 0.05), None])
def test_psi_is_kept_where_it_holds_the_variances_and_widened_where_it_does_not(psi) -> None:
    inside = torch.linspace(0.06, 0.5, 12, dtype=torch.float64).reshape(2, 6)
    assert psi_that_holds(inside, psi) == psi
    for outside in (inside * 0.01, inside * 100, torch.tensor([[1e-8, 1e4]], dtype=torch.float64)):
        wide = psi_that_holds(outside, psi)
        if psi is None and float(outside.min()) > 0.03:
            assert wide is None  # plain variances have no upper bound
        else:
            assert wide != psi
        gaussians = gaussians_of(torch.zeros_like(outside), outside, wide)
        torch.testing.assert_close(gaussians.variance().double(), outside, rtol=1e-5, atol=0)
    with pytest.raises(DataError, match="off the scale"):
        psi_that_holds(inside * 1e7, psi)


def test_the_file_holds_the_new_classes_and_where_they_came_from(tmp_path: Path) -> None:
    model = random_flow()
    model.config.training = {"data": "somewhere"}
    model.save(tmp_path / "base")
    base = GLEM.from_pretrained(tmp_path / "base")
    x, y = images((6, 7, 8))
    adapted = base.adapt((x, y), classes=["x", "y", "z"], rank=3, progress=False)
    adapted.save(tmp_path / "new")
    loaded = GLEM.from_pretrained(tmp_path / "new")
    assert loaded.classes == ["x", "y", "z"] and loaded.modes.rank == 3
    assert torch.equal(loaded.log_prob_per_class(x), adapted.log_prob_per_class(x))
    torch.testing.assert_close(loaded.gaussians.variance(), adapted.gaussians.variance(), rtol=0, atol=0)
    record = loaded.config.training
    digest = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert record["adapted_from"]["weights_sha256"] == digest
    assert record["adapted_from"]["training"] == {"data": "somewhere"}
    assert (record["images"], record["images_per_class"]) == (21, [6, 8])


def test_bad_input_is_one_clear_error_before_any_work(tmp_path: Path, image_folder: Path) -> None:
    model = random_flow()
    x, y = images((3, 3))
    with pytest.raises(DataError, match=r"1 of its 3 classes \('c'\)"):
        model.adapt((x, y), classes=["a", "b", "c"])
    with pytest.raises(DataError, match="at least one class needs two"):
        model.adapt((x[:2], torch.tensor([0, 1])))
    with pytest.raises(DataError, match="3 x 8 x 8 .*the flow takes 1 x 8 x 8.*channels=1"):
        model.adapt(open_data(image_folder, progress=False))
    with pytest.raises(DataError, match=r"grey images of 9x9.*image_size=\(8, 8\)"):
        model.adapt((torch.zeros(4, 1, 9, 9, dtype=torch.uint8), y[:4]))
    for bad in ({"shrinkage": -1.0}, {"rank": 0}, {"max_per_class": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.adapt((x, y), **bad)
    with pytest.raises(TypeError, match="ImageData"):
        model.adapt(x)
    # A folder by name is resized and converted.
    assert model.adapt(image_folder, rank=2, progress=False).classes == ["bird", "cat", "dog"]


def test_max_per_class_takes_the_first_ones() -> None:
    model = random_flow()
    x, y = images((9, 9))
    few = model.adapt((x, y), max_per_class=4, rank=2, progress=False)
    rows = torch.cat([(y == index).nonzero()[:4, 0] for index in (0, 1)])
    torch.testing.assert_close(few.gaussians.mu, model.adapt((x[rows], y[rows]), rank=2, progress=False).gaussians.mu)


# ---- real images -----------------------------------------------------------------------------------------------------


def accuracy(model: GLEM, data: ImageData) -> float:
    return float((model.predict(data.tensor()) == torch.from_numpy(data.targets)).float().mean())


def some_classes(data: ImageData, kept: list[int]) -> ImageData:
    """Those classes, numbered in the order of ``kept``, under new names."""
    rows = np.concatenate([np.flatnonzero(data.targets == c)[:60] for c in kept])
    targets = np.array([kept.index(int(t)) for t in data.targets[rows]])
    return data.subset(rows).with_targets(targets, [f"kind {c}" for c in kept])


def test_the_bundled_flow_serves_some_classes_in_another_order(bundled_train, bundled_test) -> None:
    kept = [9, 0, 3, 8]
    train, test = some_classes(bundled_train, kept), some_classes(bundled_test, kept)
    model = GLEM.from_pretrained("bundled:fashion-mnist")
    adapted = model.adapt(train, rank=16, progress=False)
    assert adapted.classes == ["kind 9", "kind 0", "kind 3", "kind 8"]
    assert accuracy(adapted, test) > 0.9
    # Ten images of a class in place of 6,000 that trained the flow are enough for most.
    few = model.adapt(train, rank=8, max_per_class=10, progress=False)
    assert accuracy(few, test) > 0.8
    synthetic = SyntheticDataset(adapted, per_class=8, temperature=0.7, source="rfcm")
    x = synthetic.images(range(len(synthetic)))
    assert float((adapted.predict(x) == torch.tensor(synthetic.targets)).float().mean()) > 0.8


@pytest.mark.parametrize("preset", ["identity", "mef_tiny"])
def test_photographs_through_a_flow_that_learned_nothing(glem_data: Path, preset: str) -> None:
    """Chance is 10 %; a Gaussian per class on pixels, or on a random flow's latents, knows a little more."""
    train = open_data(glem_data / "cifar10", "train", image_size=16, progress=False)
    test = open_data(glem_data / "cifar10", "test", image_size=16, progress=False)
    rows = np.concatenate([np.flatnonzero(train.targets == index)[:50] for index in range(10)])
    if preset == "identity":
        model = GLEM.create("identity", (3, 16, 16), ["anything"]).eval()
    else:
        model = random_flow((3, 16, 16))
    adapted = model.adapt(train.subset(rows), rank=16, progress=False)
    assert accuracy(adapted, test) > 0.17


def test_the_bundled_flow_on_grey_photographs(glem_data: Path) -> None:
    train, test = (
        open_data(glem_data / "imagenette128", split, image_size=28, channels=1, progress=False)
        for split in ("train", "val")
    )
    adapted = GLEM.from_pretrained("bundled:fashion-mnist").adapt(train, rank=8, progress=False)
    assert adapted.num_classes == 10 and accuracy(adapted, test) > 0.15


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Larger coloured images, one class of one image; then the adapted model is used like any other."""
    rng = np.random.default_rng(0)
    for index, (name, count) in enumerate({"day": 6, "night": 5, "once": 1}.items()):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (12, 14, 3)) + (180, 0, 90)[index]
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    random_flow().save(tmp_path / "base")
    command = ["adapt", str(tmp_path / "base"), str(tmp_path / "photos"), "--out", str(tmp_path / "new"), "--rank", "3"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["classes"] == ["day", "night", "once"] and summary["images"] == 12
    assert summary["images_per_class"] == [1, 6] and summary["psi_is_the_flows"] is False
    assert summary["modes_per_class"] == [3, 3]
    assert main(["eval", str(tmp_path / "new"), str(tmp_path / "photos"), "--round-trip", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    assert main(["info", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "day, night, once" in shown and "3 per class" in shown
    # A model that is there is not written over by accident.
    assert main(command) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--max-per-class", "2"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["images"] == 5 and again["modes_per_class"] == [1, 2]  # of two images one, of one image all classes'
    assert main(["info", str(tmp_path / "new")]) == 0
    assert "1 to 2 per class" in capsys.readouterr().out


def test_numbers_of_numpy_and_classes_that_are_numbers(tmp_path: Path) -> None:
    model, (x, y) = random_flow(), images((6, 5))
    adapted = model.adapt(
        (x, y), classes=range(2), rank=np.int64(2), max_per_class=np.int64(4), seed=np.int64(3), progress=False
    )  # type: ignore[arg-type]
    adapted.save(tmp_path)
    assert GLEM.from_pretrained(tmp_path).classes == ["0", "1"]
    model.adapt((x, y), seed=2 * 10**13, progress=False)
    for bad in (dict(max_per_class=2.5), dict(rank=0), dict(max_per_class=1)):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            model.adapt((x, y), progress=False, **bad)
