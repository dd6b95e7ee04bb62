"""The estimate of class Gaussians against explicit matrices, and models that are fitted or adapted by it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import tiny_model
from torch import Tensor
from torch.distributions import MultivariateNormal

from glem_augment import GLEM, GLEMAugment, Noise, open_data
from glem_augment.classes.covariances import to_public
from glem_augment.classes.fit import estimate, fit_classes, fit_temperature, psi_that_holds
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.statistics import ClassStatistics, class_statistics
from glem_augment.codec.published import prior_file
from glem_augment.errors import DataError
from glem_augment.flows.public import PublicFlow
from glem_augment.images.dataset import ImageData

Psi = tuple[float, float, float] | None
PAPER: Psi = (0.5, 0.2, 0.05)


SHAPE = (2, 2, 3)


def latents_of(counts: tuple[int, ...], dim: int = 12) -> list[Tensor]:
    """Correlated latents [n, d] of classes with different means and covariances, float64."""
    g = torch.Generator().manual_seed(sum(counts))
    mix = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    drawn = [torch.randn(n, dim, generator=g, dtype=torch.float64) * (1 + y) for y, n in enumerate(counts)]
    return [z @ mix + 3 * torch.randn(dim, generator=g, dtype=torch.float64) for z in drawn]


def public_flow() -> PublicFlow:
    g, flow = torch.Generator().manual_seed(0), PublicFlow(SHAPE)
    flow.maps.copy_(torch.eye(2) + 0.3 * torch.randn(6, 2, 2, generator=g))
    flow.between.copy_(torch.rand(12, generator=g))
    return flow


def statistics_of(latents: list[Tensor], public: PublicFlow | None = None, hold_out: bool = False) -> ClassStatistics:
    def of_class(y: int) -> Tensor:
        return to_public(latents[y].float(), public)

    return class_statistics(of_class, range(len(latents)), latents[0].shape[1], 64, hold_out)


def by_the_formula(
    latents: list[Tensor], public: PublicFlow | None, nu1_of: tuple[float, int] = (2, 4)
) -> list[MultivariateNormal]:
    """The estimate of `classes.fit`, with explicit matrices; `nu1_of`: dimensions and images of the class in nu1."""
    d = latents[0].shape[1]
    to = torch.eye(d, dtype=torch.float64) if public is None else to_public(torch.eye(d), public).double()
    v = [z @ to for z in latents]
    counts, means = torch.tensor([len(z) for z in v]).double(), torch.stack([z.mean(0) for z in v])
    scatters = [(z - z.mean(0)).T @ (z - z.mean(0)) for z in v]
    total = counts.sum() - len(v)
    pooled = sum(scatters) / total
    target = pooled.diagonal().diag() if public is None else torch.eye(d).double() * pooled.trace() / d
    w = (3 * d * target + total * pooled) / (3 * d + total)
    root, middle = target.diagonal().sqrt(), means.mean(0)
    away, e = (means - middle) / root, torch.zeros(d).double() if public is None else public.between.double()
    prior = e + (away.square().sum() / ((len(v) - 1) * d) - (1 / counts).mean() - e.mean()).clamp_min(0)
    means = middle + root * away * prior / (prior + 1 / counts[:, None])
    back = torch.linalg.inv(to)
    found = []
    for n, m, scatter in zip(counts, means, scatters, strict=True):
        nu1 = nu1_of[0] * d + nu1_of[1] * n
        covariance = back.T @ ((nu1 * w + scatter) / (nu1 + n - 1)) @ back
        found.append(MultivariateNormal(m @ back, (covariance + covariance.T) / 2))
    return found


@pytest.mark.parametrize("public", [None, public_flow()])
@pytest.mark.parametrize("counts", [(60, 25, 40), (4, 1, 3), (2, 2), (30, 1)])
def test_the_estimate_is_its_formula(counts: tuple[int, ...], public: PublicFlow | None) -> None:
    latents = latents_of(counts)
    wanted = by_the_formula(latents, public)
    found = fit_classes(statistics_of(latents, public), SHAPE, 12, public)
    z, modes, covariances = torch.cat(latents), found.modes, found.fitted
    assert modes is not None and covariances is not None
    scores = torch.stack([each.log_prob(z) for each in wanted], 1)
    torch.testing.assert_close(found.log_prob(z.float()).double(), scores, rtol=1e-4, atol=1e-3)
    noise = torch.randn(20000, 12, generator=torch.Generator().manual_seed(1))
    for y, each in enumerate(by_the_formula(latents, public, (1 / 8, 0))):
        covariance, scale = each.covariance_matrix.float(), float(each.variance.mean())
        torch.testing.assert_close(covariances.mean[y], each.mean.float(), rtol=1e-4, atol=1e-3)
        rows = modes.scales[y, :, None] * modes.directions[y]
        torch.testing.assert_close(rows.T @ rows, covariance, rtol=1e-3, atol=1e-3 * scale)
        torch.testing.assert_close(modes.directions[y] @ modes.directions[y].T, torch.eye(12), rtol=0, atol=1e-5)
        variance = found.gaussians.variance()[y].detach()
        torch.testing.assert_close(variance, covariance.diagonal(), rtol=1e-3, atol=1e-4 * scale)
        drawn = covariances.sample_from_noise(torch.full((len(noise),), y), noise)
        assert float((torch.cov(drawn.T) - covariance).norm() / covariance.norm()) < 0.05
        assert float((drawn.mean(0) - each.mean).norm()) < 0.05 * float(covariance.trace().sqrt())


def test_public_coordinates_are_exact_and_suit_any_grid() -> None:
    path = prior_file("taef2")
    assert path is not None
    for shape in ((32, 4, 4), (32, 8, 8), (32, 3, 5), (32, 16, 12), (32, 1, 1)):
        for grey in (False, True):
            flow = PublicFlow.from_file(path, shape, grey, torch.full((32,), 1.5))
            h = torch.randn(3, *shape)
            v, logdet = flow(h)
            back, other = flow.inverse(v)
            torch.testing.assert_close(back, h, rtol=0, atol=1e-4)
            assert torch.equal(logdet, -other) and bool((flow.between >= 0).all())
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], h[0]).flatten(1)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.double())[1].float(), logdet[0], rtol=1e-4, atol=1e-3)


def test_few_classes_many_classes_and_a_class_of_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300).repeat_interleave(2)[:-1]
    x = (torch.randint(0, 60, (len(y), 1, 4, 4), generator=g) + (y % 150)[:, None, None, None]).to(torch.uint8)
    monkeypatch.setattr("glem_augment.classes.fit._MOST_MODES", 10_000)
    many = GLEM.fit((x, y), rank=4)
    assert many.modes is not None and many.modes.directions.shape == (1, 4, 16)  # shared by all classes
    assert torch.equal(GLEMAugment(many, Noise(), p=1.0, seed=0)(x[:9], y[:9])[1], y[:9])
    many.save(tmp_path)
    assert torch.equal(GLEM.from_pretrained(tmp_path).predict(x), many.predict(x))
    assert float((many.predict(x) == y).float().mean()) > 0.2 and many.log_prob(x, y).isfinite().all()
    assert many.sample(torch.tensor([299]), source="rfcm").isfinite().all()
    one = GLEM.fit((x[:20], torch.zeros(20, dtype=torch.int64)), rank=4)
    assert not one.predict(x).any() and one.log_prob(x).isfinite().all()
    lonely = GLEM.fit((x, (torch.arange(len(x)) == 7).long()), rank=4)
    assert lonely.predict(x[7:8]).tolist() == [1] and lonely.log_prob(x).isfinite().all()


def test_the_temperature_suits_new_latents(dim: int = 48) -> None:
    """The temperature is nearly as good for other latents as the best one."""
    g = torch.Generator().manual_seed(dim)
    means = [0.3 * torch.randn(dim, generator=g) for _ in range(3)]

    def draw(n: int, mean: Tensor) -> Tensor:
        """Latents with heavy tails, of which Gaussians are too sure."""
        return torch.randn(n, dim, generator=g) * (0.9 * torch.randn(n, 1, generator=g)).exp() + mean

    def loss(scores: Tensor, temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / temperature, y))

    seen, new = [draw(400, m) for m in means], [draw(500, m) for m in means]
    y = torch.arange(3).repeat_interleave(500)
    found = fit_classes(statistics_of(seen, hold_out=True), (dim, 1, 1), 8)
    scores = found.log_prob(torch.cat(new))
    best = fit_temperature(scores, y)
    assert best > 1.2
    assert loss(scores, found.temperature) < loss(scores, best) + 0.02 < loss(scores, 1.0)


def test_latents_off_any_scale_are_an_error() -> None:
    for latents, words in (([torch.ones(5, 12)] * 2, "equal"), ([1e4 * torch.randn(9, 12)] * 2, "scale")):
        with pytest.raises(DataError, match=words):
            estimate(statistics_of(latents), SHAPE)


@pytest.mark.parametrize("psi", [PAPER, None])
def test_psi_is_kept_if_it_holds_the_variances_and_widened_if_not(psi: Psi) -> None:
    inside = torch.linspace(0.06, 0.5, 12, dtype=torch.float64).reshape(2, 6)
    assert psi_that_holds(inside, psi) == psi
    for outside in (inside * 0.01, torch.tensor([[1e-8, 1e4]], dtype=torch.float64)):
        wide = psi_that_holds(outside, psi)
        assert wide == (2 * float(outside.max()), 0.2, float(outside.min()) / 2)
        gaussians = ClassGaussians(*outside.shape, psi=wide)
        gaussians.set_variance(outside, inner=(0.0, 1.0))
        torch.testing.assert_close(gaussians.variance().double(), outside, rtol=1e-5, atol=0)


def images(*counts: int) -> tuple[Tensor, Tensor]:
    """Noise around a brightness of the class, shuffled."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randint(0, 120, (len(y), 1, 8, 8)) + 40 * y[:, None, None, None]
    order = torch.randperm(len(y))
    return x[order].to(torch.uint8), y[order]


