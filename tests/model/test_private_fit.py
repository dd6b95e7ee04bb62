"""Private models, from images to folders: the promise in the files, and what may not enter a model."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from glem_augment import GLEM, SyntheticDataset, open_data
from glem_augment.classes import private as private_module
from glem_augment.classes.privacy import Privacy, epsilon_of
from glem_augment.classes.private import nearest
from glem_augment.cli import main
from glem_augment.codec.codec import Codec
from glem_augment.errors import DataError, ModelFileError
from glem_augment.images.dataset import ImageData
from glem_augment.model.private_fit import check_images, latents_alone, rows_are_independent, set_coordinates

SIZE = (1, 16, 16)


def images(per_class: int = 150, classes: int = 3, seed: int = 0) -> ImageData:
    """Smooth grey images, brighter from class to class."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(per_class)
    x = F.interpolate(torch.rand(len(y), 1, 3, 3, generator=g), SIZE[1:], mode="bilinear")
    x = (60 * x + 90 * y[:, None, None, None]).round().to(torch.uint8)
    return ImageData.from_tensors(x, y, [f"class {k}" for k in range(classes)])


@pytest.fixture(scope="module")
def data() -> ImageData:
    return images()


@pytest.fixture(scope="module")
def model(data: ImageData) -> GLEM:
    random.seed(0)  # the noise's
    return GLEM.fit(data, "taef2", privacy=Privacy(10))


