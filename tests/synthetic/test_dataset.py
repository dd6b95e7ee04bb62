"""SyntheticDataset: item i is a function of seed, class and place in the class, whatever the batch and the worker."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from glem_augment import GLEM
from glem_augment.codec.pixel_range import UINT8
from glem_augment.synthetic.dataset import SyntheticDataset

NAMES = ["T-shirt/top", "Ankle boot", "Bag"]


def pixels(n: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    return torch.randint(60, 196, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_model(shape: tuple[int, int, int] = (1, 8, 8)) -> GLEM:
    model = GLEM.create("identity", shape, classes=NAMES, class_ids=["0", "1", "2"])
    model.fit_modes((pixels(60, shape), torch.arange(60) % 3), rank=8)
    with torch.no_grad():
        model.gaussians.mu.copy_(torch.tensor([-0.15, 0.0, 0.15])[:, None].expand_as(model.gaussians.mu))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> GLEM:
    return make_model()


def test_it_looks_like_a_torchvision_data_set(model: GLEM) -> None:
    data = SyntheticDataset(model, per_class=5)
    assert len(data) == 15 and data.classes == NAMES and data.class_to_idx == {n: i for i, n in enumerate(NAMES)}
    assert data.targets == [0] * 5 + [1] * 5 + [2] * 5 and "15 images 1x8x8 of 3 classes" in repr(data)
    image, label = data[7]
    assert isinstance(image, Image.Image) and image.mode == "L" and image.size == (8, 8)
    assert type(label) is int and label == 1 and data[-1][1] == 2
    data.transform, data.target_transform = np.asarray, lambda y: y + 10
    assert isinstance(data[0][0], np.ndarray) and [y for _, y in data] == [t + 10 for t in data.targets]
    two_channels = SyntheticDataset(make_model((2, 4, 4)), per_class=2)
    assert torch.equal(two_channels[3][0], two_channels.images([3])[0])  # no PIL image has two channels


def test_counts_per_class(model: GLEM) -> None:
    per_class: Any
    for per_class, counts in ((4, [4, 4, 4]), ([5, 0, 9], [5, 0, 9]), ({"Bag": 7}, [0, 0, 7])):
        data = SyntheticDataset(model, per_class=per_class)
        assert data.counts == counts and data.targets == np.repeat([0, 1, 2], counts).tolist()
    for per_class, named in (
        ("even", "'even'"), ("balance", "real="), (0, "0"), ([1, 2], "2"), ([1, 2, -1], "'Bag'"), ({"cow": 3}, "'cow'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            SyntheticDataset(model, per_class=per_class)
    accented = GLEM.create("identity", (1, 8, 8), classes=["caf\u00e9", "bar"])
    assert SyntheticDataset(accented, {"cafe\u0301": 2}).counts == [2, 0]  # macOS writes the accent separately


@pytest.mark.parametrize("source", ["gaussian", "rfcm"])
def test_a_latent_depends_on_seed_class_and_place_alone(model: GLEM, source: str) -> None:
    def latents(per_class: Any, seed: int = 3) -> Any:
        return SyntheticDataset(model, per_class, seed=seed, source=source).latents

    draw = latents(40)
    z = draw(range(120))
    order = torch.randperm(120).tolist()
    assert torch.equal(draw(order), z[order])
    assert all(torch.equal(draw([i])[0], z[i]) for i in (0, 15, 16, 39, 40, 119))
    more = latents([100, 0, 50])
    assert torch.equal(more(range(40)), z[:40]) and torch.equal(more(range(100, 140)), z[80:])
    assert not torch.equal(latents(40, seed=4)(range(120)), z)
    spread = (z.reshape(3, 40, -1) - z.reshape(3, 40, -1).mean(1, keepdim=True)).flatten(0, 1)
    assert (torch.corrcoef(spread) - torch.eye(120)).abs().max() < 0.75  # nothing is drawn twice


def test_latents_have_the_law_of_the_class(model: GLEM) -> None:
    n = 3000
    z = SyntheticDataset(model, per_class=n, temperature=0.5, source="gaussian").latents(range(2 * n, 3 * n))
    assert torch.allclose(z.mean(0), model.gaussians.mu[2], atol=0.03)
    assert torch.allclose(z.var(0), 0.25 * model.gaussians.variance()[2], rtol=0.15)
    full = SyntheticDataset(model, per_class=n, temperature=1.0).latents(range(n))  # rfcm, since there are modes
    modes = model.modes
    total = (modes.scales[0, :, None] * modes.directions[0]).square().sum(0) + modes.rest[0]
    assert torch.allclose(full.var(0), total, rtol=0.15)
    assert torch.equal(SyntheticDataset(model, per_class=2, temperature=0.0).latents([0, 1])[0], model.modes.mean[0])


def test_images_are_decoded_latents_the_same_in_any_order(model: GLEM) -> None:
    data = SyntheticDataset(model, per_class=20)
    whole = data.images(range(60))
    assert whole.dtype == torch.uint8 and whole.shape == (60, 1, 8, 8)
    assert (model.decode(data.latents(range(60))) * 255 - whole).abs().max() <= 0.5 + 1e-3
    order, kept = torch.randperm(60).tolist(), SyntheticDataset(model, per_class=20, cache_bytes=0)
    kept.preload()
    for other in (data, SyntheticDataset(model, 20, cache_bytes=0), pickle.loads(pickle.dumps(data)), kept):
        assert torch.equal(other.images(order), whole[order])
        assert torch.equal(other.images(torch.tensor([3, 3, -1])), whole[[3, 3, 59]])
        assert np.array_equal(np.asarray(other[41][0]), whole[41, 0]) and other[41][1] == 2
    data.transform = np.asarray
    for preload in (False, True):
        if preload:
            data.preload()
        images, labels = zip(*DataLoader(data, 7, sampler=order, num_workers=2), strict=True)
        assert torch.equal(torch.cat(images), whole[order, 0])
        assert torch.cat(labels).tolist() == [i // 20 for i in order]


def test_an_image_does_not_depend_on_how_many_there_are() -> None:
    """In a batch of one, TAEF2's convolutions have other last bits, which change an image by a grey level."""
    x, y = pixels(24, (3, 32, 32)), torch.arange(24) % 2
    model = GLEM.fit((x, y), autoencoder="taef2", rank=4)
    calls: list[int] = []
    decode = model.decode
    model.decode = lambda z, **options: calls.append(len(z)) or decode(z, **options)  # type: ignore[method-assign]
    wanted = SyntheticDataset(model, per_class=[17, 0]).images(range(17))
    for count in (1, 9):
        data = SyntheticDataset(model, per_class=[count, 0])
        assert torch.equal(data.images(range(count)), wanted[:count])
    assert calls == [8, 8, 16, 8, 8, 8]