def test_a_model_is_fitted_to_its_latents() -> None:
    model, (x, y) = tiny_model(shape=(1, 8, 8), classes=("a", "b")), images(9, 1)
    adapted = model.adapt((x, y), rank=3)
    # The noise is a function of the seed and the class.
    z = [model.encode(x[y == c], torch.Generator().manual_seed(c))[0] for c in (0, 1)]
    wanted = by_the_formula([each.double() for each in z], None)
    scores = torch.stack([each.log_prob(torch.cat(z).double()) for each in wanted], 1)
    torch.testing.assert_close(adapted.latent_classes.log_prob(torch.cat(z)).double(), scores, rtol=1e-4, atol=1e-2)
    kind = {"kind": "covariances", "rank": 8, "shared_rank": 8, "target": "own"}
    assert adapted.config.classes == kind | {"nu0": 192.0, "nu1": 128.0, "nu1_images": 4.0}
    changed = GLEMAugment(adapted, Noise(), p=1.0, modes=3, seed=0)(x, y)[0]
    assert (changed != x).flatten(1).any(1).all()
    few = model.adapt((x, y), max_per_class=4, rank=2)
    assert few.config.training["images_per_class"] == [1, 4]


def test_the_flow_stays_as_it_is_and_the_file_says_where_the_classes_came_from(tmp_path: Path) -> None:
    tiny_model(shape=(1, 8, 8), classes=("a", "b")).save(tmp_path / "base")
    base = GLEM.from_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x, y = images(6, 7, 8)
    adapted = base.adapt((x, y), classes=["x", "y", "z"], rank=3)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    for old, new in zip(base.flow.parameters(), adapted.flow.parameters(), strict=True):
        assert torch.equal(old, new) and old.data_ptr() != new.data_ptr()
    adapted.save(tmp_path / "new")
    loaded = GLEM.from_pretrained(tmp_path / "new")
    assert (loaded.classes, loaded.modes.rank, base.classes) == (["x", "y", "z"], 3, ["a", "b"])
    assert torch.equal(loaded.log_prob_per_class(x), adapted.log_prob_per_class(x))
    record = loaded.config.training
    digest = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert record["adapted_from"]["weights_sha256"] == digest
    assert (record["images"], record["images_per_class"]) == (21, [6, 8])
    named = base.adapt(ImageData.from_tensors(x, y, ["n1", "n2", "n3"]), classes=["x", "y", "z"])
    assert (named.class_ids, named.classes) == (["n1", "n2", "n3"], ["x", "y", "z"])


