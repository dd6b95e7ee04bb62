"""A GLEM in an autoencoder's latents: what it promises, what it refuses, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import model_cases
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from glem_augment import GLEM, Adversarial, GLEMAugment, Mixup, Noise, Policy
from glem_augment.classes.classes import Classes
from glem_augment.errors import ModelFileError
from glem_augment.model.files import CONFIG, WEIGHTS


class Blocks(nn.Module):
    """A lossy autoencoder that is fast: averages of 2x2 pixels."""

    def encode(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    def decode(self, h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=2)


@pytest.fixture(scope="module")
def photos() -> tuple[Tensor, Tensor]:
    return model_cases.photos(40)


@pytest.fixture(scope="module")
def model(photos: tuple[Tensor, Tensor]) -> GLEM:
    created = GLEM.create("identity", (3, 16, 16), ["a", "b"], autoencoder="taef2")
    return created.adapt(photos, rank=8)


def test_its_facts_and_its_likelihoods(model: GLEM, photos: tuple[Tensor, Tensor]) -> None:
    x, y = photos
    assert (model.image_shape, model.config.flow_shape, model.dim) == ((3, 16, 16), (32, 2, 2), 128)
    with pytest.raises(ValueError, match="nats per number"):
        model.bits_per_dim(x)
    # The density is over E(x) itself: the standardisation and the flow's determinant are in it.
    codec = model.autoencoder
    assert codec is not None
    own = GLEM(model.config, model.flow, Classes(model.gaussians), codec)
    h = codec.autoencoder.encode(x.float() / 255)
    std, mean = codec.std.expand(h.shape[1:]), codec.mean.expand(h.shape[1:])
    mu = own.gaussians.mu[y].view_as(h) * std + mean
    normal = torch.distributions.Normal(mu, own.gaussians.variance()[y].view_as(h).sqrt() * std)
    assert torch.allclose(own.log_prob(x, y), normal.log_prob(h).flatten(1).sum(1), rtol=1e-4)
    assert float((model.predict(x) == y).float().mean()) > 0.9


def test_its_file_names_the_autoencoder_and_does_not_hold_it(
    model: GLEM, photos: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model.save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("autoencoder.autoencoder")]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["autoencoder"]["name"] == "taef2" and config["autoencoder"]["image_shape"] == [3, 16, 16]
    again = GLEM.from_pretrained(tmp_path)
    assert torch.equal(again.log_prob(photos[0]), model.log_prob(photos[0]))
    config["autoencoder"]["sha256"] = "0" * 64
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="changed"):
        GLEM.from_pretrained(tmp_path)
    config["autoencoder"]["image_shape"] = [3, 0, 16]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="autoencoder"):
        GLEM.from_pretrained(tmp_path)


def test_an_autoencoder_of_the_users_is_asked_for(photos: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    own = GLEM.create("identity", (3, 16, 16), ["a", "b"], autoencoder=Blocks()).adapt(photos, rank=4)
    own.save(tmp_path)
    with pytest.raises(ModelFileError, match="autoencoder="):
        GLEM.from_pretrained(tmp_path)
    assert torch.equal(GLEM.from_pretrained(tmp_path, autoencoder=Blocks()).predict(photos[0]), own.predict(photos[0]))


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 15)])
def test_grey_images_and_other_sizes_are_extended_and_cropped(shape: tuple[int, int, int]) -> None:
    """As if RGB images with repeated edges had been given, in sizes that the autoencoder divides."""
    g = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(6, shape[0], 3, 3, generator=g), shape[1:], mode="bilinear")
    model = GLEM.create("identity", shape, ["a", "b"], autoencoder="taef2")
    model = model.adapt(((255 * x).to(torch.uint8), torch.arange(6) % 2), rank=2)
    height, width = (-(-side // 8) * 8 for side in shape[1:])
    high, wide = height - shape[1], width - shape[2]
    edges = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    large = F.pad(x.expand(-1, 3, -1, -1), edges, "replicate")
    codec = model.autoencoder
    assert codec is not None and codec.shape == (32, height // 8, width // 8)
    h = codec.autoencoder.encode(large)
    assert torch.allclose(model.numbers(x), (h - codec.mean) / codec.std, atol=1e-5)
    back = codec.autoencoder.decode(h)[:, :, edges[2] : edges[2] + shape[1], edges[0] : edges[0] + shape[2]]
    back = back if shape[0] == 3 else back.mean(1, keepdim=True)
    assert torch.allclose(model.codec.decode(model.numbers(x)), back, atol=1e-4)
    with pytest.raises(ValueError, match="4 channels"):
        GLEM.create("identity", (4, 16, 16), ["a"], autoencoder="taef2")


@pytest.mark.parametrize("policy", [Mixup(), Noise(0.5), Adversarial(0.5)])
def test_augmentation_adds_the_change_and_leaves_the_rest(
    model: GLEM, photos: tuple[Tensor, Tensor], policy: Policy
) -> None:
    x, y = (part[::5] for part in photos)
    aug = GLEMAugment(model, policy, p=1.0, seed=0)
    if policy.wants_classifier:
        aug.attach(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 16 * 16, 2)))
    large = F.interpolate(x.float() / 255, scale_factor=2, mode="bilinear")
    moved, _ = aug(large, y)
    assert 0.002 < float((moved - large).abs().mean()) < 0.3 and aug.stats["rejected"] <= len(x) // 2
    if isinstance(policy, Noise):  # bit for bit, though decoding loses detail
        assert torch.equal(GLEMAugment(model, Noise(0.0), p=1.0)(x, y)[0], x)
