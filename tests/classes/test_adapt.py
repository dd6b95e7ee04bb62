"""Adapting a flow to other images and classes: closed forms against NumPy, files, real images, and the command."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import tiny_model
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from glem_augment import GLEM, GLEMAugment, Noise, open_data
from glem_augment.classes.classes import Classes
from glem_augment.classes.fit import REST_FLOOR, fit_classes, fit_modes, fit_temperature, psi_that_holds
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.groups import k_means
from glem_augment.classes.modes import SHRUNK
from glem_augment.classes.statistics import ClassStatistics, Moments, class_statistics
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData

Psi = tuple[float, float, float] | None
PAPER: Psi = (0.5, 0.2, 0.05)


def statistics_of(latents: list[Tensor], rank: int, parts: int = 1) -> ClassStatistics:
    return class_statistics(latents.__getitem__, range(len(latents)), latents[0].shape[1], rank, parts)


def fitted(latents: list[Tensor], rank: int, shrinkage: float) -> Classes:
    return fit_classes(statistics_of(latents, rank), rank, PAPER, shrinkage=shrinkage)


def make_class(n: int) -> Tensor:
    """Correlated latents [n, 12], float64."""
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 12, generator=g, dtype=torch.float64) @ torch.randn(12, 12, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("shrinkage", [0.0, 5.0])
def test_means_and_variances_are_the_closed_form(shrinkage: float) -> None:
    latents = [0.5 * torch.randn(n, 6) + 0.3 * y for y, n in enumerate((12, 3, 1, 40))]
    found = fitted(latents, 4, shrinkage)
    gaussians, modes = found.gaussians, found.modes
    assert modes is not None
    z = [part.double().numpy() for part in latents]
    squares = [((c - c.mean(0)) ** 2).sum(0) for c in z]
    pooled = sum(squares) / sum(len(c) - 1 for c in z)
    for y, (c, square) in enumerate(zip(z, squares, strict=True)):
        weight = len(c) - 1 + shrinkage
        wanted = (square + shrinkage * pooled) / weight if weight else pooled
        np.testing.assert_allclose(gaussians.variance()[y].detach().numpy(), wanted, rtol=2e-5)
        np.testing.assert_allclose(gaussians.mu[y].detach().numpy(), c.mean(0), rtol=0, atol=1e-6)
    assert modes.counts.tolist() == [12, 3, 1, 40]


def test_the_temperature_is_that_of_latents_left_out() -> None:
    """Without shrinkage nothing is pooled, so this is exact: for each latent all Gaussians are fitted without it."""
    latents = [torch.randn(n, 12, dtype=torch.float64) for n in (8, 5, 11)]
    scores, labels = [], []
    for y, own in enumerate(latents):
        for i in range(len(own)):
            rest = [torch.cat([own[:i], own[i + 1 :]]) if c == y else z for c, z in enumerate(latents)]
            without = [Normal(z.mean(0), z.std(0)) for z in rest]
            scores.append(torch.stack([each.log_prob(own[i]).sum() for each in without]))
            labels.append(y)
    wanted = fit_temperature(torch.stack(scores), torch.tensor(labels))
    assert wanted > 2
    assert fitted(latents, 4, 0.0).temperature == pytest.approx(wanted, rel=1e-3)
    single = [*latents, torch.randn(1, 12)]  # which can't be left out, and stands in the way of others
    assert 1 < fitted(single, 4, 10.0).temperature < 100


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
    with pytest.raises(DataError):
        psi_that_holds(inside * 1e7, psi)


def images(*counts: int) -> tuple[Tensor, Tensor]:
    """Noise around a brightness of the class, shuffled."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randint(0, 120, (len(y), 1, 8, 8)) + 40 * y[:, None, None, None]
    order = torch.randperm(len(y))
    return x[order].to(torch.uint8), y[order]