def test_blocks_of_a_class(model: GLEM) -> None:
    """They begin at the same places, whatever the counts, and no image is missing or in two blocks."""
    draws = SyntheticDataset(model, [200, 0, 9]).draws
    assert draws.edges == [0, 8, 16, 32, 64, 128, 192, 256]
    assert draws.blocks() == [(0, n) for n in range(7)] + [(2, 0), (2, 1)]
    assert draws.places(2, 1) == range(8, 9) and draws.places(0, 6) == range(192, 200)


def test_blocks_are_decoded_once_and_the_cache_is_bounded(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []  # sizes of the batches that are decoded
    decode = GLEM.decode
    monkeypatch.setattr(GLEM, "decode", lambda m, z, **k: calls.append(len(z)) or decode(m, z, **k))
    data = SyntheticDataset(model, per_class=20)
    for i in range(60):
        data[i]
    assert calls == [8, 8, 16] * 3  # the last block of a class is decoded whole
    calls.clear()
    small = SyntheticDataset(model, per_class=8, cache_bytes=2 * 8 * 64)
    for i in [0, 8, 0, 16, 0, 8]:  # of two blocks that fit, the one used less recently gives way
        small[i]
    assert calls == [8] * 4


def test_arguments_are_checked(model: GLEM) -> None:
    for settings, name in (
        ({"temperature": -0.1}, "temperature"), ({"seed": -1}, "seed"),
        ({"source": "vae"}, "'vae'"), ({"class_map": "order"}, "class_map"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            SyntheticDataset(model, **settings)
    with pytest.raises(ValueError, match="fit_modes"):
        SyntheticDataset(GLEM.create("identity", (1, 8, 8), classes=NAMES), source="rfcm")
    data = SyntheticDataset(model, per_class=2)
    with pytest.raises(IndexError, match="index 6"):
        data[6]


def test_draws_out_of_range_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = GLEM.create("identity", (1, 2, 2), classes=NAMES, psi=None), {}
    model.eval().requires_grad_(False).gaussians.s.fill_(0.36)  # pixels that often leave [0, 1] by more than 1
    for attempts in (1, 5):
        monkeypatch.setattr("glem_augment.synthetic.draws.MAX_ATTEMPTS", attempts)
        data = SyntheticDataset(model, per_class=40, temperature=1.3)
        z = data.latents(range(120))
        found[attempts] = z, UINT8.near(model.decode(z, clamp=False)), data
        bad = np.concatenate([data.draws.draw(*block).out_of_range for block in data.draws.blocks()])
        assert bad.tolist() == (~found[attempts][1]).tolist()
    (first, good, _), (z, better, data) = found[1], found[5]
    assert 10 < int((~good).sum()) and int((~better).sum()) < int((~good).sum()) / 3
    assert torch.equal(z[good], first[good]) and not (z[~good] == first[~good]).all(1).any()
    # An item depends on seed, class and place alone, also if it was drawn again.
    order = torch.randperm(120)
    assert torch.equal(data.latents(order), z[order])
    assert torch.equal(SyntheticDataset(model, per_class=[9, 0, 40], temperature=1.3).latents(range(9)), z[:9])
