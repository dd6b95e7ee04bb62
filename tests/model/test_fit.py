"""`GLEM.fit` and `glem fit`: from images to a model in one pass, through pixels, an autoencoder, a flow or a codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_cases import tiny_model
from torch import Tensor

from glem_augment import GLEM, GLEMAugment, open_data
from glem_augment.codec.codec import Codec, Dequantisation, to_unit
from glem_augment.evaluation.metrics import evaluate
from glem_augment.images.dataset import ImageData


def images(n: int = 40, shape: tuple[int, int, int] = (3, 16, 16)) -> ImageData:
    """Two classes of smooth images."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    x = F.interpolate(torch.rand(n, shape[0], 3, 3, generator=g), shape[1:], mode="bilinear")
    x = (200 * x + 50 * y[:, None, None, None]).to(torch.uint8)
    return ImageData.from_tensors(x, y, ["dark", "light"])


def test_adapt_is_fit_with_a_flow() -> None:
    data = images()
    for name in (None, "taef2"):
        found = GLEM.fit(data, name, rank=5)
        wanted = GLEM.create("identity", (3, 16, 16), data.classes, autoencoder=name).adapt(data, rank=5)
        assert found.classes == ["dark", "light"] and found.config == wanted.config and "no flow" in repr(found)
        assert torch.equal(found.log_prob(data.tensor()), wanted.log_prob(data.tensor()))


def test_mistakes_are_one_clear_error() -> None:
    data, flow = images(), tiny_model(shape=(3, 16, 16), classes=("a", "b", "c"))
    for call in (
        lambda: GLEM.fit(data, "taef2", flow),
        lambda: GLEM.fit("bundled:fashion-mnist", flow=flow, image_size=16),
        lambda: GLEM.fit(data, image_size=16),
        lambda: GLEM.fit((torch.zeros(2, 32, 32, 3, dtype=torch.uint8), [0, 1])),
        lambda: GLEM.fit(images(shape=(1, 8, 8)), flow=flow),
        lambda: GLEM.fit(data, torch.nn.Identity()),
        lambda: GLEM.fit(data, class_model="parts"),
        lambda: GLEM.create("identity", (1, 4, 4), "cat"),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_classes_fitted_again_are_replaced_as_a_whole() -> None:
    data = open_data("bundled:fashion-mnist", image_size=8)
    model = GLEM.fit(data)
    before, found = accuracy(model, data), model.latent_classes
    model.fit_modes(data, rank=16, max_per_class=60)
    assert model.modes is not None and model.modes.rank == 16
    assert model.latent_classes is not found and model.latent_classes.temperature != found.temperature
    assert model.config.training["adapt"]["rank"] == 16
    assert accuracy(model, data) > before - 0.05
    trained = tiny_model(shape=(1, 8, 8), classes=data.classes)
    gaussians = trained.gaussians
    trained.fit_modes(data, rank=4)
    assert trained.gaussians is gaussians and trained.latent_classes.fitted is None  # learned with the flow


def accuracy(model: GLEM, data: ImageData) -> float:
    return float((model.predict(data.tensor()) == torch.from_numpy(data.targets)).float().mean())


class Halves(Codec):
    """A codec of a user's: means of 2x2 pixels."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        super().__init__(image_shape, (channels, height // 2, width // 2))
        self.register_buffer("scale", torch.tensor(3.0))

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        return F.avg_pool2d(to_unit(x, self.dtype), 2) * self.scale

    def decode(self, h: Tensor) -> Tensor:
        return F.interpolate(h / self.scale, scale_factor=2)


def test_a_codec_of_the_users_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    model = GLEM.fit(data, Halves((3, 16, 16)), rank=4)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    assert model.dim == 3 * 64 and accuracy(model, data) > 0.9
    assert torch.allclose(model.decode(model.encode(x)[0]), Halves((3, 16, 16)).decode(model.numbers(x)), atol=1e-5)
    moved, _ = GLEMAugment(model, "noise", p=1.0, seed=0)(x, y)
    assert not torch.equal(moved, x)
    seen: list[int] = []
    encode = model.codec.encode
    monkeypatch.setattr(model.codec, "encode", lambda x, noise=None: seen.append(len(x)) or encode(x, noise))
    assert evaluate(model, data, round_trip=2)["nats_per_number"] == pytest.approx(
        -float(model.log_prob(x, y).mean()) / 192
    )
    assert sum(seen) == 2 * len(x) + 2  # evaluate and log_prob encode each image once
    model.save(tmp_path)
    again = GLEM.from_pretrained(tmp_path, autoencoder=Halves((3, 16, 16)))
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_a_codec_that_contradicts_its_shapes_is_an_error() -> None:
    class Flat(Halves):
        def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
            return super().encode(x).flatten(1)

    class Small(Halves):
        def decode(self, h: Tensor) -> Tensor:
            return h

    for codec in (Flat((3, 16, 16)), Small((3, 16, 16)), Halves((3, 32, 32)), Halves):
        with pytest.raises((TypeError, ValueError), match="Flat|Small|Halves|32, 32"):
            GLEM.fit(images(), codec)  # type: ignore[arg-type]


def test_a_codec_that_says_exact_and_is_not_is_refused() -> None:
    class Exact(Halves):
        exact = True

    class Later(Exact):
        ready = False

    for codec in (Exact((3, 16, 16)), Later((3, 16, 16))):
        codec.fit = lambda x, codec=codec: setattr(type(codec), "ready", True)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="exact"):
            GLEM.fit(images(), codec)
    Later.ready = False
    lossy = GLEM.create("identity", (3, 16, 16), ["a", "b"], autoencoder=Later((3, 16, 16)))
    assert lossy.check_invertibility(images().tensor())["max_error"] > 1
