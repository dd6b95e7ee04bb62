"""Class covariances as thin factor plus diagonal, against dense float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glem_augment import GLEM, ImageData
from glem_augment.errors import DataError, ModelFileError
from glem_augment.latent.modes import fit_class_modes
from glem_augment.latent.rfcm import ThinCovariances
from glem_augment.latent.rfcm_fit import CovarianceStream, fit_covariances, oas_shrinkage


def make_latents(counts: list[int], dim: int, seed: int = 0) -> list[torch.Tensor]:
    """Correlated latents with a decaying spectrum and a mean of their own, another for every class."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in counts:
        mix = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
        scale = 0.8 ** torch.arange(dim, dtype=torch.float64)
        z = torch.randn(n, dim, generator=g, dtype=torch.float64) * scale @ mix
        out.append(z + 3 * torch.randn(1, dim, generator=g, dtype=torch.float64))
    return out


def dense_log_prob(z: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    return torch.distributions.MultivariateNormal(mean.double(), cov.double()).log_prob(z.double())


@pytest.mark.parametrize("count", [9, 24, 60])  # fewer, as many and more images than dimensions
@pytest.mark.parametrize("store", ["float32", "float16"])
def test_exact_factors_are_the_sample_covariance(count: int, store: str) -> None:
    latents = make_latents([count, 30], 24)
    thin = fit_covariances(lambda y: latents[y], 2, 24, ridge=0.0, store=store)
    assert thin.factors[0].shape == (min(count, 24), 24) and thin.factors[0].dtype == getattr(torch, store)
    tolerance = 1e-6 if store == "float32" else 2e-3
    for y, z in enumerate(latents):
        cov = torch.cov(z.T)
        assert torch.allclose(thin.mean[y].double(), z.mean(0), atol=1e-6)
        assert torch.allclose(thin.covariance(y), cov, atol=tolerance * float(cov.max()))


@pytest.mark.parametrize("rank", [None, 3])
def test_samples_have_the_covariance_of_the_class(rank: int | None) -> None:
    latents = make_latents([7, 200], dim=8)
    thin = fit_covariances(lambda y: latents[y], 2, 8, rank=rank)
    n = 20_000
    g = torch.Generator().manual_seed(1)
    for y in (0, 1):
        z = thin.sample(torch.full((n,), y), generator=g).double()
        cov = thin.covariance(y)
        if rank is None:
            empirical = torch.cov(latents[y].T)
            ridge = 1e-4 * empirical.diagonal().mean()
            assert torch.allclose(cov, empirical + ridge * torch.eye(8), atol=1e-6)
        # standard error of a covariance entry: sqrt((c_ii c_jj + c_ij^2) / n)
        error = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / n).sqrt()
        assert torch.all((torch.cov(z.T) - cov).abs() < 5 * error)
        assert torch.all((z.mean(0) - thin.mean[y]).abs() < 5 * (cov.diagonal() / n).sqrt())


