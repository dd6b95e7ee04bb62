"""FID, coverage, label reliability and memorisation against slow, plain references."""

from __future__ import annotations

import prdc
import pytest
import timm
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from examples._quality import (
    coverage,
    feature_fid,
    features_and_logits,
    label_reliability,
    memorisation_ratio,
)


def features(n: int, m: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(m, m, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return scale * torch.randn(n, m, generator=g, dtype=torch.float64) @ mix + shift


@pytest.mark.parametrize(("n", "m"), [(500, 12), (60, 40), (30, 64)])  # the last one has fewer images than features
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fid_is_that_of_torch_fidelity(n: int, m: int, offset: float) -> None:
    a, b = features(n, m, 0), features(n + 7, m, 1, 0.3, 1.2)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    wanted = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert feature_fid(a + offset, b + offset) == pytest.approx(wanted, rel=1e-5)
    assert feature_fid(a + offset, a + offset) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("k", "shift"), [(1, 0.7), (5, 0.0), (5, 300.0)])
def test_coverage_and_density_are_those_of_prdc(k: int, shift: float) -> None:
    real, generated = features(700, 6, 0), features(430, 6, 1, shift, 0.8)  # two chunks of rows
    wanted = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    got = coverage(real, generated, k)
    assert got["coverage"] == pytest.approx(wanted["coverage"], abs=1e-9)
    assert got["density"] == pytest.approx(wanted["density"], rel=1e-9)
    real = features(40, 5, 0, 1e3)
    assert coverage(real, real)["coverage"] == 1.0
    # The nearest neighbour of every image is its copy, at distance 0, and no image is nearer than that.
    assert coverage(torch.cat([real, real]), real, 1)["coverage"] == 0.0


def test_features_that_cannot_be_used_are_named() -> None:
    good = features(10, 4, 0)
    with pytest.raises(ValueError, match="one network"):
        feature_fid(good, features(10, 5, 0))
    with pytest.raises(ValueError, match="not finite"):
        feature_fid(good, good * float("nan"))
    with pytest.raises(ValueError, match="at least 6"):
        coverage(good[:5], good, 5)


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_features_are_what_the_last_layer_sees(arch: str) -> None:
    sized = {} if arch == "resnet18" else {"img_size": 32}
    net = timm.create_model(arch, num_classes=4, drop_rate=0.5, **sized).train()
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    seen, logits = features_and_logits(net, x, mean=0.4, std=0.2, batch_size=2)
    assert net.training
    net.eval()
    with torch.no_grad():
        assert torch.allclose(net((x.float() / 255 - 0.4) / 0.2), logits, atol=1e-5)
        assert torch.allclose(net.get_classifier()(seen), logits, atol=1e-5)
    assert torch.allclose(features_and_logits(net, x.float() / 255, 0.4, 0.2)[0], seen, atol=1e-5)
    y = logits.argmax(1)
    assert label_reliability(logits, y) == 1.0
    y[:2] = (y[:2] + 1) % 4
    assert label_reliability(logits, y) == pytest.approx(0.6)


def test_memorisation_ratio_knows_copies_from_new_images() -> None:
    train, held_out, fresh = features(300, 6, 0), features(200, 6, 1), features(150, 6, 2)
    honest = memorisation_ratio(fresh, train, held_out)
    assert 0.9 < honest["ratio"] < 1.1 and 0.4 < honest["share_nearer_train"] < 0.6
    copies = memorisation_ratio(train[:150] + 1e-3, train, held_out)
    assert copies["ratio"] < 0.1 and copies["share_nearer_train"] > 0.6
    two = memorisation_ratio(torch.tensor([[1.0, 0], [2.0, 0]]), torch.zeros(1, 2), torch.tensor([[3.0, 0]]))
    assert two["ratio"] == pytest.approx(1.25)  # of 1/2 and 2
    assert memorisation_ratio(held_out[:150], train, held_out)["ratio"] > 1e6  # a distance of 0
    many = features(600, 6, 3)  # two chunks of rows
    ratios = torch.cdist(many, train[:200]).amin(1) / torch.cdist(many, held_out).amin(1)
    assert memorisation_ratio(many, train[:200], held_out)["ratio"] == pytest.approx(float(ratios.median()), rel=0.01)
    assert memorisation_ratio(fresh, train[:50], train[:50])["share_nearer_train"] == 0.5