def test_bad_input_is_one_clear_error_before_any_work(image_folder: Path) -> None:
    model, (x, y) = tiny_model(shape=(1, 8, 8), classes=("a", "b")), images(3, 3)
    for data, bad in (
        ((x, y), {"classes": ["a", "b", "c"]}), ((x[:2], torch.tensor([0, 1])), {}), (open_data(image_folder), {}),
        ((x, y), {"rank": 0}), ((x, y), {"max_per_class": 1}), (x, {}),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            model.adapt(data, **bad)
    # A folder by name is resized and converted; numbers of NumPy and classes that are numbers are taken.
    assert model.adapt(image_folder, rank=np.int64(2)).classes == ["bird", "cat", "dog"]
    assert model.adapt((x, y), classes=range(2), seed=2 * 10**13).classes == ["0", "1"]


def test_the_bundled_flow_serves_some_classes_in_another_order(
    bundled_train: ImageData, bundled_test: ImageData
) -> None:
    kept = [9, 0, 3, 8]

    def some(data: ImageData, images: int) -> ImageData:
        """A few images of those classes, numbered in the order of `kept`, under new names."""
        rows = np.concatenate([np.flatnonzero(data.targets == c)[:images] for c in kept])
        return data.subset(rows).with_targets(np.repeat(np.arange(4), images), [f"kind {c}" for c in kept])

    test = some(bundled_test, 10)
    adapted = GLEM.from_pretrained("bundled:fashion-mnist").adapt(some(bundled_train, 12), rank=8)
    assert adapted.classes == ["kind 9", "kind 0", "kind 3", "kind 8"]
    assert float((adapted.predict(test.tensor()) == torch.from_numpy(test.targets)).float().mean()) > 0.85
    y = torch.arange(4).repeat(5)
    drawn = adapted.sample(y, 0.7, torch.Generator().manual_seed(0), source="rfcm")
    assert float((adapted.predict(drawn) == y).float().mean()) > 0.8


def test_a_pair_gets_the_names_that_the_model_was_made_with() -> None:
    pair = (torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 2)
    first = GLEM.create("identity", (1, 4, 4), ["cat", "dog"]).adapt(pair, rank=2)
    assert first.classes == ["cat", "dog"]
    assert first.adapt(pair, rank=2).classes == ["0", "1"]  # perhaps other classes