def test_sampling_is_seeded_by_item_and_scaled_by_temperature() -> None:
    latents = make_latents([5, 12, 9], 10)
    thin = fit_covariances(lambda y: latents[y], 3, 10)
    y = torch.tensor([2, 0, 1, 2, 0])

    def draw(t: float) -> torch.Tensor:
        return thin.sample(y, t, torch.Generator().manual_seed(3))

    assert torch.equal(draw(1.0), draw(1.0))
    assert torch.equal(draw(0.0), thin.mean[y])
    assert torch.allclose(draw(0.5) - thin.mean[y], 0.5 * (draw(1.0) - thin.mean[y]), atol=1e-6)
    many = thin.sample(torch.zeros(600, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    assert len(many.unique(dim=0)) == 600  # several blocks, no repeated noise


@pytest.mark.parametrize(
    "settings",
    [
        dict(ridge=1e-4),
        dict(ridge=1e-2, rank=4),
        dict(ridge=0.0, shrinkage=0.3),
        dict(shrinkage="oas", target="pooled"),
        dict(shrinkage=0.2, target="identity", store="float16"),
    ],
)
@pytest.mark.parametrize("count", [6, 50])
def test_woodbury_scores_equal_the_dense_density(settings: dict, count: int) -> None:
    latents = make_latents([count, 20], 15)
    thin = fit_covariances(lambda y: latents[y], 2, 15, **settings)
    z = torch.cat([latents[0][:4], latents[1][:4], torch.randn(4, 15, dtype=torch.float64) * 5])
    scores = thin.log_prob(z)
    for y in (0, 1):
        expected = dense_log_prob(z, thin.mean[y], thin.covariance(y))
        assert torch.allclose(scores[:, y], expected, rtol=1e-7, atol=1e-6)


def test_shrinkage_is_a_convex_combination() -> None:
    latents = make_latents([6, 40], 9)
    covs = [torch.cov(z.T) for z in latents]
    pooled = (5 * covs[0].diagonal() + 39 * covs[1].diagonal()) / 44
    for target, wanted in (
        ("diagonal", torch.diag(covs[0].diagonal())),
        ("pooled", torch.diag(pooled)),
        ("identity", torch.eye(9).double() * covs[0].diagonal().mean()),
    ):
        thin = fit_covariances(lambda y: latents[y], 2, 9, shrinkage=0.25, target=target, ridge=0.0)
        assert torch.allclose(thin.covariance(0), 0.75 * covs[0] + 0.25 * wanted, atol=1e-6)
    whole = fit_covariances(lambda y: latents[y], 2, 9, shrinkage=1.0, ridge=0.0)
    assert torch.allclose(whole.covariance(1), torch.diag(covs[1].diagonal()), atol=1e-6)


def test_oas_matches_its_formula_and_falls_with_the_number_of_images() -> None:
    few, many = make_latents([8], 20)[0], make_latents([5000], 20)[0]

    def intensity(z: torch.Tensor) -> float:
        stream = CovarianceStream(1, 20)
        stream.add_class(0, z)
        return oas_shrinkage(stream.take(0))

    s = torch.cov(few.T)
    t, t2, n, p = float(s.trace()), float((s @ s).trace()), 8, 20
    expected = ((1 - 2 / p) * t2 + t * t) / ((n + 1 - 2 / p) * (t2 - t * t / p))
    assert intensity(few) == pytest.approx(min(1.0, expected), rel=1e-9)
    assert intensity(many) < 0.01 < intensity(few)
    cut = CovarianceStream(1, 20)
    cut.add_class(0, many)
    thin = cut.take(0).truncated(4)
    dense = thin.factor.T @ thin.factor + torch.diag(thin.rest)
    assert thin.rest.min() > 0 and thin.trace_of_square() == pytest.approx(float((dense @ dense).trace()), rel=1e-9)


def test_truncation_keeps_every_variance() -> None:
    latents = make_latents([30], 12)
    thin = fit_covariances(lambda y: latents[0], 1, 12, rank=3, ridge=0.0)
    cov = torch.cov(latents[0].T)
    assert thin.factors[0].shape == (3, 12)
    assert torch.allclose(thin.covariance(0).diagonal(), cov.diagonal(), atol=1e-6)
    values = torch.linalg.eigvalsh(cov).flip(0)[:3]
    assert torch.allclose(thin.factor(0).double().square().sum(1), values, rtol=1e-5)


def chunks(z: torch.Tensor, sizes: list[int]) -> Iterator[torch.Tensor]:
    start = 0
    while start < len(z):
        for size in sizes:
            if start < len(z):
                yield z[start : start + size]
                start += size


@pytest.mark.parametrize("count", [10, 95])
def test_streaming_in_any_order_is_exact(count: int) -> None:
    latents = make_latents([count, 33], 16)
    whole = fit_covariances(lambda y: latents[y], 2, 16)
    z = torch.cat(latents)
    y = torch.tensor([0] * count + [1] * 33)
    order = torch.randperm(len(y))
    stream = CovarianceStream(2, 16)
    for part in order.split(7):
        stream.add(z[part], y[part])
    streamed = stream.finish()
    by_chunk = fit_covariances(lambda y: chunks(latents[y], [1, 5, 11]), 2, 16)
    for other in (streamed, by_chunk):
        assert other.counts.tolist() == [count, 33]
        assert torch.allclose(other.mean, whole.mean, atol=1e-6)
        for c in (0, 1):
            assert torch.allclose(other.covariance(c), whole.covariance(c), atol=1e-6)


def test_a_stream_takes_all_of_a_batch_or_nothing_and_lives_on_after_an_error() -> None:
    z = torch.randn(8, 4)
    y = torch.tensor([0] * 7 + [1])
    stream = CovarianceStream(2, 4)
    spoilt = z.clone()
    spoilt[7] = torch.nan
    with pytest.raises(DataError, match="class 1 has latents that are not finite"):
        stream.add(spoilt, y)
    stream.add(z, y)
    with pytest.raises(DataError, match="class 1 has 1 images"):
        stream.finish()
    more = torch.randn(5, 4)
    stream.add(more, torch.ones(5, dtype=torch.int64))
    found = stream.finish()
    assert found.counts.tolist() == [7, 6]
    assert torch.allclose(found.mean, torch.stack([z[:7].mean(0), torch.cat([z[7:], more]).mean(0)]), atol=1e-6)
    with pytest.raises(DataError, match="last finished"):
        stream.finish()


def test_chunks_may_be_made_in_one_buffer() -> None:
    latents, buffer = make_latents([12], 3)[0], torch.empty(4, 3, dtype=torch.float64)

    def in_buffer(_: int) -> Iterator[torch.Tensor]:
        for part in latents.split(4):
            yield buffer.copy_(part)

    found = fit_covariances(in_buffer, 1, 3)
    assert torch.allclose(found.mean[0].double(), latents.mean(0), atol=1e-6)
    assert torch.allclose(found.covariance(0), fit_covariances(lambda y: latents, 1, 3).covariance(0), atol=1e-6)


def test_shrinkage_of_one_dimension_stays_a_share() -> None:
    for seed in range(300):
        stream = CovarianceStream(1, 1)
        stream.add_class(0, torch.randn(7, 1, generator=torch.Generator().manual_seed(seed)))
        assert 0.0 <= oas_shrinkage(stream.take(0)) <= 1.0


def test_bounded_streaming_keeps_variances_exactly_and_strong_modes_nearly() -> None:
    z = make_latents([409], 40)[0]  # the last 4 still wait at the end
    stream = CovarianceStream(1, 40, max_rows=12)
    for part in z.split(9):
        stream.add(part, torch.zeros(len(part), dtype=torch.int64))
        assert len(stream.streams[0].factor) <= 12 and stream.streams[0]._waiting_rows <= 24
    thin = stream.finish(ridge=0.0)
    cov = torch.cov(z.T)
    assert thin.factors[0].shape == (12, 40)
    assert torch.allclose(thin.covariance(0).diagonal(), cov.diagonal(), atol=1e-6)
    got = torch.linalg.eigvalsh(thin.factor(0).double().T @ thin.factor(0).double()).flip(0)[:5]
    assert torch.allclose(got, torch.linalg.eigvalsh(cov).flip(0)[:5], rtol=1e-2)


def test_class_modes_become_scored_covariances() -> None:
    latents = make_latents([6, 50], 10)
    modes = fit_class_modes(lambda y: latents[y], 2, rank=8, dim=10)
    thin = ThinCovariances.from_modes(modes)
    assert [len(f) for f in thin.factors] == [5, 8]  # the zero rows of the small class are gone
    z = torch.randn(5, 10)
    dense = (modes.directions[1].double().T * modes.scales[1].double() ** 2) @ modes.directions[1].double()
    dense = dense + torch.diag(modes.rest[1].double())
    dense = dense + 1e-4 * dense.diagonal().mean() * torch.eye(10)
    assert torch.allclose(thin.log_prob(z)[:, 1], dense_log_prob(z, modes.mean[1], dense), rtol=1e-4)


def test_storage_is_compact_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    latents = make_latents([10, 17], 200)
    full = fit_covariances(lambda y: latents[y], 2, 200)
    half = fit_covariances(lambda y: latents[y], 2, 200, store="float16")
    path = half.save(tmp_path, weights="abc")
    rows, dim = 27, 200
    fixed = 2 * (2 * dim * 4 + 8 + 4) + rows * 4
    assert half.nbytes == rows * dim * 2 + fixed and full.nbytes == rows * dim * 4 + fixed
    assert path.stat().st_size < half.nbytes + 2000
    again = ThinCovariances.load(tmp_path, weights="abc")
    assert torch.equal(again.log_prob(latents[0]), half.log_prob(latents[0]))
    with pytest.raises(ModelFileError, match="belongs to the weights abc"):
        ThinCovariances.load(tmp_path, weights="other")
    for name in ("mean", "diagonal", "factors", "row_scales"):
        spoilt = fit_covariances(lambda y: latents[y], 2, 200)
        values = getattr(spoilt, name)
        values[1][3] = torch.nan
        spoilt.save(tmp_path)
        with pytest.raises(ModelFileError, match="not finite"):
            ThinCovariances.load(tmp_path)
        with pytest.raises(ModelFileError, match=r"belongs to the weights \?"):  # nobody said whose they are
            ThinCovariances.load(tmp_path, weights="abc")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match="can't be read"):
        ThinCovariances.load(tmp_path)
    with pytest.raises(ModelFileError, match="rfcm.safetensors"):
        ThinCovariances.load(tmp_path / "nowhere")


def test_of_a_model_classifies_and_samples_its_own_classes() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randint(0, 200, (3, 1, 4, 4), generator=g)
    y = torch.arange(60) % 3
    x = (base[y] + torch.randint(0, 30, (60, 1, 4, 4), generator=g)).to(torch.uint8)
    data = ImageData.from_tensors(x, y, ["a", "b", "c"])
    model = GLEM.create("identity", (1, 4, 4), ["a", "b", "c"])
    thin = model.fit_rfcm(data, shrinkage="oas")
    assert thin.counts.tolist() == [20, 20, 20]
    z, _ = model.encode(x)
    assert torch.equal(thin.log_prob(z).argmax(1), y)
    drawn = model.decode(thin.sample(torch.tensor([0, 1, 2])))
    assert drawn.shape == (3, 1, 4, 4)
    other = ImageData.from_tensors(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), [0, 1, 2] * 2, ["a", "b", "c"])
    with pytest.raises(DataError, match="the flow takes"):
        model.fit_rfcm(other)


def test_errors_name_the_value() -> None:
    good = torch.randn(4, 5)
    with pytest.raises(DataError, match="class 1 has 1 images"):
        fit_covariances(lambda y: good[: 4 - 3 * y], 2, 5)
    with pytest.raises(DataError, match="class 0 .*not finite"):
        fit_covariances(lambda y: good * float("nan"), 1, 5)
    with pytest.raises(ValueError, match=r"\[n, 6\]"):
        fit_covariances(lambda y: good, 1, 6)
    for bad in (dict(rank=0), dict(shrinkage=2.0), dict(target="x"), dict(ridge=-1.0), dict(store="int8")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fit_covariances(lambda y: good, 1, 5, **bad)
    thin = fit_covariances(lambda y: good, 1, 5, ridge=0.0)
    with pytest.raises(ValueError, match="singular"):
        thin.log_prob(good)
    with pytest.raises(ValueError, match="labels must lie in 0..0"):
        thin.sample(torch.tensor([1]))
    with pytest.raises(ValueError, match="temperature"):
        thin.sample(torch.tensor([0]), float("nan"))
    with pytest.raises(ValueError, match="max_rows"):
        CovarianceStream(1, 5, max_rows=0)
