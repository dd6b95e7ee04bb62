"""Private models, from latents to folders: what every branch spends, and what may reach a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from glem_augment import GLEM, SyntheticDataset
from glem_augment.classes.covariances import ClassCovariances
from glem_augment.codec.published import prior_file
from glem_augment.errors import DataError, ModelFileError
from glem_augment.images.dataset import ImageData, open_data
from glem_augment.privacy import Privacy, mechanism, sums
from glem_augment.privacy import latents as latents_of
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.expectation import expectation, kept
from glem_augment.privacy.fit import Plan, private_classes
from glem_augment.privacy.latents import check_images, latents_alone, public_codec, rows_are_independent
from glem_augment.privacy.record import promised

SIZE = (1, 16, 16)


def coordinates() -> ReleaseCoordinates:
    path = prior_file("taef2")
    assert path is not None
    return ReleaseCoordinates(path, (32, 2, 2), True)


def latents(per_class: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(classes).repeat_interleave(per_class)
    return torch.randn(len(y), 128, generator=g) + 2 * F.one_hot(y, 128), y


def images(per_class: int = 100, classes: int = 3) -> ImageData:
    """Smooth grey images, brighter from class to class."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(classes).repeat_interleave(per_class)
    x = F.interpolate(torch.rand(len(y), 1, 3, 3, generator=g), SIZE[1:], mode="bilinear")
    x = (60 * x + 90 * y[:, None, None, None]).round().to(torch.uint8)
    return ImageData.from_tensors(x, y, [f"class {k}" for k in range(classes)])


@pytest.fixture(scope="module")
def data() -> ImageData:
    return images()


@pytest.fixture(scope="module")
def model(data: ImageData) -> GLEM:
    return GLEM.fit(data, "taef2", privacy=Privacy(10))


BRANCHES = {
    20: ["counts", "middle", "sums", "squares"],
    200: ["scatter of classes"],
    1200: ["scatter", "scatter of classes"],
}


