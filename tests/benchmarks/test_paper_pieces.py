"""What only the paper's tables use: class codes, classifiers, the continuum, out-of-distribution scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import binary_auroc

from benchmarks.paper.classifier import Classifier, Recipe, train_classifier
from benchmarks.paper.codes import ClassCodes, balance_by_rejection, code_agreement, coded_trainer
from benchmarks.paper.continuum import continuum_correlation, mantel
from benchmarks.paper.pareto import averaged_posterior
from benchmarks.paper.research import Research
from benchmarks.paper.trust import auroc, ood_scores, outside_images
from glem_augment import GLEM, ImageData
from glem_augment.distributed import share
from glem_augment.errors import DataError
from glem_augment.training import TrainConfig


def make_data(n: int = 300) -> ImageData:
    """Three classes of 8x8 images, noise around an image of the class."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    base = torch.randint(60, 190, (3, 1, 8, 8), generator=g)
    x = (base[y] + torch.randint(-20, 20, (n, 1, 8, 8), generator=g)).to(torch.uint8)
    return ImageData.from_tensors(x, y, ["a", "b", "c"])


def fitted(data: ImageData) -> GLEM:
    """An identity flow with each class's mean and variances."""
    model = GLEM.create("identity", data.image_shape, data.classes, psi=None).requires_grad_(False)
    z, y = model.encode(data.tensor(), torch.Generator().manual_seed(0))[0], torch.from_numpy(data.targets)
    for c in range(len(data.classes)):
        model.gaussians.mu[c], model.gaussians.s[c] = z[y == c].mean(0), z[y == c].var(0)
    model.gaussians.initial_variance = 1e-6  # so that the lower bound does not bind
    return model


# ---- class codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 5])
def test_noise_can_never_change_a_label(bits: int) -> None:
    made = ClassCodes.design(10, (1, 28, 28), levels=2, bits=bits)
    assert made.prototypes.shape == (10, 1, 4, 28) and made.amplitude > 0.02
    assert float(made.prototypes.min()) >= made.amplitude - 1e-6
    assert float(made.prototypes.max()) <= 1 - made.amplitude + 1e-6
    flat = made.prototypes.flatten(1)
    distances = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    assert (2 * made.amplitude + 2.0**-bits) * math.sqrt(flat.shape[1]) == pytest.approx(float(distances.min()) / 2)
    # The worst noise moves every pixel as far as it can go towards the nearest other prototype.
    worst = flat + made.amplitude * (flat[distances.argmin(1)] - flat).sign()
    worst = ((worst.view_as(made.prototypes) * 255).round().to(torch.uint8) >> (8 - bits)).float() / (2**bits - 1)
    assert made.read(torch.cat([torch.zeros(10, 1, 28, 28), worst], 2)).tolist() == list(range(10))
    # Repulsion spreads the prototypes.
    assert made.amplitude > 1.2 * ClassCodes.design(10, (1, 28, 28), 2, bits, steps=0).amplitude
    with pytest.raises(ValueError, match="can't be told apart"):
        ClassCodes.design(500, (1, 4, 2), 1, bits=1)


def test_coded_images_are_read_and_their_codes_left_alone_in_training(tmp_path: Path) -> None:
    data, made = make_data(), ClassCodes.design(3, (1, 8, 8), 1)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    coded = made.dataset(data)
    image, code = made.split(coded.tensor())
    assert torch.equal(image, x) and torch.equal(made.read(coded.tensor()), y)
    assert torch.equal(made.read(coded.tensor().float() / 255), y) and not torch.equal(code[0], code[3])
    assert float((code.float() / 255 - made.prototypes[y]).abs().max()) <= made.amplitude + 0.51 / 255
    blank = made.append_random(x, torch.Generator().manual_seed(0))
    assert 0.15 < float((made.read(blank) == y).float().mean()) < 0.55
    config = TrainConfig(preset="identity", augment=("flip", "crop"), epochs=1, modes_rank=0)
    trainer = coded_trainer(made, coded, config, tmp_path, False, torch.device("cpu"), Research())
    out = trainer.augmented(coded.tensor(), torch.Generator().manual_seed(0), share(len(coded)))
    assert torch.equal(made.split(out)[1], code) and not torch.equal(made.split(out)[0], image)


def test_codes_of_samples_agree_with_their_gaussians_and_rejection_balances() -> None:
    data, made = make_data(), ClassCodes.design(3, (1, 8, 8), 1)
    model = fitted(made.dataset(data))
    assert code_agreement(model, made, 50, 1.0, 0) > 0.95
    swapped = ClassCodes(made.prototypes.roll(1, 0), made.amplitude, made.height)
    assert code_agreement(model, swapped, 50, 1.0, 0) < 0.05
    g = torch.Generator().manual_seed(0)
    share = torch.tensor([0.7, 0.25, 0.05])

    def draw(n: int) -> Tensor:
        y = torch.multinomial(share, n, replacement=True, generator=g)
        images = torch.full((n, 1, 8, 8), 0.0) + y[:, None, None, None] / 10
        return torch.cat([images, made.draw(y, g).float() / 255], 2)

    x, y, facts = balance_by_rejection(draw, made, per_class=40)
    assert x.dtype == torch.uint8 and y.bincount().tolist() == [40, 40, 40]
    assert torch.equal(x[:, 0, 0, 0].long(), (y * 25.5).round().long())  # each image has its own code's label
    assert 0.02 < facts["rarest"] < 0.1 and 0.05 < facts["acceptance"] < 0.3
    share[2] = 0.0
    with pytest.raises(DataError, match="held 0 of class 2"):
        balance_by_rejection(draw, made, per_class=5)


