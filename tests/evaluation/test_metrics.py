"""FID, Coverage, ranks, out-of-distribution scores and memorisation against slow, plain references."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from glem_augment import GLEM, ImageData
from glem_augment.errors import DataError, ModelFileError
from glem_augment.evaluation import (
    Classifier,
    Recipe,
    auroc,
    averaged_posterior,
    continuum_correlation,
    coverage,
    feature_fid,
    likelihood_gap,
    mantel,
    memorisation_ratio,
    nearest_distances,
    ood_images,
    ood_scores,
    spearman,
    train_classifier,
)
from glem_augment.evaluation.continuum import average_ranks, class_mean_distance


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def features(n: int, m: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(m, m, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return scale * torch.randn(n, m, generator=g, dtype=torch.float64) @ mix + shift


def closed_form_fid(a: np.ndarray, b: np.ndarray) -> float:
    """By symmetric eigendecompositions only: tr (S1^1/2 S2 S1^1/2)^1/2."""
    s1, s2 = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


@pytest.mark.parametrize(("n", "m"), [(500, 12), (60, 40), (30, 64)])  # the last one has fewer images than features
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fid_equals_the_closed_form(n: int, m: int, offset: float) -> None:
    a, b = features(n, m, 0, offset), features(n + 7, m, 1, offset + 0.3, 1.2)
    assert feature_fid(a, b) == pytest.approx(closed_form_fid(a.numpy(), b.numpy()), rel=1e-4)
    assert feature_fid(a.float() if not offset else a, a) == pytest.approx(0, abs=1e-3)


def brute_force_prdc(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """The definition, with the full distance matrices (as the prdc package has it)."""

    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))

    radii = np.sort(distances(real, real), axis=1)[:, k]  # column 0 is the image itself
    near = distances(real, fake)
    return {
        "coverage": float((near.min(1) < radii).mean()),
        "density": float((near < radii[:, None]).sum(0).mean() / k),
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("shift", [0.0, 0.7, 300.0])
def test_coverage_equals_its_definition(k: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(
        sys.modules["glem_augment.evaluation.coverage"], "_CHUNK", 50
    )  # several chunks, a short last one
    real, fake = features(170, 6, 0), features(430, 6, 1, shift, 0.8)
    got, wanted = coverage(real, fake, k), brute_force_prdc(real.numpy(), fake.numpy(), k)
    assert got["coverage"] == pytest.approx(wanted["coverage"], rel=1e-9)
    assert got["density"] == pytest.approx(wanted["density"], rel=1e-9)
    assert (got["k"], got["real"], got["generated"]) == (k, 170, 430)
    if shift == 0.7:
        assert 0 < got["coverage"] < 1


def test_coverage_against_prdc() -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = features(300, 16, 0), features(250, 16, 1, 0.5, 0.9)
    wanted = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    got = coverage(real, fake, 5)
    assert got["coverage"] == pytest.approx(wanted["coverage"], rel=1e-4)
    assert got["density"] == pytest.approx(wanted["density"], rel=1e-4)


def test_fid_against_torch_fidelity() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    real, fake = features(400, 64, 0), features(350, 64, 1, 0.2, 1.1)
    statistics = [fidelity.fid_features_to_statistics(x) for x in (real, fake)]
    wanted = fidelity.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert feature_fid(real, fake) == pytest.approx(wanted, rel=1e-4)


def test_coverage_of_itself_and_of_duplicates() -> None:
    real = features(40, 5, 0)
    assert coverage(real, real)["coverage"] == 1.0
    twice = torch.cat([real, real])  # the nearest neighbour of every image is its copy: radius 0, nothing is nearer
    assert coverage(twice, real, 1)["coverage"] == 0.0
    with pytest.raises(DataError, match="at least 6"):
        coverage(real[:5], real, 5)
    with pytest.raises(ValueError, match="k must be"):
        coverage(real, real, 0)
    with pytest.raises(ValueError, match=f"real has {real.shape[1]} features, generated 1"):
        coverage(real, real[:, :1])


def test_features_that_cannot_be_used_are_named() -> None:
    good = features(10, 4, 0)
    with pytest.raises(ValueError, match="one width"):
        feature_fid(good, features(10, 5, 0))
    with pytest.raises(DataError, match="generated holds features that are not finite"):
        feature_fid(good, good * float("nan"))
    with pytest.raises(DataError, match="real holds 1 images"):
        feature_fid(good[:1], good)
    with pytest.raises(ValueError, match="shape"):
        feature_fid(good[0], good)


def test_nearest_distances_are_those_of_the_full_matrix() -> None:
    a, b = features(30, 5, 0), features(70, 5, 1)
    assert torch.allclose(nearest_distances(a, b), torch.cdist(a, b).amin(1), rtol=1e-9)
    assert torch.allclose(nearest_distances(b[:3], b), torch.zeros(3).double(), atol=1e-6)


def test_ranks_and_rank_correlation_with_ties_match_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 9, (60,), generator=g).double()
    b = a + 4 * torch.randn(60, generator=g)
    assert spearman(a, b) == pytest.approx(float(functional.spearman_corrcoef(a, b.double())), abs=1e-6)
    assert spearman(a, a**3) == pytest.approx(1.0) and spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.ones(60)) == 0.0


def test_mantel_finds_structure_and_only_structure() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(12, 3, generator=g, dtype=torch.float64)
    near = torch.cdist(points, points)
    noisy = near + 0.1 * torch.rand(12, 12, generator=g).triu(1)
    noisy = noisy.triu(1) + noisy.triu(1).T
    value, p = mantel(near, noisy)
    row, column = torch.triu_indices(12, 12, 1)
    assert value == pytest.approx(spearman(near[row, column], noisy[row, column])) and value > 0.9 and p == 0.001
    value, p = mantel(near, -noisy)
    assert value < -0.9 and p == 0.001
    other = torch.cdist(*[torch.randn(12, 3, generator=g, dtype=torch.float64)] * 2)
    assert mantel(near, other)[1] > 0.05
    with pytest.raises(ValueError, match="K >= 3"):
        mantel(near[:2, :2], near[:2, :2])


def test_continuum_correlation_has_the_signs_of_the_claim() -> None:
    g = torch.Generator().manual_seed(0)
    k, n = 8, 400
    centres = torch.randn(k, 4, generator=g)
    y = torch.arange(n) % k
    x = centres[y] + 0.3 * torch.randn(n, 4, generator=g)
    logits = -torch.cdist(x, centres).square()
    kld = 0.5 * torch.cdist(centres, centres).square()  # of unit Gaussians at the classes' centres
    fit = continuum_correlation(kld, logits, x, y)
    assert fit.distance > 0.95 and fit.confusion < -0.9 and fit.pairs == 28
    assert fit.distance_p <= 0.01 and fit.confusion_p <= 0.01
    shuffled = torch.randperm(k, generator=g)
    assert abs(continuum_correlation(kld[shuffled][:, shuffled], logits, x, y).distance) < 0.6
    there = y != 3
    with pytest.raises(DataError, match="no images of the classes 3: leave them out"):
        continuum_correlation(kld, logits[there], x[there], y[there])


def test_auroc_counts_pairs_also_beyond_the_sigmoid() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    inside, outside = torch.rand(50, generator=g).mul(8).round() / 10, torch.rand(70, generator=g).mul(10).round() / 10
    pairs = (outside[None] > inside[:, None]).double() + 0.5 * (outside[None] == inside[:, None]).double()
    assert auroc(inside, outside) == pytest.approx(float(pairs.mean()))
    target = torch.cat([torch.zeros(50), torch.ones(70)]).long()
    reference = classification.binary_auroc(torch.cat([inside, outside]), target)
    assert auroc(inside, outside) == pytest.approx(float(reference), abs=1e-6)
    assert auroc(inside + 4000, outside + 4000) == pytest.approx(float(pairs.mean()), abs=0.01)
    assert auroc(torch.zeros(3), torch.ones(4)) == 1.0
    with pytest.raises(DataError, match="NaN"):
        auroc(inside, outside * float("nan"))


@pytest.fixture(scope="module")
def toy() -> tuple[GLEM, Tensor, Tensor]:
    """An identity flow with the Gaussians of three classes of dark, smooth 8x8 images."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    base = torch.linspace(20, 90, 8)[:, None] + torch.zeros(8)
    shapes = torch.stack([base, base.T, base.flip(0)])[:, None]
    x = (shapes[y] + 6 * torch.randn(240, 1, 8, 8, generator=g)).clamp(0, 255).to(torch.uint8)
    model = GLEM.create("identity", (1, 8, 8), ["a", "b", "c"], psi=None).requires_grad_(False)
    z = model.encode(x, g)[0]
    for c in range(3):
        model.gaussians.mu[c] = z[y == c].mean(0)
        model.gaussians.s[c] = z[y == c].var(0)
    return model, x, y


