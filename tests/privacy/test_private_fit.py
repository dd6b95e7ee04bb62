"""Private models, from latents to folders: what every branch spends, and what may reach a model."""

from __future__ import annotations

import copy
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
from glem_augment.images.dataset import ImageData
from glem_augment.privacy import Privacy, mechanism, sums
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.expectation import expectation, kept
from glem_augment.privacy.fit import Plan, private_classes
from glem_augment.privacy.latents import check_images, latents_alone
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


@pytest.mark.parametrize("per_class", list(BRANCHES))
def test_every_statistic_changes_by_at_most_its_sensitivity(per_class: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without one image, releases being the same: nothing else of the image reaches the released state."""
    replayed: list[Tensor] = []
    exact: list[list[Any]] = [[], []]
    release = sums.PrivateSums.release

    def replay(self: Any) -> Tensor:
        statistic = self._secret().clone()
        exact[bool(replayed)].append((self.statistic, self.clip, statistic))
        if len(exact[1]):
            return replayed[len(exact[1]) - 1]
        kept.append(release(self))
        return kept[-1]

    kept: list[Tensor] = []
    monkeypatch.setattr(sums.PrivateSums, "release", replay)
    u, y = latents(per_class)
    u[7] *= 30  # far away, so it is clipped
    first = private_classes(u, y, 3, coordinates(), Privacy(10))
    replayed = kept
    others = torch.arange(len(y)) != 7
    second = private_classes(u[others], y[others], 3, coordinates(), Privacy(10))
    for (statistic, clip, one), (_, same, other) in zip(*exact, strict=True):
        assert clip == same
        change = (one - other).double().norm() / {"counts": 1, "sums": 2**20, "scatter": 2**40}[statistic]
        assert 0 < float(change) <= 1 + 1e-12
    a, b = first.classes.state_dict(), second.classes.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a) and first.privacy == second.privacy


def test_a_canary_stays_within_the_promise() -> None:
    """The best score of 300 sums with and without a far image: the distance in deviations is about mu."""
    privacy, u = Privacy(10), torch.zeros(5, 8)
    canary = torch.zeros(1, 8)
    canary[0, 0] = 1e6
    scores = []
    for rows in (u, torch.cat([u, canary])):
        drawn = []
        for _ in range(300):
            found = sums.PrivateSums("sums", 1, 8, 3.0, privacy, 1.0)
            found.add(rows, torch.zeros(len(rows)).long())
            drawn.append(float(found.release()[0, 0]))
        scores.append(torch.tensor(drawn))
    distance = float((scores[1].mean() - scores[0].mean()) / torch.cat([s - s.mean() for s in scores]).std())
    assert 0.8 * privacy.mu < distance < 1.2 * privacy.mu  # 1.2: a mechanism with half the noise has 2


def test_plans_spend_the_budget_where_it_pays() -> None:
    assert Plan.of(100, 10, 512) == (0, 0, 0, 0) and Plan.of(200, 10, 512).pooled == 0
    large = Plan.of(9000, 10, 512)
    assert 0 < large.pooled < large.classes < 0.6 and (large.leading, large.pooled_leading) == (192, 512)


def test_a_class_that_drowns_is_drawn_like_the_average_and_named(data: ImageData, tmp_path: Path) -> None:
    few = ImageData.from_tensors(data.tensor()[:202], data.targets[:202], data.classes)  # two of the last class
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
    changed = copy.deepcopy(model)
    changed.latent_classes.temperature = 2.0
    with pytest.raises(ModelFileError):
        changed.save(tmp_path / "other")


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


def test_what_is_refused(model: GLEM, data: ImageData) -> None:
    for change in (lambda: model.fit_modes(data), lambda: SyntheticDataset(model, "balance", real=data)):
        with pytest.raises(ValueError, match="privac"):
            change()
    with pytest.raises(ValueError, match="takes no seed: "):
        GLEM.fit(data, "taef2", privacy=Privacy(10), seed=1)
    with pytest.raises(TypeError, match="must be Privacy"):
        GLEM.fit(data, "taef2", privacy=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="autoencoder='taef2'"):
        GLEM.fit(data, privacy=Privacy(10))
    with pytest.raises(DataError, match="several times"):
        check_images(data.subset([*range(len(data)), 0]))
    assert model.adapt(images(20)).config.privacy is None  # no promise covers these images