# ---- classifiers -----------------------------------------------------------------------------------------------------


def test_a_classifier_learns_repeatably_and_comes_back_from_its_file(
    bundled_train: ImageData, bundled_test: ImageData, tmp_path: Path
) -> None:
    images = bundled_train.tensor()[:, :, ::2, ::2], torch.from_numpy(bundled_train.targets)
    recipe = Recipe(arch="resnet18_quarter", epochs=2, batch_size=50, lr=0.05, augment=("crop",))
    net, again = (train_classifier(lambda epoch: images, 10, recipe, progress=False) for _ in range(2))
    x, y = bundled_test.tensor()[:, :, ::2, ::2], torch.from_numpy(bundled_test.targets)
    assert net.accuracy(x, y) > 0.35  # chance is 0.1
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    net.save(tmp_path / "net.safetensors")
    loaded = Classifier.load(tmp_path / "net.safetensors")
    assert torch.equal(loaded(x[:20]), net(x[:20])) and loaded.facts["recipe"]["arch"] == "resnet18_quarter"
    few = x[:50, :, :12, :12], y[:50]
    transformer = Recipe.transformer(arch="vit_micro", epochs=1, batch_size=10)
    assert train_classifier(lambda epoch: few, 10, transformer, progress=False)(few[0]).shape == (50, 10)


# ---- continuum, out of distribution, averaging -----------------------------------------------------------------------


def test_continuum_correlations_find_structure_and_only_structure() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(12, 3, generator=g, dtype=torch.float64)
    near = torch.cdist(points, points)
    noisy = (near + 0.5 * torch.rand(12, 12, generator=g)).triu(1)
    noisy = noisy + noisy.T
    pairs = torch.ones(12, 12).triu(1) > 0
    value, p = mantel(near, noisy)
    assert value == pytest.approx(float(spearman_corrcoef(near[pairs], noisy[pairs])), abs=1e-6)
    assert value > 0.8 and p == 0.001 and mantel(near, -noisy) == (pytest.approx(-value), 0.001)
    other = torch.cdist(*[torch.randn(12, 3, generator=g, dtype=torch.float64)] * 2)
    assert mantel(near, other)[1] > 0.05
    # Of flows it has the signs of the claim.
    centres, y = torch.randn(8, 4, generator=g), torch.arange(400) % 8
    x = centres[y] + 0.3 * torch.randn(400, 4, generator=g)
    kld = 0.5 * torch.cdist(centres, centres).square()  # of unit Gaussians at the classes' centres
    fit = continuum_correlation(kld, -torch.cdist(x, centres).square(), x + 1e3, y)
    assert fit["rho-distance"] > 0.95 and fit["rho-confusion"] < -0.9
    assert max(fit["rho-distance p"], fit["rho-confusion p"]) <= 0.01


def test_ood_scores_and_their_auroc() -> None:
    model, x = fitted(make_data()), make_data().tensor()
    inside = ood_scores(model, x[:120])
    assert torch.allclose(inside["likelihood"], -model.log_prob(x[:120]).double(), atol=1.0)
    mean = float(inside["likelihood"].mean())
    typical = ood_scores(model, x[120:], mean)
    assert torch.allclose(typical["typicality"], (typical["likelihood"] - mean).abs())
    for kind in ("noise", "inverted", "rotated"):
        outside = ood_scores(model, outside_images(x[:120], kind), mean)
        assert auroc(typical["likelihood"], outside["likelihood"]) > 0.99
    entropy = torch.special.entr(model.log_prob_per_class(x[:120]).double().softmax(1)).sum(1)
    assert torch.allclose(inside["entropy"], entropy, atol=1e-3)
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(50, generator=g).mul(8).round() / 10, torch.rand(70, generator=g).mul(10).round() / 10
    target = torch.cat([torch.zeros(50), torch.ones(70)]).long()
    assert auroc(a, b) == pytest.approx(float(binary_auroc(torch.cat([a, b]), target)), abs=1e-6)


def test_averaged_posteriors_are_means_over_noise_and_mirrors() -> None:
    model, x = fitted(make_data()), make_data().tensor()[:20] // 4 * 2 + 60
    g = torch.Generator().manual_seed(0)
    views = [torch.softmax(model.gaussians.log_prob(model.encode(v, g)[0]).double(), 1) for v in (x, x, x.flip(3))]
    assert torch.allclose(averaged_posterior(model, x, 2, False), (views[0] + views[1]) / 2, atol=1e-6)
    assert averaged_posterior(model, x, 1, True).sum(1).allclose(torch.ones(20).double())