def test_ood_scores_by_hand_and_their_direction(toy: tuple[GLEM, Tensor, Tensor]) -> None:
    model, x, y = toy
    inside = ood_scores(model, x[:120])
    assert torch.allclose(inside["likelihood"], -model.log_prob(x[:120]).double(), atol=1e-3)
    posterior = torch.softmax(model.log_prob_per_class(x[:120]).double(), 1)
    entropy = -(posterior * posterior.clamp_min(1e-300).log()).sum(1)
    assert torch.allclose(inside["entropy"], entropy, atol=1e-6) and "typicality" not in inside
    mean = float(inside["likelihood"].mean())
    typical = ood_scores(model, x[120:], mean)
    assert torch.allclose(typical["typicality"], (typical["likelihood"] - mean).abs())
    for kind in ("noise", "inverted"):
        outside = ood_scores(model, ood_images(x[:120], kind), mean)
        assert auroc(typical["likelihood"], outside["likelihood"]) == 1.0
        assert auroc(typical["typicality"], outside["typicality"]) == 1.0


def test_averaged_posteriors_are_means_over_noise_and_mirrors(toy: tuple[GLEM, Tensor, Tensor]) -> None:
    model, x, _ = toy
    x = x[:20] // 4 * 2 + 90  # off the classes' grounds, so that the posterior is not all zeros and ones
    assert torch.allclose(averaged_posterior(model, x, draws=0), model.posterior(x).double(), atol=1e-5)
    both = averaged_posterior(model, x, draws=0, flip=True)
    mirrored = (model.posterior(x) + model.posterior(x.flip(3))).double() / 2
    assert torch.allclose(both, mirrored, atol=1e-5)
    g = torch.Generator().manual_seed(5)
    by_hand = sum(torch.softmax(model.gaussians.log_prob(model.encode(x, g)[0]), 1).double() for _ in range(3)) / 3
    got = averaged_posterior(model, x, draws=3, seed=5)
    assert torch.allclose(got, by_hand, atol=1e-5) and torch.allclose(got.sum(1), torch.ones(20).double())
    with pytest.raises(ValueError, match="draws"):
        averaged_posterior(model, x, draws=-1)