def test_samples_look_like_their_class_and_the_files_have_the_promise(
    model: GLEM, data: ImageData, tmp_path: Path
) -> None:
    y = torch.arange(3).repeat_interleave(40)
    x = model.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm")
    assert x.shape == (120, *SIZE)
    wanted = torch.stack([data.tensor()[data.targets == k].float().mean() / 255 for k in range(3)])
    found = torch.stack([x[y == k].mean() for k in range(3)])
    assert float((found - wanted).abs().max()) < 0.1
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    facts = config["privacy"]
    assert (facts["epsilon"], facts["delta"], facts["unit"]) == (10, 1e-6, "one image")
    spent = math.hypot(*(1 / each["noise"] for each in facts["rounds"]))  # the histogram's, too
    assert epsilon_of(spent, facts["delta"]) == pytest.approx(10, rel=1e-6)
    assert config["training"] == {"data": "private images"} and config.get("posterior_temperature", 1) == 1
    again = GLEM.from_pretrained(tmp_path)
    assert torch.equal(again.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm"), x)
    assert torch.equal(again.log_prob(data.tensor()), model.log_prob(data.tensor()))


def test_nothing_but_the_releases_depends_on_the_images(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the releases of other images, the folder is the same, byte for byte."""
    kept: list[object] = []

    def replayed(release: Callable[..., object]) -> Callable[..., object]:
        def give(*args: object) -> object:
            if tmp_path.joinpath("a").exists():
                return kept.pop(0)
            kept.append(release(*args))
            return kept[-1]

        return give

    monkeypatch.setattr(private_module.PrivateSums, "release", replayed(private_module.PrivateSums.release))
    shifted = ImageData.from_tensors(255 - data.tensor()[:-20], data.targets[:-20], data.classes)
    for name, images in (("a", data), ("b", shifted)):
        GLEM.fit(images, "taef2", privacy=Privacy(10)).save(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_parts_of_a_class_share_its_covariance(data: ImageData, tmp_path: Path) -> None:
    model = GLEM.fit(data, "taef2", privacy=Privacy(50), parts=2)
    assert model.modes is not None and model.modes.tied and model.modes.parts == 2
    y = torch.zeros(30, dtype=torch.int64)
    assert model.sample(y, 1.0, torch.Generator().manual_seed(0), "rfcm").isfinite().all()
    model.save(tmp_path)
    again = GLEM.from_pretrained(tmp_path)
    z = torch.randn(4, model.dim)
    assert torch.equal(again.latent_classes.log_prob(z), model.latent_classes.log_prob(z))
    assert again.config == model.config


def test_many_dimensions_have_second_moments_of_the_leading_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a grid of 8 by 8 latents, in small."""
    monkeypatch.setattr(private_module, "LEADING", 48)
    monkeypatch.setattr("glem_augment.classes.statistics.WHOLE_DIM", 64)
    model = GLEM.fit(images(), "taef2", privacy=Privacy(20))
    assert model.modes is not None and (model.dim, model.modes.rank) == (128, 48)
    assert not model.latent_classes.full and bool((model.modes.rest[:, 48:] > 0).all())
    assert model.sample(torch.arange(3), 1.0, source="rfcm").isfinite().all()


def test_classes_too_many_for_whole_covariances_lose_no_budget(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glem_augment.classes.statistics._MOST_WHOLE", 100)
    GLEM.fit(data, "taef2", privacy=Privacy(10)).save(tmp_path)
    found = GLEM.from_pretrained(tmp_path)
    assert found.config.covariance == "diagonal" and found.sample(torch.arange(3), source="rfcm").isfinite().all()


def test_a_latent_depends_on_its_image_alone(model: GLEM, data: ImageData) -> None:
    assert rows_are_independent(model)
    z, y = latents_alone(model, data)
    fewer, _ = latents_alone(model, data.subset(range(5, len(data) - 3)))
    assert torch.equal(z[5:-3], fewer) and torch.equal(y, torch.from_numpy(data.targets))


def test_coordinates_come_from_public_images(data: ImageData) -> None:
    public = (torch.rand(40, *SIZE) * 255).to(torch.uint8)
    model = GLEM.create("stationary", SIZE, data.classes)
    with pytest.raises(ValueError, match="public"):
        set_coordinates(model, None)
    fitted = GLEM.fit(data, privacy=Privacy(10), public=public)  # of the pixels
    assert fitted.config.privacy is not None and fitted.config.privacy["coordinates"] == "public images"
    assert fitted.dim == 256


def test_what_a_private_model_refuses(model: GLEM, data: ImageData) -> None:
    from glem_augment.evaluation import calibrate

    with pytest.raises(ValueError, match="privacy"):
        model.fit_modes(data)
    with pytest.raises(ValueError, match="privacy"):
        calibrate(model, data)
    with pytest.raises(ValueError, match="privac"):
        SyntheticDataset(model, 3, source="mixup", real=data)
    with pytest.raises(ValueError, match="privac"):
        SyntheticDataset(model, "balance", real=data)
    with pytest.raises(ValueError, match="real= would break the model's privacy"):
        SyntheticDataset(model, 3, real=data)  # the order of its classes would be the order of the labels
    assert model.adapt(images(20)).config.privacy is None  # no promise covers these images


def test_samples_of_a_private_model_are_drawn_at_temperature_1(model: GLEM) -> None:
    assert SyntheticDataset(model, 1).temperature == 1.0 and SyntheticDataset(model, 1, 0.5).temperature == 0.5
    assert SyntheticDataset("bundled:fashion-mnist", 1).temperature == 0.9


def test_too_few_images_and_wrong_arguments_are_one_clear_error(data: ImageData) -> None:
    with pytest.raises(DataError, match="spent epsilon="):
        GLEM.fit(images(per_class=10), "taef2", privacy=Privacy(0.5))
    for unused in (dict(rank=8), dict(seed=1)):
        with pytest.raises(ValueError, match=f"a private model takes no {min(unused)}: "):
            GLEM.fit(data, "taef2", privacy=Privacy(10), **unused)
    with pytest.raises(TypeError, match="must be Privacy"):
        GLEM.fit(data, "taef2", privacy=10)
    few = ImageData.from_tensors(data.tensor()[:302], data.targets[:302], data.classes)  # two of the last class
    found = GLEM.fit(few, "taef2", privacy=Privacy(10))
    assert found.config.privacy is not None and found.config.privacy["expect"]["drowned"] == ["class 2"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "private"
    data = images(60)
    write_folder(data, folder)
    size = str(data.image_shape[1])
    argv = ["fit", str(folder), "--autoencoder", "taef2", "--epsilon", "40"]
    argv += ["--delta", "1e-3", "--images", "1000"]
    assert main([*argv, "--out", str(tmp_path / "unstated")]) == 0
    told = "glem: everybody will know the image_size and channels of the private model"  # a line, as errors are
    assert any(line.startswith(told) for line in capsys.readouterr().err.splitlines())
    argv += ["--image-size", size, "--channels", "1"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.json").touch()
    assert main([*argv, "--out", str(tmp_path / "full")]) == 2
    assert "holds report.json" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".config.json.1-0123abcd.tmp").touch()  # of a run that was killed in the middle of a write
    assert main([*argv, "--out", str(tmp_path / "model")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["privacy"]["epsilon"] == 40 and "differentially private" in err
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert main([*argv, "--out", str(tmp_path / "model")]) == 2
    assert "config.json" in capsys.readouterr().err
    shown = ["preview", str(tmp_path / "model"), str(folder), "--out", str(tmp_path / "model" / "look.png")]
    assert main(shown) == 2 and "in a folder that is shared" in capsys.readouterr().err
    assert main(["fit", str(folder), "--images-per-person", "3", "--out", str(tmp_path / "x")]) == 2
    assert "give --epsilon, too" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "model"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["privacy"]["unit"] == "one image"
    assert "model: This model, and every image drawn from it, is (40, 0.001)-differentially private" in err
    assert main(["info", *2 * [str(tmp_path / "model")], "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["together"]["epsilon"] == pytest.approx(40, rel=1e-3) and "counts once" in err
    assert main(["info", str(tmp_path / "model"), str(tmp_path / "unstated"), "--json"]) == 0
    together = json.loads(capsys.readouterr().out)["together"]
    assert together["epsilon"] == pytest.approx(epsilon_of(Privacy(40, 1e-3, images=1000).mu * 2**0.5, 1e-3), rel=1e-3)


def test_what_one_image_could_change_is_refused_or_told(model: GLEM, data: ImageData, tmp_path: Path) -> None:
    promise = dict(privacy=Privacy(10))
    with pytest.raises(DataError, match="several times"):
        GLEM.fit(data.subset([*range(len(data)), 0]), "taef2", **promise)
    with pytest.raises(DataError, match="among the public images"):
        GLEM.fit(data, "taef2", public=images(), **promise)  # the same images
    write_folder(data, tmp_path / "good")
    with pytest.warns(UserWarning, match="will know the classes of the private model"):
        GLEM.fit((data.tensor(), data.targets), "taef2", **promise)  # another label would be another class
    rows = TensorDataset(data.tensor(), torch.from_numpy(data.targets))
    folder = ImageFolder(tmp_path / "good")
    folder.samples += folder.samples[:1]
    folder.targets += folder.targets[:1]
    twice = Subset(rows, [0, 0, 1])
    shutil.copytree(tmp_path / "good", tmp_path / "links")
    first = min((tmp_path / "links" / "class 0").iterdir())
    first.with_name("y.png").symlink_to(first)
    shutil.copytree(tmp_path / "good", tmp_path / "hard")
    last = max((tmp_path / "hard" / "class 1").iterdir())
    last.with_name("z.png").hardlink_to(last)
    links = tmp_path / "links"
    for repeated, named in (
        (twice, "image 0 of"),
        (Subset(twice, [0, 1]), "image 0 of"),
        (Subset(data.subset([0, 0, 1]), [0, 1, 2]), "image 0 of"),
        (folder, str(folder.samples[0][0])),
        (links, f"{first} and {first.with_name('y.png')}"),
        (tmp_path / "hard", f"{last} and {last.with_name('z.png')}"),
    ):
        with pytest.raises(DataError, match=re.escape(named)):
            check_images(open_data(repeated, image_size=16, channels=1), None)
    assert open_data(tmp_path / "good", image_size=16).unstated == ["channels"]
    same = [ImageData.from_tensors(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), [0, 0], ["a"]) for _ in range(2)]
    check_images(same[0], same[1])  # images of one colour
    linked = open_data(links, image_size=16, channels=1)
    assert "y.png" in linked.repeated and not linked.subset(range(len(linked) - 20, len(linked))).repeated
    with pytest.raises(ValueError, match="parts must be at most 256"):
        GLEM.fit(data, "taef2", parts=300, **promise)
    with pytest.raises(ValueError, match="for private models: give privacy, too"):
        GLEM.fit(data, public=data)


def test_a_private_export_says_its_promise(model: GLEM, tmp_path: Path) -> None:
    for form in ("imagefolder", "webdataset"):
        SyntheticDataset(model, 1).export(tmp_path / form, form)  # type: ignore[arg-type]
        assert "-differentially private" in (tmp_path / form / "README.md").read_text()


def test_a_codec_of_the_user_is_fitted_to_public_images(data: ImageData) -> None:
    codec, public = Centred(data.image_shape, data.image_shape), images(seed=1)
    private = GLEM.fit(data, codec, privacy=Privacy(10), public=public)
    assert float(private.codec.middle) == pytest.approx(float(public.tensor().float().mean() / 255), abs=0.01)


class Centred(Codec):
    """Pixels less the mean of some images."""

    def __init__(self, image_shape: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape, shape)
        self.register_buffer("middle", torch.tensor(math.nan))

    @property
    def ready(self) -> bool:
        return bool(self.middle.isfinite())

    def fit(self, x: Tensor) -> None:
        self.middle.fill_(float(x.float().mean() / 255))

    def encode(self, x: Tensor, noise: object = None) -> Tensor:
        return (x.float() / 255 if not x.is_floating_point() else x) - self.middle

    def decode(self, h: Tensor) -> Tensor:
        return h + self.middle


def test_machines_that_compute_other_latents_are_refused(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    def others(found: Tensor) -> list[Tensor]:
        last = found.clone()
        last[5] += 1e-7
        return [found, last]

    monkeypatch.setattr("glem_augment.model.private_fit.gather", others)
    with pytest.raises(ValueError):
        rows_are_independent(model)


def test_a_promise_belongs_to_the_files_of_its_fit(model: GLEM, data: ImageData, tmp_path: Path) -> None:
    changed = copy.deepcopy(model)
    changed.latent_classes = GLEM.fit(data, "taef2").latent_classes
    with pytest.raises(ModelFileError):
        changed.save(tmp_path)
    with pytest.raises(ModelFileError):
        SyntheticDataset(changed, 1).export(tmp_path / "set")
    model.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    text = file.read_text()
    facts = json.loads(text)
    first = facts["privacy"]["rounds"][0]
    noisy, clipped = first | {"noise": 2 * first["noise"]}, first | {"clip": 2 * first["clip"]}
    for place, found in (
        ("training", {"note": "image 7 is there"}),
        ("posterior_temperature", 1.5),
        ("privacy", facts["privacy"] | {"rounds": []}),
        ("privacy", facts["privacy"] | {"rounds": [noisy, *facts["privacy"]["rounds"][1:]]}),
        ("privacy", facts["privacy"] | {"rounds": [clipped, *facts["privacy"]["rounds"][1:]]}),
        ("privacy", facts["privacy"] | {"expect": None}),
    ):
        file.write_text(json.dumps(facts | {place: found}))
        with pytest.raises(ModelFileError):
            GLEM.from_pretrained(tmp_path / "model")
    file.write_text(text)
    weights = load_file(file.with_name("model.safetensors"))
    save_file(weights | {"modes.rest": 2 * weights["modes.rest"]}, file.with_name("model.safetensors"))
    with pytest.raises(ModelFileError):
        GLEM.from_pretrained(tmp_path / "model")


def test_a_fitted_codec_gives_its_numbers_to_no_private_model(data: ImageData) -> None:
    fitted = GLEM.fit(data, "taef2")
    private = GLEM.fit(data, fitted.codec, privacy=Privacy(10), public=images(seed=1))
    assert not private.codec.mean.any() and bool((private.codec.std == 1).all()) and bool(fitted.codec.mean.any())


class Restless(torch.nn.Module):
    """An autoencoder that draws random numbers."""

    def encode(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8) + torch.rand(())

    def decode(self, h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=8)


def test_an_encoder_that_draws_random_numbers_is_refused(data: ImageData) -> None:
    with pytest.raises(ValueError, match="another latent each time"):
        GLEM.fit(data, Restless(), privacy=Privacy(10), public=images(seed=1))


def test_the_cell_of_an_image_is_the_same_in_any_company() -> None:
    g = torch.Generator().manual_seed(0)
    z, centres = (torch.randn(n, 64, generator=g, dtype=torch.float64) for n in (600, 8))
    centres[4:] = centres[:4] + 1e-15 * torch.randn(4, 64, generator=g)  # nearly ties, which the last bits decide
    whole = nearest(z, centres)
    assert all(torch.equal(nearest(z[:n], centres), whole[:n]) for n in (1, 2, 3, 24, 26, 100))


def write_folder(data: ImageData, folder: Path) -> None:
    """The images as PNG files, in a folder for each class."""
    from torchvision.transforms.functional import to_pil_image

    for index, (x, y) in enumerate(zip(data.tensor(), data.targets, strict=True)):
        (folder / data.classes[y]).mkdir(parents=True, exist_ok=True)
        to_pil_image(x).save(folder / data.classes[y] / f"{index}.png")