@pytest.mark.parametrize("per_class", list(BRANCHES))
@pytest.mark.parametrize("persons", [1, 2])
def test_the_noise_that_is_added_is_the_noise_that_is_recorded(
    per_class: int, persons: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard normal numbers are replaced by ones, so a release less the exact sum is the deviation of its noise."""
    spent: list[float] = []
    release = sums.PrivateSums.release

    def counted(self: Any) -> Tensor:
        truth = self._secret().clone().double()
        unit = {"counts": 1.0, "sums": self.clip / 2**20, "scatter": (self.clip / 2**20) ** 2}[self.statistic]
        sensitivity = {"counts": 1.0, "sums": self.clip, "scatter": self.clip**2}[self.statistic]
        noise = (release(self) - truth * unit) / sensitivity
        if self.statistic == "scatter":
            inside = torch.eye(self.dim, dtype=torch.bool).expand_as(noise)
            noise = torch.where(inside, noise, noise * math.sqrt(2))
        assert float((noise - noise.mean()).abs().max()) < 0.02 * float(noise.mean())  # the same, up to the grid
        spent.append(float(noise.mean()))
        return truth * unit

    monkeypatch.setattr(mechanism, "_gaussian", lambda count: torch.ones(count, dtype=torch.float64))
    monkeypatch.setattr(sums.PrivateSums, "release", counted)
    privacy = Privacy(10, images_per_person=persons)
    u, y = latents(per_class * persons)
    found = private_classes(u, y, 3, coordinates(), privacy)
    rounds = found.privacy["rounds"]
    assert [each["release"] for each in rounds] == [*BRANCHES[20], *(BRANCHES[per_class] if per_class > 20 else [])]
    assert spent == pytest.approx([each["noise"] for each in rounds], rel=0.01)
    assert persons * math.hypot(*(1 / sd for sd in spent)) == pytest.approx(privacy.mu, rel=0.01)
    assert promised(found.privacy) == privacy


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, float, Tensor]]]:
    """Append a list before each fit: it gets statistics, clips and exact sums. Later fits get the first releases."""
    exact: list[list[tuple[str, float, Tensor]]] = []
    released: list[Tensor] = []
    release = sums.PrivateSums.release

    def replay(self: Any) -> Tensor:
        exact[-1].append((self.statistic, self.clip, self._secret().clone()))
        if len(exact) == 1:
            released.append(release(self))
        return released[len(exact[-1]) - 1]

    monkeypatch.setattr(sums.PrivateSums, "release", replay)
    return exact


@pytest.mark.parametrize("per_class", list(BRANCHES))
def test_every_statistic_changes_by_at_most_its_sensitivity(per_class: int, fits: list[Any]) -> None:
    """Without one image, and with other images: the same releases give the same clips and the same model."""
    u, y = latents(per_class)
    u[7] *= 30  # far away, so it is clipped
    others, found = torch.arange(len(y)) != 7, []
    for rows, labels in ((u, y), (u[others], y[others]), (9 - 2 * u[3:], 0 * y[3:])):
        fits.append([])
        found.append(private_classes(rows, labels, 3, coordinates(), Privacy(10)))
    for (statistic, clip, one), (_, same, other), (_, again, _) in zip(*fits, strict=True):
        assert clip == same == again
        change = (one - other).double().norm() / {"counts": 1, "sums": 2**20, "scatter": 2**40}[statistic]
        assert 0 < float(change) <= 1 + 1e-12
    for each in found[1:]:
        a, b = found[0].classes.state_dict(), each.classes.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a) and each.privacy == found[0].privacy
        assert torch.equal(each.counts, found[0].counts) and each.lost == found[0].lost
        assert each.classes.temperature == found[0].classes.temperature


def test_a_folder_depends_on_the_images_through_releases_alone(data: ImageData, fits: list[Any]) -> None:
    digests = set()
    for rows in (range(300), range(1, 300, 2)):
        fits.append([])
        found = GLEM.fit(data.subset(rows), "taef2", privacy=Privacy(10))
        assert found.config.privacy is not None
        digests.add(found.config.privacy["sha256"])
    assert len(digests) == 1


def test_plans_spend_the_budget_where_it_pays() -> None:
    assert Plan.of(100, 10, 512) == (0, 0, 0, 0) and Plan.of(200, 10, 512).pooled == 0
    large = Plan.of(9000, 10, 512)
    assert 0 < large.pooled < large.classes < 0.6 and (large.leading, large.pooled_leading) == (192, 512)


def test_a_class_that_drowns_is_drawn_like_the_average_and_named(data: ImageData, tmp_path: Path) -> None:
    few = ImageData.from_tensors(data.tensor()[:202], data.targets[:202], data.classes)  # two of the last class
    with pytest.warns(UserWarning, match="mostly noise.*: class 2; merge"):
        found = GLEM.fit(few, "taef2", privacy=Privacy(3))
    assert found.config.privacy is not None and "class 2" in found.config.privacy["expect"]["mostly_noise"]
    x = found.sample(torch.tensor([2]), 1.0, torch.Generator().manual_seed(0), "rfcm")
    found.save(tmp_path)  # without directions of classes
    again = GLEM.from_pretrained(tmp_path)
    assert torch.equal(again.sample(torch.tensor([2]), 1.0, torch.Generator().manual_seed(0), "rfcm"), x)


def test_what_to_expect_is_known_beforehand() -> None:
    sizes = [kept(size) for size in (0.01, 0.25, 1, 5, 20, 100, 250, 10**6)]
    assert sizes == sorted(sizes) and 0 < sizes[0] < sizes[-1] <= 1
    shown = expectation(Privacy(1), 10, (3, 32, 32))
    assert "100 images of each class" in shown and "--images" in shown
    assert "with 300 photographs of each class" in expectation(Privacy(1, images=3000), 10, (3, 32, 32))
    for few in (Privacy(1, images=20), Privacy(1, images=3000, images_per_person=100)):
        with pytest.raises(ValueError, match="nothing was spent"):
            expectation(few, 10, (3, 32, 32))


def test_the_files_of_private_samples_say_the_promise_and_nothing_against_it(model: GLEM, tmp_path: Path) -> None:
    text = (SyntheticDataset(model, 2, seed=0).export(tmp_path) / "README.md").read_text()
    assert "differentially private" in text and "licence" in text
    assert not any(words in text for words in ("unknown", "not stated", "resemble", "license:"))


def test_samples_look_like_their_class_and_files_have_the_promise(model: GLEM, data: ImageData, tmp_path: Path) -> None:
    y = torch.arange(3).repeat_interleave(30)
    x = model.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm")
    wanted = torch.stack([data.tensor()[data.targets == k].float().mean() / 255 for k in range(3)])
    found = torch.stack([x[y == k].mean() for k in range(3)])
    assert float((found - wanted).abs().max()) < 0.25  # images so unlike photographs are clipped
    assert found.diff().min() > 0.1
    assert float((model.predict(data.tensor()) == torch.from_numpy(data.targets)).double().mean()) > 0.9
    assert isinstance(model.latent_classes.fitted, ClassCovariances)
    model.save(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())["privacy"]
    assert math.hypot(*(1 / each["noise"] for each in facts["rounds"])) == pytest.approx(Privacy(10).mu)
    again = GLEM.from_pretrained(tmp_path)
    assert torch.equal(again.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm"), x)
    assert not model.codec.mean.any() and bool((model.codec.std == 1).all())


def test_the_folder_holds_the_record_and_the_weights_alone(model: GLEM, tmp_path: Path) -> None:
    model.save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, tensors, data = config.read_text(), load_file(weights), weights.read_bytes()
    wide = {name: t.double() + 1e-12 if t.dtype == torch.float32 else t for name, t in tensors.items()}
    spoils: list[Callable[[], object]] = [
        lambda: config.write_text(text.replace('"bits"', '"bits": 7, "bits"', 1)),
        lambda: config.write_text(text + " "),
        lambda: config.write_text(text.replace('"kept"', '"image 7": 1,\n      "kept"')),
        lambda: config.write_text(json.dumps(json.loads(text) | {"training": {"note": "image 7 is there"}})),
        lambda: save_file(tensors, weights, metadata={"format": "pt", "note": "image 7 is there"}),
        lambda: save_file(wide, weights, metadata={"format": "pt"}),
        lambda: save_file(tensors | {"modes.scales": 2 * tensors["modes.scales"]}, weights, metadata={"format": "pt"}),
    ]
    for spoil in spoils:
        spoil()
        with pytest.raises(ModelFileError):
            GLEM.from_pretrained(tmp_path)
        config.write_text(text), weights.write_bytes(data)
    GLEM.from_pretrained(tmp_path)
    record = model.config.privacy
    assert record is not None
    for lie in ({"epsilon": 9.0}, {"rounds": []}):
        with pytest.raises(ModelFileError, match="privacy"):
            dataclasses.replace(model.config, privacy=record | lie)
    changed = copy.deepcopy(model)
    changed.latent_classes.temperature = 2.0
    for write in (changed.save, SyntheticDataset(changed, 2).export):
        with pytest.raises(ModelFileError):
            write(tmp_path / "other")


def test_a_latent_depends_on_its_image_alone(model: GLEM, data: ImageData) -> None:
    where = coordinates()

    def encode(x: Tensor) -> Tensor:
        return where(model.encode(x)[0])

    z, y = latents_alone(encode, data)
    fewer, _ = latents_alone(encode, data.subset(range(5, len(data) - 3)))
    assert torch.equal(z[5:-3], fewer) and torch.equal(y, torch.from_numpy(data.targets))
    back = where.to_public(z) + where.centre_in_public().float()
    torch.testing.assert_close(
        back, where.public(model.encode(data.tensor())[0].view(-1, 32, 2, 2))[0], atol=1e-3, rtol=0
    )
    fitted = copy.deepcopy(model.codec)
    fitted.mean.fill_(2), fitted.std.fill_(2)
    assert not public_codec(fitted).mean.any() and bool((public_codec(fitted).std == 1).all())


@pytest.mark.parametrize("of", [torch.amax, lambda x: torch.arange(len(x))[:, None] > 7])
def test_an_encoder_that_looks_at_other_images_or_places_gets_one_image_at_a_time(of: Any, data: ImageData) -> None:
    def encode(x: Tensor) -> Tensor:
        return x.double().flatten(1) + of(x.double().flatten(1))

    few = data.subset(range(20))
    z, _ = latents_alone(encode, few)
    assert torch.equal(z, torch.cat([encode(x[None]) for x in few.tensor()]))


def test_an_encoder_must_be_one_function_on_all_machines(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fixed function"):
        rows_are_independent(lambda x: torch.rand(len(x), 3), SIZE)
    monkeypatch.setattr(latents_of, "gather", lambda found: [found, found + 1])
    with pytest.raises(ValueError, match="machines"):
        rows_are_independent(lambda x: x.flatten(1), SIZE)


def test_facts_that_were_read_from_the_images_are_named(
    image_folder: Path, data: ImageData, recwarn: pytest.WarningsRecorder
) -> None:
    check_images(open_data(image_folder, image_size=8, channels=3), Privacy(10))
    assert not recwarn
    unnamed = open_data((data.tensor(), data.targets), image_size=16, channels=1)
    for images, words in (
        (open_data(image_folder), "the image_size and channels of .*--image-size.*--channels"),
        (unnamed, "the classes of .*classes="),
    ):
        with pytest.warns(UserWarning, match=words):
            check_images(images, Privacy(10))


def test_more_images_than_delta_is_for_are_told() -> None:
    many = images(400)
    tiny = ImageData.from_tensors(many.tensor()[..., ::2, ::2], many.targets, many.classes)
    with pytest.warns(UserWarning, match="about 1... images, and delta=0.001 is above one over them"):
        GLEM.fit(tiny, "taef2", privacy=Privacy(10, 1e-3, images=1000))


def test_what_is_refused(model: GLEM, data: ImageData) -> None:
    for change in (lambda: model.fit_modes(data), lambda: SyntheticDataset(model, "balance", real=data)):
        with pytest.raises(ValueError, match="privac"):
            change()
    with pytest.raises(ValueError, match="takes no seed: "):
        GLEM.fit(data, "taef2", privacy=Privacy(10), seed=1)
    with pytest.raises(ValueError, match="too few for epsilon=1 .* nothing was spent"):
        GLEM.fit(images(2), "taef2", privacy=Privacy(1, images=6))
    with pytest.raises(TypeError, match="must be Privacy"):
        GLEM.fit(data, "taef2", privacy=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="autoencoder='taef2'"):
        GLEM.fit(data, privacy=Privacy(10))
    with pytest.raises(DataError, match="several times"):
        check_images(data.subset([*range(len(data)), 0]), Privacy(10))
    assert model.adapt(images(20)).config.privacy is None  # no promise covers these images