def test_ood_images_are_what_they_say() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(ood_images(ood_images(x, "inverted"), "inverted"), x)
    turned = x
    for _ in range(4):
        turned = ood_images(turned, "rotated")
        assert turned.shape == x.shape
    assert torch.equal(turned, x) and not torch.equal(ood_images(x, "rotated"), x)
    assert torch.equal(ood_images(x, "noise", 3), ood_images(x, "noise", 3))
    with pytest.raises(ValueError, match="kind"):
        ood_images(x, "upside-down")
    with pytest.raises(DataError, match="4x6"):
        ood_images(torch.zeros(1, 1, 4, 6, dtype=torch.uint8), "rotated")


def test_distances_of_means_survive_a_common_offset() -> None:
    x = torch.randn(300, 16, dtype=torch.float64) * 1e-3
    y = torch.arange(300) % 30
    near, far = class_mean_distance(x, y, 30), class_mean_distance(x + 1e4, y, 30)
    assert torch.allclose(near, far, atol=1e-9)


def test_memorisation_ratio_knows_copies_from_new_images() -> None:
    train, held_out, fresh = features(300, 6, 0), features(200, 6, 1), features(150, 6, 2)
    honest = memorisation_ratio(fresh, train, held_out)
    assert honest["images"] == 200 and 0.9 < honest["ratio"] < 1.1 and 0.4 < honest["share_nearer_train"] < 0.6
    copies = memorisation_ratio(train[:150] + 1e-3, train, held_out)
    assert copies["ratio"] < 0.1 and copies["share_nearer_train"] > 0.6
    two = memorisation_ratio(torch.tensor([[1.0, 0], [2.0, 0]]), torch.zeros(1, 2), torch.tensor([[3.0, 0]]))
    assert two["ratio"] == pytest.approx(1.25)  # of 1/2 and 2
    held_copies = memorisation_ratio(held_out[:150] * 1e3, train, held_out * 1e3)["ratio"]  # may overflow
    assert held_copies > 1e6
    ties = memorisation_ratio(fresh, train[:50], train[:50])
    assert ties["share_nearer_train"] == 0.5


def test_likelihood_gap_is_a_difference_of_bits(toy: tuple[GLEM, Tensor, Tensor]) -> None:
    model, x, y = toy
    train, other = [(x[:100], y[:100])], [(x[100:170], y[100:170]), (x[170:], y[170:])]
    got = likelihood_gap(model, train, other)
    bits = -model.log_prob(x[:100], y[:100], torch.Generator().manual_seed(0)).mean() / (64 * math.log(2))
    assert got["train_bits_per_dim"] == pytest.approx(float(bits), rel=1e-5)
    assert got["gap"] == pytest.approx(got["held_out_bits_per_dim"] - got["train_bits_per_dim"])
    assert abs(got["gap"]) < 0.2  # nothing was learned by heart
    with pytest.raises(DataError, match="no images"):
        likelihood_gap(model, train, [])