def test_a_model_gets_the_means_and_variances_of_its_latents() -> None:
    model, (x, y) = tiny_model(shape=(1, 8, 8), classes=("a", "b")), images(9, 1)
    adapted = model.adapt((x, y), rank=3)
    # The noise is a function of the seed and the class.
    z = [model.encode(x[y == c], torch.Generator().manual_seed(c))[0] for c in (0, 1)]
    torch.testing.assert_close(adapted.gaussians.mu[0], z[0].mean(0))
    torch.testing.assert_close(adapted.gaussians.mu[1], z[1][0])
    own = z[0].var(0).clamp_min(REST_FLOOR)  # of class 1 nothing is known, so the pooled variance is the same
    torch.testing.assert_close(adapted.gaussians.variance(), own.expand(2, -1), rtol=1e-4, atol=1e-7)
    assert torch.equal(adapted.modes.directions[1], adapted.modes.shared_directions)
    changed = GLEMAugment(adapted, Noise(), p=1.0, modes=3, seed=0)(x, y)[0]
    assert (changed != x).flatten(1).any(1).all()
    few = model.adapt((x, y), max_per_class=4, rank=2)
    first = model.encode(x[(y == 0).nonzero()[:4, 0]], torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(few.gaussians.mu[0], first.mean(0))


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


@pytest.mark.parametrize("parts", [1, 3])
def test_full_covariances_are_shrunk_to_the_pooled_one(parts: int) -> None:
    g = torch.Generator().manual_seed(0)
    classes = [torch.randn(40, 4, generator=g) @ torch.randn(4, 4, generator=g) + y for y in range(2)]
    modes = fit_modes(statistics_of(classes, 4, parts), 4, full=True)
    pooled = sum(torch.cov(z.T.double()) * 39 for z in classes) / 78
    scores = modes.log_prob(torch.cat(classes)).double()
    for k, z in enumerate(classes):
        covariance = (1 - SHRUNK) * torch.cov(z.T.double()) + SHRUNK * pooled
        wanted = MultivariateNormal(z.double().mean(0), covariance).log_prob(torch.cat(classes).double())
        assert torch.allclose(scores[:, k], wanted, atol=0.1 if parts > 1 else 1e-3)  # the parts' own n - 1


def test_the_temperature_of_full_covariances_suits_new_latents(dim: int = 192, rank: int = 16, parts: int = 3) -> None:
    """The temperature is nearly as good for other latents as the best one."""
    g = torch.Generator().manual_seed(dim + rank)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q * 0.97 ** torch.arange(dim)
    means = [0.15 * torch.randn(dim, generator=g) @ mix.T for _ in range(3)]

    def draw(n: int, mean: Tensor) -> Tensor:
        """Latents with heavy tails, of which Gaussians are too sure."""
        return torch.randn(n, dim, generator=g) * (0.3 * torch.randn(n, 1, generator=g)).exp() @ mix.T + mean

    def loss(scores: Tensor, temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / temperature, y))

    seen, new = [draw(5 * dim, m) for m in means], [draw(500, m) for m in means]
    y = torch.arange(3).repeat_interleave(500)
    found = fit_classes(statistics_of(seen, rank, parts), rank, full=True)
    scores = found.log_prob(torch.cat(new))
    best = fit_temperature(scores, y)
    assert best > 1.2
    assert loss(scores, found.temperature) < loss(scores, best) + 0.02 < loss(scores, 1.0)


def test_statistics_without_latents_are_those_of_the_others() -> None:
    z = make_class(60)
    whole, rest = Moments.of(z, "class", 12), Moments.of(z[7:], "class", 12)
    found = whole.without(z[:7])
    assert found.count == 53 and whole.without(z[:0]) is whole
    torch.testing.assert_close(found.mean, rest.mean)
    torch.testing.assert_close(found.scatter(), rest.scatter())
    torch.testing.assert_close(found.squares, rest.squares)
    torch.testing.assert_close(found.values, rest.values)


def test_one_class_in_place_of_all_varies_as_the_images_of_a_class() -> None:
    latents = [make_class(n) + y for y, n in enumerate((20, 30))]
    statistics = statistics_of(latents, 12)
    one = fit_modes(statistics.as_one_class(), 12)
    modes = fit_modes(statistics, 12)
    torch.testing.assert_close(one.directions[0], modes.shared_directions)
    torch.testing.assert_close(one.scales[0], modes.shared_scales)
    assert one.counts.tolist() == [50]


def test_parts_of_a_class_are_drawn_as_often_as_they_have_images() -> None:
    g = torch.Generator().manual_seed(0)
    far = torch.tensor([[0.0] * 6, [40.0] * 6, [-40.0] * 6])
    latents = torch.cat([torch.randn(n, 6, generator=g) + shift for n, shift in zip((60, 30, 10), far, strict=True)])
    modes = fit_modes(statistics_of([latents, latents + 1], 3, 3), 3)
    assert modes.num_classes == 2 and sorted(modes.counts[:3].tolist()) == [10, 30, 60]
    samples = modes.sample(torch.ones(4000, dtype=torch.int64), generator=g)
    near = torch.cdist(samples, far + 1).argmin(1).bincount(minlength=3) / 4000
    assert torch.allclose(near, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)
    assert float(torch.cdist(samples, far + 1).amin(1).max()) < 8  # nothing between the parts
    rows = modes.rows_of(torch.ones(3, dtype=torch.int64), far + 1)
    assert torch.allclose(modes.mean[rows], far + 1, atol=1.0)
    assert torch.allclose(modes.counts[:3].float() @ modes.mean[:3] / 100, latents.mean(0), atol=1e-4)
    with pytest.raises(DataError, match="parts"):
        statistics_of([latents[:5]], 3, 3)


def test_a_pair_gets_the_names_that_the_model_was_made_with() -> None:
    pair = (torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 2)
    first = GLEM.create("identity", (1, 4, 4), ["cat", "dog"]).adapt(pair, rank=2)
    assert first.classes == ["cat", "dog"]
    assert first.adapt(pair, rank=2).classes == ["0", "1"]  # perhaps other classes


def test_no_group_has_a_single_latent() -> None:
    """Of these seeds, k-means ends three times after its last round with a group of one."""
    for seed in (35, 41, 47):
        z = torch.randn(600, 2, generator=torch.Generator().manual_seed(seed)) ** 3
        assert torch.bincount(k_means(z, 60)).min() > 1