# ---- the oracle ------------------------------------------------------------------------------------------------------

QUICK = Recipe(arch="resnet18_quarter", epochs=2, batch_size=50, lr=0.05, augment=("crop",))


@pytest.fixture(scope="module")
def oracle(bundled_train: ImageData) -> Classifier:
    x, y = bundled_train.tensor()[:, :, ::2, ::2], torch.from_numpy(bundled_train.targets)
    return train_classifier((x, y), 10, QUICK, progress=False)


def test_the_oracle_learns_and_its_head_is_linear(oracle: Classifier, bundled_test: ImageData) -> None:
    x, y = bundled_test.tensor()[:, :, ::2, ::2], torch.from_numpy(bundled_test.targets)
    assert oracle.accuracy(x, y) > 0.35  # chance is 0.1
    f, logits = oracle.run(x[:60])
    assert f.shape == (60, 128) and torch.allclose(oracle(x[:60]), logits, atol=1e-4)
    head = oracle.net.get_classifier()
    assert torch.allclose(f @ head.weight.T + head.bias, logits, atol=1e-4)
    assert torch.allclose(oracle(x[:8].float() / 255), oracle(x[:8]), atol=1e-5)
    with pytest.raises(ValueError, match=r"\[B, 1, 14, 14\]"):
        oracle(x[:2, :, :7])


def test_training_is_repeatable_and_seeded(bundled_train: ImageData) -> None:
    rows = torch.arange(0, 1000, 10)
    x, y = bundled_train.tensor()[rows][:, :, ::4, ::4], torch.from_numpy(bundled_train.targets)[rows]
    recipe = Recipe(arch="resnet18_quarter", epochs=1, batch_size=25)

    def weights(recipe: Recipe) -> str:
        return train_classifier((x, y), 10, recipe, progress=False).weights_hash()

    assert weights(recipe) == weights(recipe)
    assert weights(recipe) != weights(Recipe(arch="resnet18_quarter", epochs=1, batch_size=25, seed=1))


def test_every_epoch_may_bring_new_images() -> None:
    seen: list[int] = []

    def epoch_data(epoch: int) -> tuple[Tensor, Tensor]:
        seen.append(epoch)
        g = torch.Generator().manual_seed(epoch)
        return torch.randint(0, 256, (20, 3, 8, 8), generator=g, dtype=torch.uint8), torch.arange(20) % 4

    recipe = Recipe.transformer(arch="vit_micro", epochs=3, batch_size=10)
    net = train_classifier(epoch_data, 4, recipe, progress=False)
    assert seen == [0, 1, 2] and net(epoch_data(0)[0]).shape == (20, 4)
    assert net.run(epoch_data(0)[0])[0].shape == (20, 96)


def test_architectures_are_the_papers() -> None:
    net = Classifier("resnet18", (3, 32, 32), 100)
    parameters = sum(p.numel() for p in net.net.parameters())
    assert parameters == 11_220_132  # the usual ResNet18 for CIFAR-100
    assert sum(p.numel() for p in Classifier("resnet18_quarter", (3, 32, 32), 100).net.parameters()) < parameters / 15
    assert net.net.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    with pytest.raises(ValueError, match="arch"):
        Classifier("resnet19", (3, 32, 32), 10)


def test_a_saved_oracle_comes_back(oracle: Classifier, bundled_test: ImageData, tmp_path: Path) -> None:
    x = bundled_test.tensor()[:20, :, ::2, ::2]
    oracle.save(tmp_path / "oracle.safetensors")
    again = Classifier.load(tmp_path / "oracle.safetensors")
    assert torch.equal(again(x), oracle(x)) and again.weights_hash() == oracle.weights_hash()
    assert again.facts["recipe"]["arch"] == "resnet18_quarter"
    (tmp_path / "oracle.safetensors").write_bytes(b"no")
    with pytest.raises(ModelFileError, match="train the classifier again"):
        Classifier.load(tmp_path / "oracle.safetensors")


def test_recipes_and_data_are_checked() -> None:
    for bad in (dict(arch="x"), dict(optimizer="x"), dict(epochs=0), dict(lr=0.0), dict(augment=("x",))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Recipe(**bad)
    x = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="labels must lie"):
        train_classifier((x, torch.tensor([0, 1, 2, 3])), 3, QUICK, progress=False)
    with pytest.raises(DataError, match="uint8"):
        train_classifier((x.float(), torch.zeros(4).long()), 3, QUICK, progress=False)
